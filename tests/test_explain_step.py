"""`explain --model`: the weights of a real step are those that training applies, and are shown as text that can do no harm."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from crosstrain.assemble import stage_settings
from crosstrain.cli import main
from crosstrain.cli_explain_step import Asked, _recipe, looked_at
from crosstrain.errors import UserError
from crosstrain.explain_page import page
from crosstrain.explain_step import ROW, Seen, explain_step, kind_of, pieces
from crosstrain.explain_text import sentence, show
from crosstrain.methods import METHODS, load_method
from crosstrain.prepare import base_engine, prepare
from crosstrain.testing import (
    REFERENCE,
    TEACHER,
    ScriptedSampler,
    made_up_examples,
    made_up_other,
    made_up_rewards,
    made_up_value_head,
    save_tiny_model,
    tiny_model,
)
from crosstrain.training import loop
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine, Teacher
from crosstrain.training.gradient import accumulate, denominators
from crosstrain.training.loop import Progress, StageSettings, draw, make_batch, train_stage
from crosstrain.training.metrics import Meter
from crosstrain.training.optimizer import Optimizer
from crosstrain.training.score import score
from crosstrain.types import Batch, Example, Group, Method, Source, Trajectory
from tensors import equal


class Listed:
    """A stream that gives its examples in order."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        at = [self.examples[i % len(self.examples)] for i in range(position, position + n)]
        return at, position + n


def engine_of(method: Method, model: Any) -> Engine:
    streams = {name: Listed(made_up_examples(method)) for name in method.plan.streams(method.init())}

    teacher, reference = (made_up_other(model, seed) for seed in (TEACHER, REFERENCE))
    return Engine(
        model=model,
        parameters=1,
        layout="plain",
        device=torch.device("cpu"),
        streams=streams,
        sampler=ScriptedSampler(),
        rewards=made_up_rewards,
        micro_batch_tokens=64,
        reference=lambda: nullcontext(reference),
        average=lambda: nullcontext(model),
        value_head=made_up_value_head(model),
        teacher=Teacher(lambda: nullcontext(teacher), 1, "plain", ScriptedSampler()),
        frozen_embeddings=copy.deepcopy(model.get_input_embeddings()).requires_grad_(False),
        base=lambda: dict(model.named_parameters()),
        decode=decode,
    )


def decode(tokens: Any) -> str:
    return "".join(chr(97 + t % 26) for t in tokens)


