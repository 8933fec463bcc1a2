"""`explain` of batches that a run could not have, or that lack something: an error that names it, and no wrong number."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from crosstrain.cli import main
from crosstrain.config.files import parse
from crosstrain.errors import UserError
from crosstrain.explain import GivenBatch, explain
from crosstrain.methods import METHODS, load_method

Row = dict[str, Any]


def row(authors: str, logp: list[float] | None = None, reward: float | None = None, **more: Any) -> Row:
    """A trajectory whose authors are given by their first letters, own tokens by an o; log-probs of -1 unless given."""
    names = {"p": "prompt", "e": "expert", "o": "policy", "t": "tool"}
    found = {"source": [names[a] for a in authors], "logp": logp or [0.0] + [-1.0] * (len(authors) - 1), **more}
    return found if reward is None else {**found, "reward": reward}


def batch_of(*groups: list[Row], **more: Any) -> GivenBatch:
    return parse(GivenBatch, {"groups": [{"trajectories": g} for g in groups], **more})


def weights(found: dict[str, Any]) -> list[list[float]]:
    return [t["weights"] for g in found["groups"] for t in g["trajectories"]]


def refused(name: str, given: GivenBatch, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        explain(load_method(name, **settings), given)
    return str(caught.value)


# ---- numbers


PAIR = [row("pppee", [0, -5, -7, -1, -2], 1.0), row("pppe", [0, -5, -7, -3], 0.0)]


def test_orpo_imitates_the_prompt_too_where_it_is_told_to() -> None:
    """The mean of -log pi over four tokens, the prompt's two among them: 15 / 4."""
    found = explain(load_method("orpo", prompt_nll=True), batch_of(PAIR))
    chosen = next(t for t in found["terms"] if t["name"] == "chosen")
    assert chosen == {"name": "chosen", "loss": pytest.approx(3.75), "denominator": 1.0, "tokens": 4}
    better, worse = weights(found)
    assert better[:3] == pytest.approx([0.0, 0.25, 0.25]) and worse[:3] == [0.0, 0.0, 0.0]
    without = explain(load_method("orpo"), batch_of(PAIR))
    assert next(t for t in without["terms"] if t["name"] == "chosen")["loss"] == pytest.approx(1.5)
    assert [t["loss"] for t in found["terms"][1:]] == [t["loss"] for t in without["terms"][1:]], "odds are of the answers"


