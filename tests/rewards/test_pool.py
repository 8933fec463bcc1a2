"""The pool: every way in which a reward function can misbehave, and what becomes of it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crosstrain.errors import UserError
from crosstrain.rewards import RewardPool, load_reward
from crosstrain.types import Example, Group, Source, Trajectory

REWARDS = '''
import os, sys, time, json

def length(completions, **kwargs):
    return [float(len(c)) for c in completions]

def columns(prompts, completions, completion_ids, **kwargs):
    print("printed")
    sys.stdout.flush()
    os.write(1, b"written to descriptor 1\\n")
    json.dump([prompts, completions, completion_ids, kwargs], open("seen.json", "w"))
    return [0.5 for _ in completions]

def by_word(completions, word, **kwargs):
    """Misbehaves as the row's column `word` says."""
    what = word[0]
    if what == "exit": os._exit(3)
    if what == "sys_exit": sys.exit(3)
    if what == "kill": os.kill(os.getpid(), 9)
    if what == "sleep": time.sleep(60)
    if what == "loop":
        while True: pass
    if what == "raise": raise RuntimeError("no luck")
    if what == "memory": bytearray(1 << 40)
    if what == "read": return [float(len(sys.stdin.read()))] * len(completions)
    if what == "short": return [1.0] * (len(completions) - 1)
    if what == "nan": return [float("nan")] * len(completions)
    if what == "inf": return [1.0] * (len(completions) - 1) + [float("inf")]
    if what == "text": return ["1.0"] * len(completions)
    if what == "number": return 1.0
    if what == "none": return [None] * len(completions)
    if what == "bool": return [True] * len(completions)
    if what == "numpy":
        import numpy
        return numpy.full(len(completions), 0.25, dtype="float32")
    return [1.0] * len(completions)

async def slowly(completions, **kwargs):
    return [2.0] * len(completions)

def sibling(completions, **kwargs):
    import beside
    return [beside.VALUE] * len(completions)

def with_a_child_of_its_own(completions, **kwargs):
    import subprocess
    child = subprocess.Popen(["sleep", "61.5"])
    open("grandchild", "w").write(str(child.pid))
    time.sleep(60)

def closed(completions):
    return [1.0]
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "check.py").write_text(REWARDS)
    (folder / "beside.py").write_text("VALUE = 7.0")
    return folder / "check.py"