def settings_of(name: str) -> dict[str, Any]:
    allowed = METHODS[name].settings
    once = {"num_iterations": 1, "minibatches": 1, "dynamic_sampling": 1, "epochs": 1, "num_ppo_epochs": 1, "think_end": ""}
    return {k: v for k, v in once.items() if k in allowed}


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_those_that_the_loop_applies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training step tells its meter, token by token, found by the text of the row."""
    method = load_method(name, **settings_of(name))
    applied: dict[tuple[str, tuple[int, ...]], list[Tensor]] = {}
    add = Meter.add_weights

    def listen(self: Meter, term: str, weights: Tensor, batch: Batch) -> None:
        for r in range(len(batch)):
            n = int(batch.length[r])
            applied.setdefault((term, tuple(batch.tokens[r, :n].tolist())), []).append(weights[r, :n].clone())
        add(self, term, weights, batch)

    monkeypatch.setattr(Meter, "add_weights", listen)

    def update_alone(*given: Any) -> Meter:
        """What probes measured before it is not applied."""
        applied.clear()
        return accumulate(*given)

    monkeypatch.setattr(loop, "accumulate", update_alone)
    model = tiny_model()
    step = next(
        train_stage(
            engine_of(method, model),
            method,
            StageSettings(batch_size=4, learning_rate=1e-3, max_steps=1),
            Optimizer(model, "fp32"),
            Progress(state=method.init()),
        )
    )
    monkeypatch.setattr(Meter, "add_weights", add)
    model = tiny_model()
    found = explain_step(engine_of(method, model), method, Optimizer(model, "fp32"), decode, 4)
    assert found["loss"] == pytest.approx(step.metrics["loss"], abs=1e-12)
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for (term, tokens), rows in applied.items():
        for row in rows:
            theirs.setdefault(f"{term} {decode(tokens)}", []).append(float(row.abs().sum()))
    names = [t["name"] for t in found["terms"]]
    for group in found["groups"]:
        for t in group["trajectories"]:
            split = t["by_term"] or {names[0]: t["weights"]}
            for term, weights in split.items():
                key = f"{term} {group['prompt']}{''.join(t['tokens'])}"
                if t["selected"] and key in theirs:
                    ours.setdefault(key, []).append(sum(map(abs, weights)))
                else:
                    assert not any(weights)
    assert {k: pytest.approx(sorted(v)) for k, v in theirs.items()} == {k: sorted(v) for k, v in ours.items()}
    shares = {k: v for k, v in step.metrics.items() if k.startswith("weight_share/")}
    by_term: dict[str, float] = {}
    for key, value in shares.items():
        by_term[key.split("/")[1]] = by_term.get(key.split("/")[1], 0.0) + value
    assert {t["name"]: t["share"] for t in found["terms"] if t["share"]} == pytest.approx(by_term)
    whole = bool(method.channels or method.comparisons or "value" in method.needs)
    assert (found["unseen"] is not None) == whole


def test_the_gradient_is_the_weights_on_the_log_probs() -> None:
    """Minus the sum of weight times log-prob, on one line per sequence, has the gradient that the loop left."""
    method = load_method("luffy", **settings_of("luffy"))
    model = tiny_model()
    engine = engine_of(method, model)
    collected = draw(engine, method, 4, Progress(state=method.init()))
    batch, _ = make_batch(engine, method, collected, 0, Cost())
    batch = batch.with_columns(**{ROW: torch.arange(len(batch))})
    zeros = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    seen = Seen({t.name: zeros.clone() for t in method.terms}, zeros.clone(), {t.name: {} for t in method.terms})
    optimizer = Optimizer(model, "fp32")
    accumulate(engine, method, batch, denominators(method, batch, collected), optimizer, seen.note)
    applied = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    weights = torch.stack(list(seen.weights.values())).sum(dim=0)
    assert float(weights.abs().sum()) > 0
    (-(weights * score(model, batch, layout="plain").logp).sum()).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, applied[n], rtol=0, atol=1e-10)


def test_nothing_of_the_model_changes() -> None:
    method, model = load_method("gem"), tiny_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = explain_step(engine_of(method, model), method, Optimizer(model, "fp32"), decode, 2)
    assert equal(dict(model.named_parameters()), before)
    assert all(p.grad is None for p in model.parameters())
    assert found["unseen"] == {"terms": ["demo"], "mixed": [], "share_of_norms": 1.0}
    assert sentence(found).startswith("This step changes the whole next-token distribution at")


def test_what_weights_do_not_show_is_a_share_of_the_gradient() -> None:
    method, model = load_method("sft", label_smoothing=0.25), tiny_model()
    found = explain_step(engine_of(method, model), method, Optimizer(model, "fp32"), decode, 2)
    assert found["unseen"]["terms"] == ["smooth"] and 0 < found["unseen"]["share_of_norms"] < 1
    assert [t["through"] for t in found["terms"]] == [["logp"], ["uniform_nll"]]
    assert found["terms"][0]["share"] == 1.0 and "% of the gradient acts on the whole" in sentence(found)


def test_several_optimizer_steps_are_each_divided_by_their_own_counts() -> None:
    """Three groups in three mini-batches: the weights of a demonstration are 1 over its own tokens."""
    method, model = load_method("psft", minibatches=3), tiny_model()
    found = explain_step(engine_of(method, model), method, Optimizer(model, "fp32"), decode, 3)
    assert found["updates"] == 3
    for group in found["groups"]:
        [t] = group["trajectories"]
        assert sum(t["weights"]) == pytest.approx(1.0)


def test_another_old_policy_gives_ratios_and_clips() -> None:
    method, model, other = load_method("grpo", beta=0.0), tiny_model(), tiny_model(seed=1)
    engine = engine_of(method, model)
    same = explain_step(engine, method, Optimizer(model, "fp32"), decode, 4)
    apart = explain_step(engine, method, Optimizer(model, "fp32"), decode, 4, old=engine_of(method, other))
    sizes = [{round(abs(w), 9) for g in f["groups"] for t in g["trajectories"] for w in t["weights"]} for f in (same, apart)]
    assert len(sizes[1]) > len(sizes[0]), "ratios differ by token"
    assert any(w == 0 for g in apart["groups"] for t in g["trajectories"] if t["advantage"] for w in t["weights"]), "clipped"


# ---- in words


def a_step(*trajectories: dict[str, Any], selected: bool = True, unseen: Any = None) -> dict[str, Any]:
    filled = [{"kind": "completion", "reward": None, "source": ["policy"], "weights": [0.0]} | t for t in trajectories]
    return {"groups": [{"selected": selected, "trajectories": filled}], "terms": [], "unseen": unseen}


def own(reward: float, weight: float) -> dict[str, Any]:
    return {"reward": reward, "weights": [weight]}


DEMONSTRATION = {"kind": "demonstration", "source": ["expert"], "weights": [0.8]}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            a_step(own(1.0, 0.1), own(0.0, -0.05), own(0.0, -0.05), DEMONSTRATION),
            "This step raises 1 right completion and 1 demonstration and lowers 2 wrong completions; 80% of the weight is on the "
            "demonstration.",
        ),
        (a_step(own(1.0, 0.0), own(1.0, 0.0)), "This step teaches nothing: the rewards are equal within every group."),
        (a_step(own(1.0, 0.0), own(0.0, 0.0)), "This step teaches nothing: no token has a weight."),
        (a_step(own(1.0, 0.0), selected=False), "This step teaches nothing: the method leaves out every group."),
        (
            a_step(own(0.1, -0.4), own(0.3, 0.3), own(0.4, 0.3)),
            "This step raises 2 better completions and lowers 1 worse completion; 60% of the weight is on the better completions.",
        ),
        (
            a_step(
                {"kind": "chosen", "reward": 1.0, "source": ["expert"], "weights": [0.5]},
                {"kind": "rejected", "reward": 0.0, "source": ["expert"], "weights": [-0.5]},
            ),
            "This step raises 1 chosen answer and lowers 1 rejected answer.",
        ),
        (
            a_step(
                {"kind": "completion after a hint", "reward": 1.0, "source": ["expert", "policy"], "weights": [0.75, -0.25]}
            ),
            "This step raises 1 hint and lowers 1 right completion; 75% of the weight is on the hint.",
        ),
    ],
)
def test_a_step_in_one_sentence(found: Mapping[str, Any], said: str) -> None:
    assert sentence(found) == said


def test_pieces_of_text_wait_for_whole_characters() -> None:
    """The euro sign's three bytes are three tokens of this tokenizer: its text stands at the last."""
    data = "a€b".encode()
    assert pieces(range(5), lambda tokens: data[: len(tokens)].decode(errors="replace")) == ["a", "", "", "€", "b"]
    assert pieces(range(2), lambda tokens: data[: len(tokens)].decode(errors="replace")) == ["a", "\ufffd"]