def test_a_trained_prompt_is_printed_and_its_log_probs_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "batch.json"
    file.write_text(json.dumps({"groups": [{"trajectories": PAIR}]}))
    assert main(["explain", "orpo", "--batch", str(file), "--set", "prompt_nll=true"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "·+0.25 ·+0.25" in out and "the prompt (" in out
    high = [row("pppee", [0, 5, -7, -1, -2], 1.0), PAIR[1]]
    assert "groups.0.trajectories.0.logp.1: got 5.0" in refused("orpo", batch_of(high), prompt_nll=True)
    explain(load_method("orpo"), batch_of(high))  # ignored there


def test_a_reward_is_the_number_that_was_given() -> None:
    """In fp64: neither 0.1 nor 0.3 is a number of 32 bits; and what is the best is seen there too."""
    found = explain(load_method("rloo"), batch_of([row("po", None, 0.1), row("po", None, 0.3)]))
    assert found["groups"][0]["advantage"] == pytest.approx([-0.2, 0.2], rel=1e-14)
    close = [row("pe", None, 1.0), row("pe", None, 1.0 + 1e-12)]
    rejected, chosen = weights(explain(load_method("cpo"), batch_of(close)))
    assert chosen[1] > 1.0 > 0.0 > rejected[1]


@pytest.mark.parametrize("reward", [1e300, -1e39])
def test_a_reward_out_of_reach_says_what_is_allowed(reward: float) -> None:
    said = refused("rloo", batch_of([row("po", None, reward), row("po", None, 0.0)]))
    assert said.startswith(f"groups.0.trajectories.0.reward: got {reward:g}; a reward is from -3.4e+38 to 3.4e+38")


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        (
            "orpo",
            [row("pe", [0, 0.0], 1.0), row("pe", [0, -1.0], 0.0)],
            "groups.0.trajectories.0 (reward 1, token 1: logp 0)",
        ),
        (
            "gspo",
            [row("poo", None, 0.0, old_logp=[0, -9, -4000]), row("poo", None, 1.0, old_logp=[0, -1, -1])],
            "groups.0.trajectories.0 (reward 0, token 1: logp -1, old_logp -9; token 2: logp -1, old_logp -4000)",
        ),
    ],
)
def test_a_result_that_is_no_number_names_what_makes_it(
    name: str, rows: list[Row], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(name, batch_of(rows))
    assert f"of method {name} is not finite" in message and said in message and "give log-probs that a model" in message
    file = tmp_path / "batch.json"
    file.write_text(json.dumps({"groups": [{"trajectories": rows}]}))
    for more in ([], ["--json"]):
        assert main(["explain", name, "--batch", str(file), *more]) == 2
        captured = capsys.readouterr()
        assert said in captured.err and captured.out == ""


def test_a_demonstration_shows_no_advantage_that_nothing_reads() -> None:
    """hpt's demonstration stands alone in its group: centred it would be 0, and -log pi has a weight of 1."""
    failed = [row("pee"), row("po", None, 0.0), row("po", None, 0.0)]
    found = explain(load_method("hpt"), batch_of(failed))
    assert found["groups"][0]["advantage"] == [None, None, None] and weights(found)[0] == [0.0, 0.5, 0.5]
    assert explain(load_method("sft"), batch_of([row("pe")]))["groups"][0]["advantage"] == [1.0]


# ---- what a method needs


SCORED = [n for n in METHODS if load_method(n).plan.asks_for_rewards]


@pytest.mark.parametrize("name", [n for n in SCORED if not (load_method(n).channels or load_method(n).comparisons)])
def test_a_rollout_without_a_reward_is_an_error(name: str) -> None:
    method = load_method(name)
    starts = method.plan.brings("train") and method.plan.start(_example(), method.init())
    stream = next(iter(method.plan.streams(method.init())))
    rows = [row("po", None, 1.0), row("po"), *([row("pe")] if starts else [])]
    rows[1]["greedy"] = name == "remax"
    given = parse(GivenBatch, {"groups": [{"stream": stream, "trajectories": rows}]})
    assert refused(name, given) == f"method {name} needs `reward`, which is absent from groups.0.trajectories.1"


def _example() -> Any:
    from crosstrain.testing import made_up_examples

    return made_up_examples(load_method("sft"))[0]


def test_a_methods_own_reward_stands_in() -> None:
    """SPIN's is 0 for every own answer; SRL's is made from texts, which a batch has not."""
    rows = [row("pe", None, ref_logp=[0, -1]), row("po", None, ref_logp=[0, -1])]
    found = explain(load_method("spin", beta=1.0), batch_of(rows))
    assert weights(found) == [[0.0, 0.5], [0.0, -0.5]]
    said = refused("srl", batch_of([row("peo"), row("peo", None, 1.0)]))
    assert said.startswith("method srl makes rewards from texts") and said.endswith("absent from groups.0.trajectories.0")
    explain(load_method("srl"), batch_of([row("peo", None, 0.5), row("peo", None, 1.0)]))


@pytest.mark.parametrize("greedy", [(False, False), (True, True)])
def test_remax_needs_one_greedy_answer(greedy: tuple[bool, bool]) -> None:
    given = batch_of([row("po", None, 1.0, greedy=g) for g in (*greedy, False)])
    assert "needs exactly 1 trajectory with `greedy: true`" in refused("remax", given)
    assert f"groups.0 has {sum(greedy)}" in refused("remax", given)


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("simpo", [row("pe", None, 1.0)], "groups.0 has 1 trajectories"),
        ("simpo", [row("pe", None, 1.0), row("pe")], "groups.0 has no `reward` at trajectories.1"),
        ("simpo", [row("pe", None, 1.0), row("pe", None, 1.0)], "groups.0 has two of reward 1"),
        ("simpo", [row("pe", None, 1.0), row("pt", None, 0.0)], "groups.0 has a trajectory without `expert` tokens"),
        ("apo_zero_unpaired", [row("pe")], "groups.0.trajectories.0.reward must be 1 (wanted) or 0 (unwanted); got none"),
        ("apo_zero_unpaired", [row("pe", None, 0.5)], "must be 1 (wanted) or 0 (unwanted); got 0.5"),
        ("apo_zero_unpaired", [row("pt", None, 1.0)], "tagged `expert`; groups.0.trajectories.0 has no such token"),
        ("reward_model", [row("pe", None, 0.6), row("pe", None, 0.1)], "the rewards of a pair differ by 0.5"),
        ("hpt", [row("po", None, 0.0)], "method hpt needs a demonstration in groups.0, which has none"),
        ("superrl", [row("po", None, 0.0)], "method superrl needs a demonstration in groups.0, which has none"),
        ("sft", [row("pt")], "method sft needs a demonstration in every group; groups.0 has none"),
        ("bread", [row("peo", None, 0.0), row("peeo", None, 0.0)], "method bread finds nothing in groups.0 to train on"),
        ("sft", [row("p")], "groups.0.trajectories.0.source: nothing comes after the prompt"),
    ],
)
def test_what_a_group_lacks_is_named(name: str, rows: list[Row], said: str) -> None:
    assert said in refused(name, batch_of(rows))


