"""A server's answers as demonstrations: what is asked, what is kept, and what every kind of failure says."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import crosstrain
from crosstrain import load_data, text_server
from crosstrain.assemble import learns_from_answers, load_streams
from crosstrain.checks import unused_settings
from crosstrain.cli import main
from crosstrain.config import Recipe, TextTeacherSpec, config_hash, parse, to_yaml
from crosstrain.data.chat import encode
from crosstrain.data.rows import Row
from crosstrain.errors import UserError
from crosstrain.load_data import LoadedStream, load_stream
from crosstrain.methods import METHODS, load_method
from crosstrain.models import load_tokenizer
from crosstrain.planning import plan
from crosstrain.prepare import prepare
from crosstrain.testing import save_tiny_model
from crosstrain.text_server import complete
from crosstrain.text_teacher import Taught, question, teach
from crosstrain.training.record import read_lines
from jsonl import write

pytestmark = pytest.mark.usefixtures("cache")

PROMPTS = [f"say {i}" for i in range(6)]
GRPO = {"grpo": {"num_generations": 2}}
SAMPLING = {"rewards": ["exact_match"], "sampling": {"max_completion_length": 3}}
Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Asked:
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        """What is asked, as text."""
        return str(self.body.get("prompt") or self.body["messages"][-1]["content"])


def told(text: str | None, reason: str | None = "stop", *, chat: bool = True) -> Reply:
    """A completion as the protocol has it."""
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    return 200, {}, json.dumps({"choices": [{**choice, "finish_reason": reason}], "usage": usage}).encode()


def echo(asked: Asked) -> Reply:
    return told(f"{asked.prompt}!", chat="messages" in asked.body)


def refused(status: int, message: str = "not now", **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": message}}).encode()


@dataclass
class Server:
    """A teacher on this machine; `reply` says what it answers, `asked` what it was asked, `most` how many at a time."""

    url: str = ""
    reply: Callable[[Asked], Reply] = echo
    asked: list[Asked] = field(default_factory=list)
    most: int = 0
    now: int = 0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(self.path, dict(self.headers), body)
            with lock:
                found.asked.append(asked)
                found.now += 1
                found.most = max(found.most, found.now)
            status, headers, content = found.reply(asked)
            with lock:
                found.now -= 1
            if not status:  # hangs up
                return
            with contextlib.suppress(ConnectionError):  # whoever asked may have given up
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *given: Any) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(text_server, "BACKOFF_S", 0.001)
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{listening.server_address[1]}/v1"
    threading.Thread(target=lambda: listening.serve_forever(0.01), daemon=True).start()
    yield found
    listening.shutdown()
    listening.server_close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    write(folder / "prompts.jsonl", [{"prompt": p, "answer": p[-1]} for p in PROMPTS])
    write(folder / "chats.jsonl", [{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS])
    write(folder / "told.jsonl", [{"prompt": p, "completion": "old"} for p in PROMPTS])
    return folder


def recipe(
    world: Path, server: Server, file: str = "prompts.jsonl", *, data: Any = None, method: Any = "sft", **teacher: Any
) -> Recipe:
    one = {
        "path": str(world / file),
        "teacher": {"base_url": server.url, "model": "big", "retries": 2, **teacher},
        **(data or {}),
    }
    content = {
        "model": str(world / "model"),
        "data": one,
        "method": method,
        "max_steps": 2,
        "batch_size": 3,
        "learning_rate": 1e-2,
        "evaluation": {"forgetting": False, "divergence": False},
        "precision": "fp32",
        "device": "cpu",
    }
    return parse(Recipe, content)


def loaded(made: Recipe) -> LoadedStream:
    return load_stream("train", made.data["train"], made, load_tokenizer(made.model.name), None)


def answers(one: LoadedStream) -> list[Any]:
    return [row.completion for part in one.parts for row in part.rows]


def kept_lines(cache: Path) -> list[dict[str, Any]]:
    return [line for file in sorted((cache / "answers").glob("*.jsonl")) for line in read_lines(file)]


# --- what is asked, and what becomes of it --------------------------------------------------------------------------------


def test_sft_trains_on_the_answers_and_records_them(world: Path, server: Server, tmp_path: Path, cache: Path) -> None:
    made = recipe(world, server)
    folder = crosstrain.train(made, tmp_path / "run").folder
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and len(server.asked) == 6
    record = json.loads((folder / "record.json").read_text())
    [told_of] = record["data_report"]["train"]
    file = told_of["teacher"].pop("answers")
    assert told_of["teacher"] == {
        "model": "big",
        "base_url": server.url,
        "kept": 6,
        "dropped": {},
        "prompt_tokens": 18,
        "completion_tokens": 12,
    }
    assert {line["answer"]["text"] for line in read_lines(Path(file))} == {f"{p}!" for p in PROMPTS}
    # the same as rows that bring these answers
    write(tmp_path / "rows.jsonl", [{"prompt": p, "completion": f"{p}!", "answer": p[-1]} for p in PROMPTS])
    plain = made.model_dump(exclude_defaults=True) | {"data": str(tmp_path / "rows.jsonl")}
    other = crosstrain.train(parse(Recipe, plain), tmp_path / "plain").folder
    assert [line["loss"] for line in read_lines(other / "metrics.jsonl")] == [line["loss"] for line in lines]
    assert json.loads((other / "record.json").read_text())["data"] == record["data"]


def test_requests_are_the_protocols(world: Path, server: Server) -> None:
    assert answers(loaded(recipe(world, server, temperature=0.5, top_p=0.9, max_completion_length=7))) == [
        f"{p}!" for p in PROMPTS
    ]
    assert {one.path for one in server.asked} == {"/v1/completions"}
    settings = {"model": "big", "temperature": 0.5, "top_p": 0.9, "max_tokens": 7}
    assert sorted((one.body for one in server.asked), key=lambda b: b["prompt"]) == [{"prompt": p, **settings} for p in PROMPTS]
    assert not any("Authorization" in one.headers for one in server.asked)
    assert {one.headers["User-Agent"] for one in server.asked} == {f"crosstrain/{crosstrain.__version__}"}
    server.asked.clear()
    more = {"extra_body": {"stop": ["\n"], "temperature": None}}
    one = loaded(recipe(world, server, "chats.jsonl", data={"system_prompt": "be brief"}, **more))
    assert answers(one) == [({"role": "assistant", "content": f"{p}!"},) for p in PROMPTS]
    assert {one.path for one in server.asked} == {"/v1/chat/completions"}
    system = {"role": "system", "content": "be brief"}
    assert sorted((one.body for one in server.asked), key=lambda b: b["messages"][1]["content"]) == [
        {"model": "big", "max_tokens": 256, "stop": ["\n"], "messages": [system, {"role": "user", "content": p}]}
        for p in PROMPTS
    ]


def test_any_method_for_demonstrations_learns_from_them(world: Path, server: Server, tmp_path: Path) -> None:
    for method in ("dft", {"luffy": {"num_generations": 2}}):
        content = recipe(world, server, method=method).model_dump(exclude_defaults=True)
        content |= {"rewards": ["exact_match"], "sampling": {"max_completion_length": 3}} if method != "dft" else {}
        assert crosstrain.train(parse(Recipe, content), tmp_path / str(method)[2:5]).metrics["step"] == 2
    assert len(server.asked) == 6


def test_several_answers_are_rows_of_their_own(world: Path, server: Server, cache: Path) -> None:
    tally: dict[str, int] = {}

    def another(asked: Asked) -> Reply:
        tally[asked.prompt] = tally.get(asked.prompt, 0) + 1
        return told(f"{asked.prompt} {tally[asked.prompt]}", chat=False)

    server.reply = another
    made = recipe(world, server, n=3, temperature=1.0, concurrency=1)
    one = loaded(made)
    assert answers(one) == [f"{p} {k}" for p in PROMPTS for k in (1, 2, 3)]
    assert [e.where for e in one.stream.examples][:4] == [
        f"{world}/prompts.jsonl:{row}" for row in ("1#1", "1#2", "1#3", "2#1")
    ]
    assert [e.id for e in one.stream.examples] == [f"train:{i}#{k}" for i in range(6) for k in (1, 2, 3)]
    assert answers(loaded(made)) == answers(one) and len(server.asked) == 18
    assert len(answers(loaded(recipe(world, server, n=4, temperature=1.0)))) == 24
    assert len(server.asked) == 24  # the first three of each are those that were there


def test_each_of_several_answers_has_a_seed_of_its_own(world: Path, server: Server) -> None:
    server.reply = lambda asked: told(f"{asked.prompt} {asked.body['seed']}", chat=False)
    one = loaded(recipe(world, server, data={"size": 2}, n=3, temperature=1.0, extra_body={"seed": 7}))
    assert answers(one) == [f"{p} {seed}" for p in PROMPTS[:2] for seed in (7, 8, 9)]


def test_a_prompt_that_comes_twice_is_asked_once(world: Path, server: Server, tmp_path: Path) -> None:
    write(tmp_path / "twice.jsonl", [{"prompt": p} for p in "pqp"])
    assert answers(loaded(recipe(world, server, str(tmp_path / "twice.jsonl")))) == ["p!", "q!", "p!"]
    assert len(server.asked) == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_do_not_depend_on_the_order_in_which_answers_arrive(
    world: Path, server: Server, cache: Path, workers: int
) -> None:
    def last_first(asked: Asked) -> Reply:
        time.sleep(0.04 * (6 - int(asked.prompt[-1])))
        return echo(asked)

    server.reply = last_first
    one = loaded(recipe(world, server, concurrency=workers))
    assert answers(one) == [f"{p}!" for p in PROMPTS] and server.most == workers
    arrived = [line["answer"]["text"] for line in kept_lines(cache)]
    assert (arrived == answers(one)) == (workers == 1)


def test_cut_and_empty_answers_are_left_out_and_counted(world: Path, server: Server, cache: Path) -> None:
    def some(asked: Asked) -> Reply:
        k = int(asked.prompt[-1])
        text, reason = [
            ("a", "length"),
            (" ", "stop"),
            ("c", "stop"),
            ("d", "eos_token"),
            ("e", "length"),
            ("f", "tool_calls"),
        ][k]
        return told(text, reason, chat=False)

    server.reply = some
    made = recipe(world, server)
    one, file = loaded(made), world / "prompts.jsonl"
    assert answers(one) == ["c", "d"] and [e.id for e in one.stream.examples] == ["train:2", "train:3"]
    [kept] = (cache / "answers").glob("*.jsonl")
    assert one.warnings == (
        f"train: teacher keeps 2 of 6 rows; empty took 1, first {file}:2; length took 2, first {file}:1, {file}:5; "
        f"tool_calls took 1, first {file}:6; all are in {kept}",
    )
    found = load_streams(made, load_tokenizer(made.model.name), None, [load_method("sft")])
    assert found.warnings == one.warnings and len(server.asked) == 6
    server.reply = lambda asked: told("cut", "length", chat=False)
    with pytest.raises(
        UserError, match=r"data.train.teacher leaves no row: it keeps 0 of 6 rows; length took 6.* raise `max_comp"
    ):
        loaded(recipe(world, server, max_completion_length=3))


def test_answers_are_filtered_chosen_and_mixed_like_others(world: Path, server: Server) -> None:
    server.reply = lambda asked: told("long" * (int(asked.prompt[-1]) + 1), chat=False)
    made = recipe(world, server, data={"filter": {"max_length": 17}, "order": {"by": "length", "pacing": "sorted"}, "size": 5})
    one = loaded(made)
    assert [e.id for e in one.stream.draw(0, 4)[0]] == [f"train:{i}" for i in range(4)] and len(server.asked) == 5
    mixture = [made.data["train"].model_dump(exclude_defaults=True), {"path": str(world / "told.jsonl")}]
    content = made.model_dump(exclude_defaults=True) | {"data": {"mixture": mixture}}
    both = loaded(parse(Recipe, content))
    assert len(answers(both)) == 10 and "teacher" in both.report[0] and "teacher" not in both.report[1]
    assert len(server.asked) == 5


def test_rows_with_an_answer_are_errors_unless_it_is_to_be_replaced(world: Path, server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"told.jsonl:1: the row brings an answer, .* set `replace: true`"):
        loaded(recipe(world, server, "told.jsonl"))
    assert not server.asked
    assert answers(loaded(recipe(world, server, "told.jsonl", replace=True))) == [f"{p}!" for p in PROMPTS]
    spec = TextTeacherSpec(base_url=server.url, model="big")
    user, said = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    open_end = Row("messages", messages=(user, said, user), columns={"answer": 1, "behaviour_logp": [-1.0]}, where="f:1")
    assert question(open_end, spec) == Row("prompt", (user, said, user), columns={"answer": 1}, where="f:1")
    ended = Row("messages", messages=(user, said, user, said), where="f:1")
    with pytest.raises(UserError, match="f:1: the row brings an answer"):
        question(ended, spec)
    assert question(ended, spec.model_copy(update={"replace": True})).prompt == (user, said, user)
    refusals = {
        "brings its answers": Row("preference", "p", chosen="a", rejected="b", where="f:1"),
        "brings its answers;": Row("unpaired", "p", completion="a", label=True, where="f:1"),
        "no message to answer": Row("messages", messages=(said,), where="f:1"),
        "has tools": Row("prompt", "p", columns={"tools": []}, where="f:1"),
    }
    for message, row in refusals.items():
        with pytest.raises(UserError, match=f"f:1: .*{message}"):
            question(row, spec)


# --- what is kept ---------------------------------------------------------------------------------------------------------


def test_a_stopped_run_pays_for_nothing_twice(world: Path, server: Server, tmp_path: Path, cache: Path) -> None:
    server.reply = lambda asked: refused(400) if asked.prompt == "say 4" else echo(asked)
    made = recipe(world, server, concurrency=1)
    with pytest.raises(UserError, match=r"prompts.jsonl:5: .* Answers that came in are kept: the same command goes on"):
        crosstrain.train(made, tmp_path / "run")
    assert [one.prompt for one in server.asked] == PROMPTS[:5] and len(kept_lines(cache)) == 4
    [file] = (cache / "answers").glob("*.jsonl")
    file.write_text(file.read_text()[:-9])  # and the last line was cut off by a kill
    server.reply = lambda asked: told("other", chat=False)
    folder = crosstrain.train(made, tmp_path / "run").folder
    assert [one.prompt for one in server.asked[5:]] == PROMPTS[3:]
    texts = {line["where"].rpartition(":")[2]: line["answer"]["text"] for line in kept_lines(cache)}
    assert [texts[str(k)] for k in range(1, 7)] == ["say 0!", "say 1!", "say 2!", "other", "other", "other"]
    again = crosstrain.train(made, tmp_path / "again").folder
    losses = [[line["loss"] for line in read_lines(f / "metrics.jsonl")] for f in (folder, again)]
    assert losses[0] == losses[1] and len(server.asked) == 8


def test_answers_are_kept_by_all_that_they_depend_on(world: Path, server: Server, cache: Path) -> None:
    loaded(recipe(world, server))
    loaded(recipe(world, server, concurrency=1, timeout_s=9.0, retries=0))
    assert len(server.asked) == 6
    others: list[dict[str, Any]] = [
        {"model": "other"},
        {"temperature": 0.5},
        {"max_completion_length": 9},
        {"extra_body": {"seed": 1}},
        {"base_url": f"{server.url}/more"},
    ]
    for count, other in enumerate(others, start=2):
        loaded(recipe(world, server, **other))
        assert len(server.asked) == 6 * count


def test_two_at_once_ask_once(server: Server) -> None:
    server.reply = lambda asked: time.sleep(0.02) or echo(asked)  # type: ignore[func-returns-value]
    spec, rows = TextTeacherSpec(base_url=server.url, model="big"), [Row("prompt", p) for p in PROMPTS]
    found: list[Taught] = []
    both = [threading.Thread(target=lambda: found.append(teach("teacher", rows, spec, ask=True))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [[row.completion for row in one.rows] for one in found] == [[f"{p}!" for p in PROMPTS]] * 2 and len(
        server.asked
    ) == 6


# --- looking before asking ------------------------------------------------------------------------------------------------


def test_a_dry_run_says_how_many_requests_and_makes_none(world: Path, server: Server, cache: Path) -> None:
    made = recipe(world, server, max_completion_length=20, data={"filter": {"max_length": 2}})
    shown = str(plan(made))
    assert "data: train, 6 rows" in shown and "about 2 steps" in shown
    assert f"warning: train: the run will make 6 requests to big at {server.url}; nothing was asked now" in shown
    assert not server.asked and not kept_lines(cache)
    server.reply = lambda asked: told("a", chat=False)
    loaded(made)
    shown = str(plan(made))
    assert len(server.asked) == 6 and "requests" not in shown


def test_data_check_shows_the_answers_and_asks_when_told_to(
    world: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(world, server, max_completion_length=5, data={"select": {"rule": "random", "size": 4}})))
    assert main(["data", "check", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "warning: train: the run will make 6 requests" in shown and "[[answer answer answer answer answer" in shown
    assert not server.asked and "select:" not in shown
    assert main(["data", "check", str(file), "--ask"]) == 0
    shown = capsys.readouterr().out
    assert (
        "    teacher keeps 6 of 6 rows; big's answers are in " in shown
        and "!<|im_end|>]]" in shown
        and "select: random takes 4 of 6" in shown
    )
    assert len(server.asked) == 6
    assert main(["data", "check", str(world / "told.jsonl"), "--model", str(world / "model"), "--ask"]) == 2
    assert "--ask is for a recipe" in capsys.readouterr().err


def test_data_check_asks_for_what_a_run_would_ask_for_when_nothing_else_is_wrong(
    world: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def checked(made: Recipe) -> tuple[int, str]:
        (tmp_path / "recipe.yaml").write_text(to_yaml(made))
        code = main(["data", "check", str(tmp_path / "recipe.yaml"), "--ask"])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    taught = recipe(world, server).data["train"].model_dump(exclude_defaults=True)
    code, shown = checked(changed(recipe(world, server), data={"train": str(world / "told.jsonl"), "idle": taught}))
    assert code == 0 and "warning: data.idle: no stage draws from it" in shown
    code, shown = checked(changed(recipe(world, server, method=GRPO), **SAMPLING))
    assert code == 0 and "warning: data.train.teacher: no stage learns from demonstrations, so its server is not" in shown
    (tmp_path / "bad.jsonl").write_text('{"promt": "a"}\n')
    for refused, message in (
        (recipe(world, server, method="dpo"), "method dpo needs `chosen` and `rejected`"),
        (changed(recipe(world, server), data={"train": taught, "more": str(tmp_path / "bad.jsonl")}), "bad.jsonl:1"),
        (recipe(world, server, method={"luffy": {"num_generations": 2}}), "nothing scores them"),
        (changed(recipe(world, server), evaluation={"in_distribution": [{"name": "n", "task": "nowhere"}]}), "nowhere"),
    ):
        code, shown = checked(refused)
        assert code == 2 and message in shown
        assert ("train: 6 rows" in shown) == (message in ("method dpo needs `chosen` and `rejected`", "nowhere"))
    assert not server.asked
    assert checked(recipe(world, server))[0] == 0 and len(server.asked) == 6


def test_nothing_is_asked_for_rows_that_a_run_would_refuse(world: Path, server: Server) -> None:
    made = recipe(world, server)
    with pytest.raises(UserError, match=r"prompts.jsonl:1: the prompt has 5 tokens, more than max_prompt_length 4"):
        loaded(made.model_copy(update={"max_prompt_length": 4}))
    with pytest.raises(UserError, match=r"prompts.jsonl:1: system_prompt needs chat messages"):
        loaded(recipe(world, server, data={"system_prompt": "s"}))
    assert not server.asked


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"order": {"by": "column", "column": "nope"}}, r"prompts.jsonl:1: column 'nope' is missing"),
        ({"filter": {"quality_column": "nope", "min_quality": 1}}, r"prompts.jsonl:1: column 'nope' is missing"),
        ({"filter": {"quality_column": "answer", "min_quality": 9}}, r"data.train.filter leaves no row: it keeps 0 of 6 rows"),
        ({"select": {"rule": "random", "size": 80}}, r"data.train.select.size: got 80 of 12 rows"),
        (
            {"select": {"rule": "random", "size": 4}, "filter": {"quality_column": "answer", "min_quality": 4}},
            r"data.train.select.size: got 4 of 4 rows",
        ),
    ],
)
def test_nothing_is_paid_for_rows_whose_own_columns_are_wrong(
    world: Path, server: Server, data: dict[str, Any], message: str
) -> None:
    made = recipe(world, server, data=data, n=2, temperature=1.0)
    for act in (loaded, prepare, plan):
        with pytest.raises(UserError, match=message):
            act(made)
    assert not server.asked


def test_columns_are_looked_at_where_they_are_needed(world: Path, server: Server, tmp_path: Path) -> None:
    write(tmp_path / "some.jsonl", [{"prompt": p, "good": int(p[-1]), **({"hard": 1} if p > "say 2" else {})} for p in PROMPTS])
    data = {"filter": {"quality_column": "good", "min_quality": 3}, "order": {"by": "column", "column": "hard"}}
    assert loaded(recipe(world, server, str(tmp_path / "some.jsonl"), data=data)).rows == 3


def changed(made: Recipe, **more: Any) -> Recipe:
    return parse(Recipe, made.model_dump(exclude_defaults=True) | more)


def test_nothing_is_paid_for_a_recipe_that_cannot_run(world: Path, server: Server, tmp_path: Path) -> None:
    stage = {"method": "sft", "max_steps": 1, "batch_size": 3, "learning_rate": 1e-2, "precompute_ref_log_probs": True}
    for refused, message in (
        (recipe(world, server, method="dpo"), "method dpo needs `chosen` and `rejected`"),
        (recipe(world, server, method=GRPO), "method grpo samples completions, and nothing scores them"),
        (changed(recipe(world, server, method=GRPO), rewards=["nowhere.py:f"]), "nowhere.py"),
        (
            changed(recipe(world, server), stages=[stage]),
            "precompute_ref_log_probs is true, but sft compares with no reference",
        ),
    ):
        with pytest.raises(UserError, match=message):
            crosstrain.train(refused, tmp_path / message[:8])
    assert not server.asked


def test_answers_that_nobody_reads(world: Path, server: Server, tmp_path: Path) -> None:
    made = recipe(world, server, data={"order": "length"})
    idle = {"train": str(world / "told.jsonl"), "idle": made.data["train"].model_dump(exclude_defaults=True)}
    records = []
    for name in ("before", "after"):
        folder = crosstrain.train(changed(made, data=idle), tmp_path / name).folder
        records.append(json.loads((folder / "record.json").read_text()))
        assert len(server.asked) == (0 if name == "before" else 6)
        loaded(made)  # somebody else asks
    assert records[0]["warnings"] == records[1]["warnings"] == ["data.idle: no stage draws from it"]
    assert records[0]["data"] == records[1]["data"]  # a run goes on


def test_rows_that_nobody_reads_may_bring_anything(world: Path, server: Server, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    write(pairs, [{"prompt": p, "chosen": "a", "rejected": "b"} for p in PROMPTS])
    taught = recipe(world, server).data["train"].model_dump(exclude_defaults=True)
    mixture = [{**taught, "path": str(pairs)}, {"path": str(world / "prompts.jsonl")}]
    for idle in ({**taught, "path": str(world / "told.jsonl")}, {"mixture": mixture}):
        made = changed(recipe(world, server), data={"train": str(world / "told.jsonl"), "idle": idle})
        assert plan(made).warnings == ("data.idle: no stage draws from it",)
    assert not server.asked


def test_a_stage_that_reads_no_answers_asks_for_none(world: Path, server: Server, tmp_path: Path) -> None:
    """The prompts are those that a teacher would be asked, whether its answers happen to be there or not."""
    chats = [{"messages": [{"role": "user", "content": p}], "answer": "4"} for p in PROMPTS]
    write(tmp_path / "chats.jsonl", chats)
    for file in ("prompts.jsonl", str(tmp_path / "chats.jsonl")):
        made = changed(
            recipe(world, server, file, method=GRPO, data={"filter": {"quality_column": "answer", "min_quality": 0}}),
            **SAMPLING,
        )
        records = []
        for name in ("before", "after"):
            folder = crosstrain.train(made, tmp_path / f"{name}{len(file)}").folder
            records.append(json.loads((folder / "record.json").read_text()))
            assert len(server.asked) == (0 if name == "before" else 6)
            loaded(made)  # somebody else asks
        server.asked.clear()
        assert records[0]["data"] == records[1]["data"] and records[0]["data"]["train"]["rows"] == 6
        warned = "data.train.teacher: no stage learns from demonstrations, so its server is not asked"
        assert all(warned in record["warnings"] for record in records)


CUSTOM = """
from dataclasses import replace