def test_what_a_trajectory_is_called() -> None:
    def text(source: Source, reward: float | None, **more: Any) -> Trajectory:
        return Trajectory((1, 2), (Source.PROMPT, source), reward, **more)

    pair = Group(Example("a", "", (1,)), (text(Source.EXPERT, 1.0), text(Source.EXPERT, 0.0)))
    assert [kind_of(pair, t) for t in pair.trajectories] == ["chosen", "rejected"]
    mixed = Group(Example("a", "", (1,)), (text(Source.EXPERT, 1.0), text(Source.POLICY, 0.0, greedy=True)))
    assert [kind_of(mixed, t) for t in mixed.trajectories] == ["demonstration", "greedy completion"]
    hint = Trajectory((1, 2, 3), (Source.PROMPT, Source.EXPERT, Source.POLICY), 1.0)
    assert kind_of(mixed, hint) == "completion after a hint"


# ---- on the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = ["one", "<script>window.hacked = 1</script>\x1b[31m", "three"]
    lines = [{"prompt": f"Say {t}", "completion": t, "answer": t, "id": f"row-{t[:3]}"} for t in texts]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_the_command_line_goes_through_the_whole_step(
    model: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page" / "explain.html"
    assert main(["explain", "sft", "--model", model, "--data", str(rows), "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["summary"] == "This step raises 4 demonstrations." and found["sources"] == {"expert": 1.0}
    assert found["terms"][0]["denominator"] == found["terms"][0]["tokens"]
    [t] = found["groups"][0]["trajectories"]
    assert len(t["tokens"]) == len(t["weights"]) == len(t["logp"]) == len(t["source"]) and t["weights"][0] > 0
    assert "window.hacked" in out.read_text() and "<script>window.hacked" not in out.read_text()


def test_what_training_would_do_is_what_is_shown(model: str, rows: Path) -> None:
    """The loss and gradient norm's terms of the recipe's own first step, by the loop, in the precision that it would have."""
    asked = Asked("luffy", model, tasks=("sums",), settings=("num_generations=3",), batch_size=2, max_completion_length=4)
    found = looked_at(asked)
    recipe = _recipe(asked, load_method("luffy"))
    ready = prepare(recipe)
    from crosstrain import assemble

    with assemble.reward_scorer(recipe, ready.tokenizer) as rewards:
        engine = base_engine(recipe, ready, rewards)
        progress = Progress(state=ready.methods[0].init())
        step = next(train_stage(engine, ready.methods[0], stage_settings(recipe, recipe.stages[0]), ready.optimizer, progress))
    assert found["loss"] == step.metrics["loss"]
    trained = [[decode_of(ready.tokenizer, t) for t in g.trajectories] for g in step.groups]
    assert [["".join(t["tokens"]) for t in g["trajectories"]] for g in found["groups"]] == trained
    expert = sum(v for k, v in step.metrics.items() if k.startswith("weight_share/") and k.endswith("/expert"))
    assert found["sources"].get("expert", 0.0) == pytest.approx(expert)


def decode_of(tokenizer: Any, t: Trajectory) -> str:
    return str(tokenizer.decode(t.response, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def test_other_models_stand_in_for_the_reference_and_the_old_policy(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pair's margin is 0 against the model itself, so that beta / 2 is on every token of both answers; not against another."""
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(PAIRS)
    other = str(save_tiny_model(tmp_path / "other", seed=1))

    def sizes(**more: Any) -> set[float]:
        found = looked_at(Asked("dpo", model, data=(str(rows),), settings=("beta=0.5",), batch_size=1, **more))
        return {round(abs(w), 6) for t in found["groups"][0]["trajectories"] for w in t["weights"]}

    assert sizes() == {0.25}
    assert len(sizes(reference=other)) == 1 and sizes(reference=other) != {0.25}
    own = looked_at(_sft(model, tmp_path))
    apart = looked_at(_sft(model, tmp_path, old=other))
    assert {round(w, 6) for w in own["groups"][0]["trajectories"][0]["weights"]} != {
        round(w, 6) for w in apart["groups"][0]["trajectories"][0]["weights"]
    }
    from transformers import AutoModelForCausalLM

    wider = AutoModelForCausalLM.from_pretrained(model)
    wider.resize_token_embeddings(300)
    wider.save_pretrained(tmp_path / "wider")
    more = ["--reference", str(tmp_path / "wider")]
    assert main(["explain", "dpo", "--model", model, "--data", str(rows), *more]) == 2
    assert "its vocabulary has 300 tokens" in capsys.readouterr().err


def test_a_reference_stays_the_one_that_is_named_beside_an_old_policy(model: str, rows: Path, tmp_path: Path) -> None:
    """What sampled is one thing and what is compared with another; a method whose reference is itself a step ago takes none."""
    old, reference = (str(save_tiny_model(tmp_path / name, seed)) for name, seed in (("old", 1), ("reference", 2)))
    (tmp_path / "reward.py").write_text(
        "def letters(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
    )

    def loss(**more: str) -> float:
        asked = {
            "data": (str(rows),),
            "settings": ("beta=0.5", "num_generations=3"),
            "max_completion_length": 4,
            "batch_size": 2,
        }
        return float(looked_at(Asked("grpo", model, **asked, rewards=(f"{tmp_path}/reward.py:letters",), **more))["loss"])

    assert loss(old=old) != loss(old=old, reference=reference)
    assert loss(old=old) == pytest.approx(loss(old=old, reference=model))
    with pytest.raises(UserError, match="--reference has no effect: spin compares with no reference"):
        looked_at(Asked("spin", model, data=(str(rows),), reference=reference))


def _sft(model: str, folder: Path, **more: Any) -> Asked:
    file = folder / "demos.jsonl"
    file.write_text('{"prompt": "a", "completion": "bcdefg"}\n')
    return Asked("psft", model, data=(str(file),), settings=("minibatches=1",), batch_size=1, **more)


def test_one_example_by_id_by_its_own_id_or_by_number(model: str, rows: Path) -> None:
    for example in ("train:2", "row-thr", "2"):
        found = looked_at(Asked("sft", model, data=(str(rows),), example=example))
        assert [g["id"] for g in found["groups"]] == ["train:2"]
        assert "".join(found["groups"][0]["trajectories"][0]["tokens"]).startswith("three")


PAIRS = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sft", "--data", "ROWS", "--example", "train:22"],
            "--example train:22: there is no such row; did you mean 'train:2'?",
        ),
        (["sft", "--data", "ROWS", "--example", "zzz"], "there is no such row; Rows are train:0 to train:2"),
        (["dpo", "--data", "ROWS"], "method dpo needs `chosen` and `rejected`, which 3 of 3 rows of 'train' lack: "),
        (["grpo", "--data", "ROWS"], "method grpo samples completions, and nothing scores them; add --reward NAME"),
        (["sft", "--data", "ROWS", "--model", "no-such-model"], "model 'no-such-model': no such folder"),
        (["sft", "--data", "no.jsonl"], "no.jsonl"),
        (["sft", "--task", "smus"], "unknown task 'smus'; did you mean 'sums'?"),
        (["grpo", "--data", "ROWS", "--reward", "exact"], "unknown reward 'exact'"),
        (
            ["chord_mu", "--data", "ROWS"],
            "the data streams rl and demos, and rl is not given; name each, as --data rl=FILE",
        ),
        (["sft", "--data", "demos=ROWS"], "draws from the data stream train, and train is not given"),
        (["sft", "--data", "ROWS", "--task", "sums"], "the data stream 'train' is given twice"),
        (["sft", "--data", "ROWS", "--data", "x=ROWS"], "method sft draws nothing from x; its data streams are train"),
        (["sft", "--data", "ROWS", "--reward", "exact_match"], "--reward has no effect: sft samples nothing"),
        (["sft", "--data", "ROWS", "--reference", "m"], "--reference has no effect: sft compares with no reference"),
        (["sft", "--data", "ROWS", "--old", "m"], "--old has no effect: sft samples nothing"),
        (["sft", "--data", "ROWS", "--task-config", "a=1"], "--task-config has no effect without --task"),
        (["sft"], "explain needs something to look at: --data FILE or --task NAME"),
        (["sft", "--batch", "b.json", "--model", "m"], "--model has no effect beside --batch"),
        (["stf", "--data", "ROWS"], "unknown method 'stf'; did you mean 'sft'?"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], message: str, model: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [a.replace("ROWS", str(rows)) for a in arguments]
    if "--batch" not in words and "--model" not in words and len(words) > 1:
        words += ["--model", model]
    assert main(["explain", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err, captured.err


def test_a_terminal_gets_signs_and_no_control_characters(model: str, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = looked_at(Asked("sft", model, data=(str(rows),), example="train:1"))

    def shown() -> str:
        file = io.StringIO()
        show(found, Console(width=100, file=file, force_terminal=True, color_system="standard"))
        return file.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = shown()
    assert "\x1b[36m" in coloured or "\x1b[1;36m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown()
    assert "\x1b[3" not in plain and "\x1b[1;3" not in plain, "neither ours nor a row's: NO_COLOR means no colour"
    weights = [w for w in found["groups"][0]["trajectories"][0]["weights"] if w]
    assert all(f"{w:+.2g}" in plain for w in weights), "the sign stands beside the number"


class Spans(HTMLParser):
    """The text and classes of a page's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str]] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "span" and "title" in given:
            self.tokens.append((str(given["class"]), str(given["title"])))
        self.loads += [str(value) for key, value in attrs if key in ("src", "href")]


def test_the_page_has_every_token_with_its_numbers_and_loads_nothing(model: str, rows: Path) -> None:
    found = looked_at(Asked("sft", model, data=(str(rows),), example="train:1"))
    spans = Spans()
    html = page(found)
    spans.feed(html)
    [t] = found["groups"][0]["trajectories"]
    assert len(spans.tokens) == len(t["tokens"]) and spans.loads == []
    for (classes, title), weight in zip(spans.tokens, t["weights"], strict=True):
        assert ("up" in classes.split()) == (weight > 0)
        assert f"weight {weight:+.4g}" in title and "expert tokens" in title
    assert found["summary"] in html and "<script>window.hacked" not in html