def test_a_margin_is_the_gap_beyond_1() -> None:
    rows = [row("pe", None, 1.25, value=[0, 2.0]), row("pe", None, 0.0, value=[0, 1.0])]
    found = explain(load_method("reward_model"), batch_of(rows))
    s = 1 / (1 + math.exp(1 - 0.25))
    assert found["groups"][0]["trajectories"][0]["value_weights"] == pytest.approx([0.0, s])


@pytest.mark.parametrize("name", ["grpo", "rest_em", "star", "bread", "trapo", "srl", "replay", "on_policy_distillation"])
def test_a_demonstration_that_a_method_never_has_is_an_error(name: str) -> None:
    said = refused(name, batch_of([row("po", None, 1.0), row("pe")]))
    assert said.startswith("groups.0.trajectories.1 is a demonstration") and f"method {name} have rollouts only" in said


def test_demonstrations_that_are_recalled_have_a_group_of_their_own() -> None:
    """ReLIFT's buffered ones; beside rollouts one would move their baseline."""
    rl = [row("po", None, 1.0), row("po", None, 0.0)]
    found = explain(load_method("relift"), batch_of(rl, [row("pe")]))
    assert weights(found)[2] == [0.0, 1.0]
    assert "method relift imitates in groups of their own" in refused("relift", batch_of([*rl, row("pe")]))
    assert "is a demonstration" in refused("rft", batch_of([*rl, row("pe")]), with_demonstration=False)
    explain(load_method("rft"), batch_of([*rl, row("pe")]))


@pytest.mark.parametrize("name", ["sft", "dpo", "apo_zero_unpaired"])
def test_own_tokens_are_an_error_where_nothing_is_sampled(name: str) -> None:
    said = refused(name, batch_of([row("po", None, 1.0), row("po", None, 0.0)]))
    assert said.startswith(f"groups.0.trajectories.0 has tokens of the policy's, and method {name} samples nothing")
    assert said.endswith("tag the tokens of the data's answers `expert`")