@pytest.fixture(scope="module")
def pool(file: Path) -> Iterator[RewardPool]:
    with RewardPool([f"{file}:by_word"], timeout_s=1.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def forgiving(file: Path) -> Iterator[RewardPool]:
    with RewardPool([f"{file}:by_word"], timeout_s=1.0, on_error="missing") as pool:
        yield pool


P, X, Y = Source.PROMPT, Source.EXPERT, Source.POLICY


def group(word: str = "fine", texts: tuple[str, ...] = ("ab", "cde"), *, chat: bool = False, demo: str = "") -> Group:
    """A group whose tokens are characters; the prompt is `?`."""
    prompt: Any = ({"role": "user", "content": "?"},) if chat else "?"
    own = tuple(Trajectory((ord("?"), *map(ord, t)), (P, *[Y] * len(t))) for t in texts)
    demonstration = (Trajectory((ord("?"), *map(ord, demo)), (P, *[X] * len(demo))),) if demo else ()
    example = Example(f"train:{word}", prompt, (ord("?"),), columns={"word": word}, where=f"rows.jsonl:{word}")
    return Group(example, demonstration + own)


def decode(tokens: tuple[int, ...]) -> str:
    return "".join(map(chr, tokens))


def rewards(groups: list[Group]) -> list[list[float | None]]:
    return [[t.reward for t in g.trajectories] for g in groups]


def test_each_trajectory_gets_the_weighted_sum_of_its_scores(file: Path) -> None:
    functions = [load_reward(f"{file}:length"), load_reward(f"{file}:by_word"), load_reward(f"{file}:slowly")]
    with RewardPool(functions, [1.0, 0.5, -10.0], workers=2) as pool:
        scored, counts = pool.score([group("fine"), group("none"), group("fine", ("abcd",))], decode)
    assert rewards(scored) == [[2 + 0.5 - 20, 3 + 0.5 - 20], [2.0 - 20, 3.0 - 20], [4 + 0.5 - 20]]
    assert scored[0].trajectories[1].rewards == {"length": 3.0, "by_word": 1.0, "slowly": 2.0}
    assert math.isnan(scored[1].trajectories[0].rewards["by_word"])
    assert (counts.scored, counts.missing, counts.errors, counts.timeouts) == (5, 0, 0, 0)


def test_reward_functions_get_trls_keywords_and_their_prints_do_no_harm(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.chdir(tmp_path)
    with RewardPool([f"{file}:columns"]) as pool:
        for chat in (False, True):
            scored, _ = pool.score([group("w", chat=chat)], decode)
            assert rewards(scored) == [[0.5, 0.5]]
            prompts, completions, ids, rest = json.loads((tmp_path / "seen.json").read_text())
            assert prompts == [[{"role": "user", "content": "?"}] if chat else "?"] * 2
            texts = ["ab", "cde"]
            assert completions == ([[{"role": "assistant", "content": t}] for t in texts] if chat else texts)
            assert ids == [[97, 98], [99, 100, 101]]
            assert rest == {"word": ["w", "w"]}


def test_none_from_every_function_is_no_reward(pool: RewardPool) -> None:
    scored, counts = pool.score([group("none")], decode)
    assert rewards(scored) == [[None, None]]
    assert (counts.scored, counts.missing, counts.errors) == (0, 2, 0)


def test_only_own_completions_are_scored_unless_demonstrations_are_asked_for(pool: RewardPool) -> None:
    mixed = group(demo="xy")
    assert rewards(pool.score([mixed], decode)[0]) == [[None, 1.0, 1.0]]
    assert rewards(pool.score([mixed], decode, score_expert=True)[0]) == [[1.0, 1.0, 1.0]]
    known = Group(mixed.example, (Trajectory((63, 64), (P, Y), reward=0.125),))
    assert rewards(pool.score([known], decode)[0]) == [[0.125]]


@pytest.mark.parametrize("word", ["bool", "numpy", "read"])
def test_booleans_arrays_and_an_empty_standard_input_are_fine(pool: RewardPool, word: str) -> None:
    expected = {"bool": 1.0, "numpy": 0.25, "read": 0.0}[word]
    assert rewards(pool.score([group(word)], decode)[0]) == [[expected, expected]]


BUGS = {
    "raise": "RuntimeError: no luck",
    "sys_exit": "SystemExit: 3",
    "short": "1 scores for 2 completions",
    "nan": "gave nan",
    "inf": "gave inf",
    "text": "gave '1.0'",
    "number": "gave 1.0 instead of a list",
    "memory": "MemoryError",
}


@pytest.mark.parametrize("word", sorted(BUGS))
def test_a_mistake_in_the_reward_stops_the_run_and_names_the_row(pool: RewardPool, word: str) -> None:
    with pytest.raises(UserError) as caught:
        pool.score([group("fine"), group(word)], decode)
    assert BUGS[word] in str(caught.value)
    assert f"rows.jsonl:{word}" in str(caught.value)
    assert "check.py:by_word" in str(caught.value)
    assert rewards(pool.score([group("fine")], decode)[0]) == [[1.0, 1.0]], "the pool goes on working"


@pytest.mark.parametrize("word", sorted(BUGS))
def test_a_mistake_can_be_a_counted_missing_score_and_never_a_zero(forgiving: RewardPool, word: str) -> None:
    scored, counts = forgiving.score([group("fine"), group(word)], decode)
    assert rewards(scored) == [[1.0, 1.0], [None, None]]
    assert (counts.scored, counts.missing, counts.errors, counts.timeouts) == (2, 2, 1, 0)


@pytest.mark.parametrize(("word", "timeouts"), [("exit", 0), ("kill", 0), ("sleep", 1), ("loop", 1)])
def test_a_crash_or_a_hang_loses_its_own_group_only(pool: RewardPool, word: str, timeouts: int) -> None:
    before = pool._children[0].pid
    started = time.monotonic()
    scored, counts = pool.score([group("fine"), group(word), group("fine")], decode)
    assert time.monotonic() - started < 15
    assert rewards(scored) == [[1.0, 1.0], [None, None], [1.0, 1.0]]
    assert (counts.scored, counts.missing, counts.errors, counts.timeouts) == (4, 2, 1 - timeouts, timeouts)
    assert math.isnan(scored[1].trajectories[0].rewards["by_word"])
    assert pool._children[0].pid != before, "the child was replaced"
    assert not alive(before)


def test_a_reward_that_always_crashes_or_hangs_stops_the_run(pool: RewardPool, forgiving: RewardPool) -> None:
    with pytest.raises(UserError, match=r"crashed: its process ended with exit code 3, on rows\.jsonl:exit and all 2 rows"):
        pool.score([group("exit"), group("exit")], decode)
    assert forgiving.score([group("exit"), group("exit")], decode)[1].missing == 4


def test_a_failed_function_leaves_no_partial_sum(file: Path) -> None:
    with RewardPool([f"{file}:length", f"{file}:by_word"], on_error="missing", timeout_s=1.0) as pool:
        [failed], counts = pool.score([group("raise")], decode)
    assert [t.reward for t in failed.trajectories] == [None, None]
    assert failed.trajectories[0].rewards["length"] == 2.0
    assert (counts.missing, counts.errors) == (2, 1)


def test_a_hang_takes_down_what_the_reward_started(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RewardPool([f"{file}:with_a_child_of_its_own"], timeout_s=1.0, on_error="missing") as pool:
        assert pool.score([group()], decode)[1].timeouts == 1
    grandchild = int((tmp_path / "grandchild").read_text())
    for _ in range(50):
        if not alive(grandchild):
            return
        time.sleep(0.1)
    pytest.fail("a process that the reward started is still there")


def test_a_file_may_import_from_its_own_folder(file: Path) -> None:
    with RewardPool([f"{file}:sibling"]) as pool:
        assert rewards(pool.score([group()], decode)[0]) == [[7.0, 7.0]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("lenght", "has no function 'lenght'; did you mean 'length'"),
        ("closed", r"closed must take \*\*kwargs"),
        ("VALUE", "has no function 'VALUE'"),
    ],
)
def test_a_function_that_cannot_serve_is_found_before_the_first_step(file: Path, function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardPool([f"{file}:{function}"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", "SyntaxError"),
        ("import no_such_package", "no_such_package"),
        ("1 / 0", r"ZeroDivisionError: division by zero \(bad.py:1\)"),
        ("import os; os._exit(4)", "ended with exit code 4"),
        ("import time; time.sleep(60)", "not loaded within 1.5 s"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(UserError, match=message):
        RewardPool([f"{tmp_path / 'bad.py'}:f"], start_s=1.5)


def test_a_slow_import_does_not_count_as_a_slow_call(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time; time.sleep(1.0)\ndef f(completions, **kwargs): return [1.0] * len(completions)"
    )
    with RewardPool([f"{tmp_path / 'slow.py'}:f"], timeout_s=0.5) as pool:
        assert rewards(pool.score([group()], decode)[0]) == [[1.0, 1.0]]


def test_a_column_that_is_no_json_names_row_and_column(pool: RewardPool) -> None:
    broken = group()
    example = Example("train:9", "?", (63,), columns={"when": {1, 2}}, where="rows.parquet:9")
    with pytest.raises(UserError, match=r"rows\.parquet:9: column 'when'"):
        pool.score([Group(example, broken.trajectories)], decode)


def test_settings_of_the_pool_are_checked(file: Path) -> None:
    name = f"{file}:length"
    for arguments, options, message in [
        (([],), {}, "at least one"),
        (([name], [1.0, 2.0]), {}, "1 functions and 2 weights"),
        (([name], [math.nan]), {}, "finite"),
        (([name, name],), {}, "twice"),
        (([name],), {"timeout_s": 0.0}, "timeout_s"),
        (([name],), {"on_error": "ignore"}, "on_error"),
    ]:
        with pytest.raises(UserError, match=message):
            RewardPool(*arguments, **options)


def test_a_closed_pool_leaves_no_process_and_says_so(file: Path) -> None:
    pool = RewardPool([f"{file}:length"], workers=2)
    pids = [c.pid for c in pool._children]
    assert all(map(alive, pids))
    pool.close()
    assert not any(map(alive, pids))
    with pytest.raises(UserError, match="closed"):
        pool.score([group()], decode)


POOL = """
from crosstrain.rewards import RewardPool
child = RewardPool([{name!r}])._children[0]
"""
CHILD = """
from crosstrain.rewards.child import Child
from crosstrain.rewards.load import Reward
child = Child([Reward({name!r})], None)
child.start(60)
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(POOL + "print(child.pid, flush=True)", id="returns"),
        pytest.param(CHILD + "import os; print(child.pid, flush=True); os._exit(0)", id="exits"),
        pytest.param(CHILD + "import os; print(child.pid, flush=True); os.kill(os.getpid(), 9)", id="killed"),
        pytest.param(
            CHILD
            + "import os, threading, time; print(child.pid, flush=True); "
            + "threading.Thread(target=child.call, args=(0, {{'completions': [], 'word': ['sleep']}}, 99), daemon=True).start(); "
            + "time.sleep(0.3); os._exit(0)",
            id="during-a-call",
        ),
    ],
)
def test_children_end_with_their_parent_however_it_ends(file: Path, code: str) -> None:
    code = code.format(name=f"{file}:by_word")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    child = int(done.stdout)
    for _ in range(50):
        if not alive(child):
            return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent")


def test_the_child_imports_no_torch() -> None:
    code = (
        "import sys, crosstrain.rewards.worker as w; from crosstrain.rewards.load import find_function; "
        "find_function('task:arithmetic', {}); find_function('exact_match', {}); "
        "print(sorted({'torch', 'transformers', 'numpy', 'datasets', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def alive(pid: int) -> bool:
    """Whether the process is running; one that ended but was not yet collected is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