from crosstrain.methods import grpo, sft


def only(method, **plan):
    return replace(method, plan=replace(method.plan, **plan))


def start():
    return only(sft.sft(), start=lambda e, s: tuple(e.expert), needs_expert=None)


def unnamed():
    return replace(grpo.grpo(num_generations=2), name="")


def reward():
    return only(grpo.grpo(num_generations=2), reward=lambda g, t, decode: float(bool(g.example.expert)))


def wants():
    return only(grpo.grpo(num_generations=2), wants=lambda e, s: bool(e.expert))


def select():
    return replace(grpo.grpo(num_generations=2), select=lambda g, s: g if g.example.expert else None)
"""


@pytest.mark.parametrize("name", ["start", "unnamed", "reward", "wants", "select"])
def test_a_method_of_ones_own_gets_the_answers_whatever_it_declares(
    world: Path, server: Server, tmp_path: Path, name: str
) -> None:
    (tmp_path / "mine.py").write_text(CUSTOM)
    made = changed(recipe(world, server, method=f"{tmp_path / 'mine.py'}:{name}"), **SAMPLING)
    ready = prepare(made)
    assert len(server.asked) == 6 and all(len(e.expert) == 1 for e in ready.loaded.streams["train"].examples)
    assert not any("teacher" in text for text in unused_settings(made, ready.methods))


def test_built_in_methods_that_learn_from_no_answers_are_known() -> None:
    idle = {name for name in METHODS if not learns_from_answers("train", [load_method(name)])}
    assert {"grpo", "ppo", "rloo", "remax", "raft", "replay"} <= idle and not {"sft", "luffy", "dpo", "kto"} & idle


def test_rows_are_tokenized_once_at_each_start_after_the_first(
    world: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized: list[str] = []

    def counted(row: Row, *given: Any, **named: Any) -> Any:
        tokenized.append(f"{Path(row.where).name} {row.kind}")
        return encode(row, *given, **named)

    monkeypatch.setattr(load_data, "encode", counted)
    made = recipe(world, server)
    data = {"train": made.data["train"].model_dump(exclude_defaults=True), "more": str(world / "told.jsonl")}
    once = [f"{file}.jsonl:{i} prompt_completion" for file in ("prompts", "told") for i in range(1, 7)]
    for start in ("first", "next", "dry"):
        tokenized.clear()
        prepare(changed(made, data=data), ask=start != "dry")
        if start == "first":  # the prompts, with words for their answers, alone, and with their answers
            prompts = [one for one in once if one.startswith("prompts")]
            expected = [*once, *prompts, *(one.replace("_completion", "") for one in prompts)]
        else:
            expected = once
        assert sorted(tokenized) == sorted(expected)
    assert len(server.asked) == 6


def test_answers_that_choose_rows_are_asked_for_though_nobody_learns_from_them(world: Path, server: Server) -> None:
    server.reply = lambda asked: told("long" * (6 - int(asked.prompt[-1])), chat=False)
    made = changed(recipe(world, server, method=GRPO, data={"order": {"by": "length", "pacing": "sorted"}}), **SAMPLING)
    ready = prepare(made)
    assert len(server.asked) == 6 and [e.id for e in ready.loaded.streams["train"].draw(0, 6)[0]][:2] == ["train:5", "train:4"]
    warned = "data.train.teacher: no stage learns from demonstrations, and its answers only filter, choose or order rows"
    assert warned in plan(made).warnings
    assert not any("teacher:" in text for text in plan(recipe(world, server)).warnings)


def test_each_source_of_a_mixture_says_what_becomes_of_its_answers(world: Path, server: Server) -> None:
    judged = recipe(world, server, data={"order": "length"}).data["train"].model_dump(exclude_defaults=True)
    bare = recipe(world, server).data["train"].model_dump(exclude_defaults=True)
    made = changed(
        recipe(world, server, method=GRPO), **SAMPLING, data={"mixture": [str(world / "prompts.jsonl"), judged, bare]}
    )
    said = "teacher: no stage learns from demonstrations"
    assert [text for text in plan(made).warnings if said in text] == [
        f"data.train.mixture.1.{said}, and its answers only filter, choose or order rows",
        f"data.train.mixture.2.{said}, so its server is not asked",
    ]


@pytest.mark.parametrize(
    "data", [{"select": {"rule": "random", "size": 8}}, {"filter": {"deduplicate": "near", "near_threshold": 0.3}}]
)
def test_arms_that_learn_from_answers_and_arms_that_do_not_draw_the_same_rows(
    world: Path, server: Server, data: dict[str, Any]
) -> None:
    server.reply = lambda asked: told(f"{asked.prompt} makes {'one two three four five' * int(asked.prompt[-1])}", chat=False)
    drawn = []
    for method in ("sft", GRPO):
        made = changed(recipe(world, server, method=method, data=data, n=2, temperature=1.0), **SAMPLING)
        ready = prepare(made)
        drawn.append([e.id for e in ready.loaded.streams["train"].examples])
        warned = [text for text in unused_settings(made, ready.methods) if "teacher" in text]
        assert len(server.asked) == 12 and bool(warned) == (method == GRPO)
    assert drawn[0] == drawn[1] and len(drawn[0]) < 12


def test_a_run_goes_on_with_more_patience_and_a_corrected_address(world: Path, server: Server, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match="correct `base_url`"):
        crosstrain.train(recipe(world, server, base_url="http://127.0.0.1:1/v1"), out)
    assert crosstrain.train(recipe(world, server), out).metrics["step"] == 2
    patient = recipe(world, server, concurrency=1, timeout_s=9.0, retries=7, api_key_env="NOT_SET")
    assert config_hash(patient) == config_hash(recipe(world, server))
    assert crosstrain.train(patient, out).metrics["step"] == 2 and len(server.asked) == 6
    with pytest.raises(UserError, match=r"holds a run of another recipe: data.train.teacher.model is "):
        crosstrain.train(recipe(world, server, model="bigger"), out)


# --- what goes wrong ------------------------------------------------------------------------------------------------------


def in_turn(*replies: Reply) -> Callable[[Asked], Reply]:
    left = list(replies)
    return lambda asked: left.pop(0) if left else echo(asked)


def test_a_busy_server_is_asked_again(world: Path, server: Server) -> None:
    server.reply = in_turn(refused(429, Retry_After="0"), refused(503), (0, {}, b""))
    assert answers(loaded(recipe(world, server, concurrency=1, retries=3))) == [f"{p}!" for p in PROMPTS]
    assert [one.prompt for one in server.asked] == ["say 0"] * 3 + PROMPTS


@pytest.mark.parametrize("reason", ["abort", "error", None])
def test_an_answer_that_the_server_gave_up_is_asked_for_again_and_not_kept(
    world: Path, server: Server, cache: Path, reason: str | None
) -> None:
    given_up = told("sa", reason, chat=False)
    server.reply = in_turn(*[given_up] * 3)
    with pytest.raises(
        UserError, match=r"prompts.jsonl:1: .*\(tried 3 times\) (gave up its answer|does not say why its answer)"
    ):
        loaded(recipe(world, server, concurrency=1))
    assert not kept_lines(cache)
    server.asked.clear()
    server.reply = in_turn(given_up)
    assert answers(loaded(recipe(world, server, concurrency=1))) == [f"{p}!" for p in PROMPTS] and len(server.asked) == 7
    # an earlier version kept them
    [file] = (cache / "answers").glob("*.jsonl")
    file.write_text(file.read_text().replace('"finish_reason": "stop"', f'"finish_reason": {json.dumps(reason)}', 1))
    assert answers(loaded(recipe(world, server))) == [f"{p}!" for p in PROMPTS] and len(server.asked) == 8


def test_waits_grow_and_a_server_may_set_them() -> None:
    waits = [text_server._pause(tries, "") / text_server.BACKOFF_S for tries in range(1, 9)]
    assert all(0.5 * most <= wait <= most for wait, most in zip(waits, (1, 2, 4, 8, 16, 32, 60, 60), strict=True))
    assert [text_server._pause(1, said) for said in ("7", "99999")] == [7, text_server.MOST_S]
    assert text_server._pause(1, "Wed, 21 Oct 2015 07:28:00 GMT") <= text_server.BACKOFF_S


@pytest.mark.parametrize(
    ("reply", "message", "tries"),
    [
        (refused(500, "a crash"), r"\(tried 3 times\) answered 500 \(a crash\); try again later, or with a lower `conc", 3),
        (refused(429), r"\(tried 3 times\) answered 429 \(not now\); try again later", 3),
        (refused(401, "who?"), r"answered 401 \(who\?\); name a variable that holds a key as `api_key_env`", 1),
        (refused(404, "no such model"), r"answered 404 \(no such model\); check `model`, .* needs prompts that are chat", 1),
        (refused(400, "too long"), r"answered 400 \(too long\); change what it does not take", 1),
        ((302, {"Location": "http://127.0.0.1:1/v1"}, b""), "sends on to 'http://127.0.0.1:1/v1', which is not followed", 1),
        ((200, {}, b"<html>hello</html>"), "gave '<html>hello</html>', which is no completion in OpenAI's protocol", 1),
        ((200, {}, b'{"choices": []}'), ".* which is no completion", 1),
        ((200, {}, b'{"choices": [{"text": 3}]}'), ".* which is no completion", 1),
        ((200, {}, b"[1]"), ".* which is no completion", 1),
        ((200, {"Content-Length": "99"}, b"{"), r"\(tried 3 times\) gives no reply \(IncompleteRead", 3),
        (
            (0, {}, b""),
            r"\(tried 3 times\) gives no reply \(RemoteDisconnected: .*; start the server, or correct `base_url`",
            3,
        ),
        ((502, {}, b"<h1>Bad\n gateway</h1>"), r"\(tried 3 times\) answered 502 \(<h1>Bad gateway</h1>\)", 3),
    ],
)
def test_failures_name_the_row_the_address_and_what_to_do(
    world: Path, server: Server, reply: Reply, message: str, tries: int
) -> None:
    server.reply = lambda asked: reply
    with pytest.raises(UserError, match=rf"prompts.jsonl:1: {server.url}/completions {message}") as caught:
        loaded(recipe(world, server, concurrency=1))
    assert len(server.asked) == tries and str(caught.value).endswith("the same command goes on from there")


def test_a_server_that_is_not_there_or_does_not_answer(world: Path, server: Server) -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:1/v1/completions \(tried 3 times\) gives no reply \(ConnectionRefused"):
        loaded(recipe(world, server, base_url="http://127.0.0.1:1/v1"))
    server.reply = lambda asked: time.sleep(0.5) or echo(asked)  # type: ignore[func-returns-value]
    with pytest.raises(UserError, match=r"completions did not answer within 0.1 s; raise `timeout_s`"):
        loaded(recipe(world, server, timeout_s=0.1, retries=0))


def test_what_is_under_way_when_one_fails_is_kept(world: Path, server: Server, cache: Path) -> None:
    three = threading.Barrier(3)

    def third_fails(asked: Asked) -> Reply:
        three.wait(20)
        time.sleep(0.0 if asked.prompt == "say 2" else 0.5)
        return refused(400) if asked.prompt == "say 2" else echo(asked)

    server.reply = third_fails
    with pytest.raises(UserError, match=r"prompts.jsonl:3: "):
        loaded(recipe(world, server, concurrency=3))
    assert len(server.asked) == 3 and {line["answer"]["text"] for line in kept_lines(cache)} == {"say 0!", "say 1!"}


def test_an_interrupt_waits_for_no_server(world: Path, server: Server, tmp_path: Path) -> None:
    over = threading.Event()
    server.reply = lambda asked: (over.wait(60), echo(asked))[1]
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(world, server)))
    command = [sys.executable, "-m", "crosstrain", "train", str(file), "--out", str(tmp_path / "run")]
    # a shell's background jobs ignore it, and so would what they start
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **heeding)
    while not server.asked:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert "interrupted; the same command goes on" in run.communicate(timeout=20)[1] and run.returncode == 130
    over.set()


def test_the_key_comes_from_a_variable_and_is_never_shown(
    world: Path,
    server: Server,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = recipe(world, server, api_key_env="BIG_KEY", concurrency=1)
    monkeypatch.delenv("BIG_KEY", raising=False)
    for act in (loaded, plan):
        with pytest.raises(UserError, match=r"data.train.teacher.api_key_env: the environment variable BIG_KEY is not set"):
            act(made)
    monkeypatch.setenv("BIG_KEY", "\u20ac1")
    with pytest.raises(UserError, match="the environment variable BIG_KEY holds no key") as caught:
        loaded(made)
    assert "\u20ac" not in str(caught.value)
    monkeypatch.setenv("BIG_KEY", " s3cret\n")
    server.reply = lambda asked: refused(401, f"{asked.headers['Authorization']} is no key")
    with pytest.raises(UserError, match=r"\(Bearer \*\*\* is no key\); check the key in the variable that `api_key_env` names"):
        loaded(made)
    server.reply = lambda asked: (200, {}, asked.headers["Authorization"].encode())
    with pytest.raises(UserError, match=r"gave 'Bearer \*\*\*'"):
        loaded(made)
    server.reply = echo
    crosstrain.train(made, tmp_path / "run")
    assert server.asked[-1].headers["Authorization"] == "Bearer s3cret"
    written = [f for folder in (cache, tmp_path / "run") for f in folder.rglob("*") if f.is_file()]
    assert written and not any(b"s3cret" in f.read_bytes() for f in written)
    shown = capsys.readouterr()
    assert "s3cret" not in shown.out + shown.err
    monkeypatch.delenv("BIG_KEY")  # nothing is left to ask for
    assert answers(loaded(made)) == [f"{p}!" for p in PROMPTS]


def test_text_that_is_no_unicode_can_be_kept(server: Server) -> None:
    server.reply = lambda asked: (200, {}, b'{"choices": [{"text": "a\\ud800", "finish_reason": "stop"}]}')
    body = {"prompt": "p"}
    found = complete(f"{server.url}/completions", body, key="", timeout_s=5, retries=0, wait=lambda s: False)
    assert (found.text, found.prompt_tokens) == ("a?", 0)
    server.reply = lambda asked: told(None, "content_filter")
    found = complete(f"{server.url}/chat/completions", body, key="", timeout_s=5, retries=0, wait=lambda s: False)
    assert (found.text, found.finish_reason) == ("", "content_filter")


# --- recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "data.teacher.base_url: must be an address such as"),
        ({"base_url": "http://a b/v1"}, "must be an address"),
        ({"base_url": "http://a..b/v1"}, "data.teacher.base_url: got 'http://a..b/v1'; a host's name has 1 to 63 characters"),
        ({"base_url": f"http://{'a' * 70}/v1"}, "a host's name has 1 to 63 characters"),
        ({"base_url": "http://h:999999/v1"}, "data.teacher.base_url: Port out of range"),
        ({"base_url": "http://me:pw@h/v1"}, "must hold no user, password"),
        ({"base_url": "https://h/v1?key=1"}, "must hold no user, password"),
        ({"base_url": "https://h/v1/chat/completions/"}, "leave out the end"),
        ({"api_key_env": "sk-12345"}, "data.teacher.api_key_env: must be the name of an environment variable, in capitals"),
        ({"n": 2}, "data.teacher: 'n' has no effect at temperature 0"),
        ({"top_p": 0.5}, "'top_p' has no effect at temperature 0"),
        ({"extra_body": {"stream": True}}, "extra_body.stream is set by crosstrain"),
        ({"extra_body": {"max_tokens": 3}}, "extra_body.max_tokens: write it as 'max_completion_length'"),
        ({"temprature": 1.0}, "unknown key 'data.teacher.temprature'; did you mean 'temperature'"),
        ({"model": None}, "data.teacher.model"),
    ],
)
def test_settings_that_cannot_be(world: Path, server: Server, teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        recipe(world, server, **teacher)
    assert "pw" not in str(caught.value) and "12345" not in str(caught.value)


def test_every_setting_is_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in TextTeacherSpec.model_fields if f"`{name}`" not in page] == []


def test_a_teacher_stands_inside_a_source_of_a_mixture(world: Path, server: Server) -> None:
    with pytest.raises(UserError, match="'teacher' stands beside 'mixture'; write it inside the source it is for"):
        recipe(world, server, data={"path": None, "mixture": ["a.jsonl", "b.jsonl"]})


@pytest.mark.parametrize("method", ["gkd", "on_policy_distillation", "sdft", "sft"])
@pytest.mark.parametrize(
    "teacher", ["http://127.0.0.1:8000/v1", {"name": "HTTPS://h/v1"}, {"base_url": "http://h/v1", "model": "m"}]
)
def test_a_server_cannot_give_what_other_distillation_needs(method: str, teacher: Any) -> None:
    content = {"data": "rows.jsonl", "method": method, "max_steps": 1, "learning_rate": 1e-5, "teacher": teacher}
    with pytest.raises(
        UserError, match=r"^teacher: a server gives text only, .* log-probs of the whole vocabulary; .*`data: \{path: FILE"
    ):
        parse(Recipe, content)