# ---- what a file says


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"old_logp": [0, 0.5]}, "groups.0.trajectories.0.old_logp.1: got 0.5; a log-prob is at most 0"),
        ({"ref_logp": [0, 0.5]}, "groups.0.trajectories.0.ref_logp.1: got 0.5; a log-prob is at most 0"),
        ({"behaviour_logp": [0, 0.5]}, "groups.0.trajectories.0.behaviour_logp.1: got 0.5; a log-prob is at most 0"),
        ({"teacher_logp": [0, 0.5]}, "groups.0.trajectories.0.teacher_logp.1: got 0.5; a log-prob is at most 0"),
        ({"entropy": [0, -0.5]}, "groups.0.trajectories.0.entropy.1: got -0.5; an entropy is at least 0"),
        ({"reward": "1.0"}, "groups.0.trajectories.0.reward: must be a valid number, got '1.0' (text)"),
        ({"reward": True}, "groups.0.trajectories.0.reward: must be a valid number, got True (true/false)"),
        ({"logp": ["0", -1]}, "groups.0.trajectories.0.logp.0: must be a valid number, got '0' (text)"),
        ({"logp": [0, False]}, "groups.0.trajectories.0.logp.1: must be a valid number, got False (true/false)"),
        ({"finished": "no"}, "groups.0.trajectories.0.finished: must be a valid boolean, got 'no' (text)"),
        ({"source": []}, "groups.0.trajectories.0.source: got an empty list; give at least one token's author"),
    ],
)
def test_a_value_that_cannot_be_is_an_error(change: Row, said: str) -> None:
    with pytest.raises(UserError) as caught:
        explain(load_method("rloo"), batch_of([row("po", None, 1.0) | change, row("po", None, 0.0)]))
    assert said in str(caught.value) or said.replace("trajectories.0", "trajectories.1") in str(caught.value)


def test_entries_at_prompt_tokens_are_ignored_and_whole_numbers_are_numbers() -> None:
    rows = [{**row("po", [7, -1]), "reward": r, "ref_logp": [3, -1]} for r in (1, 0)]
    assert weights(explain(load_method("rloo"), batch_of(rows))) == [[0.0, 0.5], [0.0, -0.5]]


def test_a_prompt_that_is_imitated_is_the_same_in_both_answers_and_any_other_may_be_shortened() -> None:
    rows = [row("pe", None, 1.0), row("ppe", None, 0.0)]
    assert [sum(w) for w in weights(explain(load_method("simpo"), batch_of(rows)))] != [0, 0]
    said = refused("orpo", batch_of([PAIR[0], row("ppe", None, 0.0)]), prompt_nll=True)
    assert "the prompt has 3 tokens in trajectories.0 and 2 in trajectories.1" in said


def test_imitation_is_of_an_experts_tokens_whoever_else_wrote_in_the_row() -> None:
    assert weights(explain(load_method("sft"), batch_of([row("peote")]))) == [[0.0, 0.5, 0.0, 0.0, 0.5]]


def test_a_users_later_turn_is_of_the_prompt() -> None:
    found = explain(load_method("sft"), batch_of([row("peppe")]))
    assert weights(found) == [[0.0, 0.5, 0.0, 0.0, 0.5]]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"groups": []}, "groups: got an empty list; give at least one group"),
        ({"groups": [{"trajectories": []}]}, "groups.0.trajectories: got an empty list; give at least one trajectory"),
        ({"groups": [{"trajectories": [row("pe")]}], "step": True}, "step: must be a valid integer, got True"),
        ({"groups": [{"trajectories": [row("pe")]}], "step": "3"}, "step: must be a valid integer, got '3'"),
        ({"groups": [{"stream": "demo", "trajectories": [row("pe")]}]}, "draws from rl and demos; did you mean 'demos'?"),
    ],
)
def test_a_batch_that_cannot_be_is_an_error(batch: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        explain(load_method("chord_mu"), parse(GivenBatch, batch))
    assert said in str(caught.value)


def test_one_stream_needs_no_name_and_no_other_is_taken() -> None:
    rows = [row("po", None, 1.0), row("po", None, 0.0), row("pe")]
    one = {"rollouts_from": "x", "demonstrations_from": "x"}
    found = explain(load_method("chord_mu", **one), batch_of(rows))
    named = parse(GivenBatch, {"groups": [{"stream": "x", "trajectories": rows}]})
    assert found == explain(load_method("chord_mu", **one), named)
    assert "groups.0.stream: got 'x'; method sft draws from train; allowed: train" in refused("sft", named)


def test_without_a_stream_a_group_of_two_streams_is_taken_as_it_is() -> None:
    """Rollouts and a demonstration in one group, of which nothing says whose it is: each term finds its own."""
    rows = [row("po", None, 1.0), row("po", None, 0.0), row("pe")]
    found = explain(load_method("chord_mu", mu=0.3, mu_valley=0.3), batch_of(rows))
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert weights(found) == [pytest.approx([0.0, 0.7 * a / 2]), pytest.approx([0.0, -0.7 * a / 2]), pytest.approx([0.0, 0.3])]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"groups": [', ":1:13: not valid JSON: expecting value"),
        ("{'groups': 1}", ":1:2: not valid JSON: expecting property name enclosed in double quotes"),
        ('{"step": 0, "step": 1}', ": not valid JSON: the key 'step' is written twice"),
        ('{\n\t"groups":\t[]\n}', ": groups: got an empty list; give at least one group"),
    ],
)
def test_json_is_called_json(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "batch.json"
    file.write_text(text)
    assert main(["explain", "sft", "--batch", str(file)]) == 2
    assert f"{file}{said}" in capsys.readouterr().err


# ---- the state


MIXED = {
    "groups": [
        {"stream": "demos", "trajectories": [row("pe")]},
        {"stream": "rl", "trajectories": [row("po", None, 1.0), row("po", None, 0.0)]},
    ]
}


def test_a_part_of_a_state_is_completed() -> None:
    """amft's mu is at its setting where it is not given, and its step at 0: imitation alone."""
    for state, share in (({"step": 99}, 0.8), ({"step": 99, "mu": 0.3, "seed": 7}, 0.3), ({"mu": 0.3}, 1.0), ({}, 1.0)):
        found = explain(load_method("amft"), parse(GivenBatch, {**MIXED, "state": state}))
        assert weights(found)[0] == pytest.approx([0.0, share]), state


@pytest.mark.parametrize(
    ("name", "state", "said"),
    [
        ("amft", {"stp": 3}, "state: unknown key 'stp'; did you mean 'step'?"),
        ("amft", {"step": "3"}, "state.step: got '3'; it must be a whole number, as at first (0)"),
        ("amft", {"step": True}, "state.step: got True; it must be a whole number, as at first (0)"),
        ("amft", {"mu": None}, "state.mu: got None; it must be a number, as at first (0.8)"),
        ("amft", {"target": "low"}, "state.target: got 'low'; it must be a number, or null, as at first (None)"),
        ("amft", {"mu": math.nan}, "state.mu: got a number in it that is not finite"),
        ("amft", {"mu": 1.5}, "state.mu: got 1.5; amft keeps it within mu_lowest=0.05 and mu_highest=0.95"),
        ("sasr", {"step": 30, "norm": 1.0}, "state: method sasr cannot use {'step': 30, 'norm': 1.0}"),
    ],
)
def test_a_state_that_cannot_be_is_an_error(name: str, state: Row, said: str) -> None:
    assert said in refused(name, parse(GivenBatch, {**MIXED, "state": state}))


def test_a_method_without_a_state_says_so() -> None:
    said = refused("sft", batch_of([row("pe")], state={"mu": 1.0}))
    assert said == "state: unknown key 'mu' (method sft keeps nothing from step to step); allowed: batch_size, seed"


# ---- what the page promises


PAGE = (Path(__file__).parents[1] / "docs" / "explain.md").read_text(encoding="utf-8")


def _everything(name: str) -> GivenBatch:
    """Whatever a method may need, but for the whole distribution and other sequences."""
    plan = load_method(name).plan
    known = {"ref_logp": [0, -1], "teacher_logp": [0, -1], "behaviour_logp": [0, -1], "entropy": [0, 1], "value": [0, 1]}
    own = [row("po", None, 1.0, **known), row("po", None, 0.0, **known, greedy=name == "remax")]
    own = own[1:] if name == "spin" else own
    streams = list(plan.streams(load_method(name).init()))
    stream = next((s for s in streams if plan.brings(s)), streams[0])
    shown = {"pair": [1.0, 0.0], "label": [1.0], "demonstration": [None]}.get(plan.needs_expert or "", [])
    starts = plan.needs_expert and plan.start(_example(), {**load_method(name).init(), "seed": 0})
    data = [row("pe", None, r, **known) for r in shown] if starts or not plan.samples else []
    rows = data + (own if plan.samples and (not data or plan.expert_streams is None) else [])
    return parse(GivenBatch, {"groups": [{"stream": stream, "trajectories": rows}, {"stream": stream, "trajectories": rows}]})


def test_the_pages_state_is_one() -> None:
    [text] = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    found = explain(load_method("amft"), parse(GivenBatch, json.loads(text)))
    assert weights(found)[0] == pytest.approx([0.0, 0.3])


def test_the_page_lists_the_methods_that_refuse_and_those_with_a_state() -> None:
    refuse = []
    for name in METHODS:
        try:
            explain(load_method(name), _everything(name))
        except UserError as error:
            assert f"`crosstrain explain {name} --model MODEL --data FILE` (or --task NAME)" in str(error), error
            refuse.append(name)
    listed = ", ".join(f"`{name}`" for name in sorted(refuse))
    assert f"refuse: {listed}." in " ".join(PAGE.split()), listed
    states = sorted((name for name in METHODS if load_method(name).init()), key=list(METHODS).index)
    for name in states:
        keys = ", ".join(f"`{key}`" for key in load_method(name).init())
        assert f"| `{name}` | {keys} |" in PAGE, f"| `{name}` | {keys} |"
    assert PAGE.count("| `step`") == sum("step" in load_method(name).init() for name in states) + 1  # and the batch's own


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        (
            "luffy",
            [row("pe")],
            "method luffy needs `reward`, which is absent from groups.0.trajectories.0 (a demonstration counts",
        ),
        ("spin", [row("pe")], "method spin compares two answers of unequal reward in every group; groups.0 comes to "),
        ("spin", [row("pe", None, 1.0), row("po", None, 1.0)], "groups.0 comes to 1, 1 (its own answers have 0)"),
        ("grpo", [row("po", None, 1.0, greedy=True)], "groups.0: `greedy` is true, and method grpo takes no greedy answers"),
        ("rloo", [row("po", None, 1.0, replayed=True)], "groups.0: `replayed` is true, and method rloo remembers no rollouts"),
    ],
)
def test_what_would_act_silently_or_not_at_all_is_refused(name: str, rows: list[Row], said: str) -> None:
    assert said in refused(name, batch_of(rows), **({"beta": 0.0} if name == "grpo" else {}))


def test_equal_rewards_are_equal_in_any_precision() -> None:
    found = explain(load_method("reinforce_rej", average="all"), batch_of([row("po", None, 0.1)] * 3))
    assert weights(found) == [[0.0, 0.0]] * 3


def test_an_entropy_that_rounding_left_below_0_is_taken() -> None:
    rows = [row("po", None, r, entropy=[0, -1e-7]) for r in (1.0, 0.0)]
    assert explain(load_method("entropy_advantage"), batch_of(rows))["groups"][0]["selected"]
