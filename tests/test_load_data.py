"""From a recipe's data to streams, and whole runs on a tiny model: filters, selection, curricula, mixtures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import crosstrain
from crosstrain import base_view
from crosstrain.assemble import load_streams
from crosstrain.config import DataSpec, Recipe, parse
from crosstrain.data.curricula import Curriculum
from crosstrain.data.mixtures import Mixture
from crosstrain.errors import UserError
from crosstrain.load_data import LoadedStream, load_stream, needs_model
from crosstrain.models import load_model
from crosstrain.testing import save_tiny_model
from crosstrain.training.batching import to_batch
from crosstrain.training.record import read_lines
from crosstrain.training.score import predicting_states, score
from crosstrain.types import Example, Group, Source
from jsonl import write

pytestmark = pytest.mark.usefixtures("cache")

ANSWERS = ["one", "two 2", "three is more", "four", "FOUR ", "it is five and long", "six", "seven or so"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    prompts = ["p1", "p2", "p3", "p4", "p4", "p6", "p7", "p8"]
    rows = [
        {"prompt": p, "completion": a, "grade": i, "answer": a} for i, (p, a) in enumerate(zip(prompts, ANSWERS, strict=True))
    ]
    write(folder / "rows.jsonl", rows)
    write(folder / "other.jsonl", [{"prompt": f"o{i}", "completion": f"other {i}"} for i in range(3)])
    write(folder / "prompts.jsonl", [{"prompt": f"p{i}"} for i in range(4)])
    return folder


def recipe(world: Path, data: Any, **more: Any) -> Recipe:
    content = {
        "model": str(world / "model"),
        "data": data,
        "method": "sft",
        "max_steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "evaluation": {"forgetting": False, "divergence": False},
        "precision": "fp32",
        "device": "cpu",
        **more,
    }
    return parse(Recipe, content)


def loaded(world: Path, data: Any, **more: Any) -> LoadedStream:
    made = recipe(world, data, **more)
    model, tokenizer = load_model(str(world / "model"))
    return load_stream("train", made.data["train"], made, tokenizer, model)


def rows_of(one: LoadedStream) -> list[str]:
    """The rows that are drawn from, by line."""
    return [e.where.rpartition(":")[2] for e in one.stream.examples]


def test_a_plain_stream_is_what_it_was(world: Path) -> None:
    one = loaded(world, str(world / "rows.jsonl"))
    assert [e.id for e in one.stream.examples] == [f"train:{i}" for i in range(8)]
    assert (one.rows, one.warnings, one.report) == (8, (), [])


def test_filters_warn_with_the_rows_and_leave_the_others_their_names(world: Path) -> None:
    spec = {"path": str(world / "rows.jsonl"), "filter": {"min_length": 5, "max_length": 18, "deduplicate": "exact"}}
    one = loaded(world, spec)  # one token per character, and the end token
    assert [e.id for e in one.stream.examples] == ["train:1", "train:2", "train:3", "train:7"]
    file = world / "rows.jsonl"
    assert one.warnings == (
        f"train: filter keeps 4 of 8 rows; min_length took 2, first {file}:1, {file}:7; max_length took 1, first {file}:6; "
        f"deduplicate took 1, first {file}:5",
    )
    assert one.report == [
        {
            "source": "rows.jsonl",
            "rows": 4,
            "share": 1.0,
            "filter": {
                "kept": 4,
                "dropped": {
                    "min_length": {"rows": 2, "first": [f"{file}:1", f"{file}:7"]},
                    "max_length": {"rows": 1, "first": [f"{file}:6"]},
                    "deduplicate": {"rows": 1, "first": [f"{file}:5"]},
                },
            },
        }
    ]


def test_answers_are_measured_before_they_are_cut(world: Path) -> None:
    spec = {"path": str(world / "rows.jsonl"), "filter": {"max_length": 15}}
    assert rows_of(loaded(world, spec, max_prompt_length=4, max_length=10)) == ["1", "2", "3", "4", "5", "7", "8"]


def test_a_row_that_is_left_out_need_not_be_usable(world: Path, tmp_path: Path) -> None:
    write(
        tmp_path / "rows.jsonl",
        [{"prompt": "p" * 50, "completion": "a", "grade": 0}, {"prompt": "p", "completion": "a", "grade": 1}],
    )
    with pytest.raises(UserError, match=r"rows.jsonl:1: the prompt has 50 tokens"):
        loaded(world, str(tmp_path / "rows.jsonl"), max_prompt_length=10)
    spec = {"path": str(tmp_path / "rows.jsonl"), "filter": {"min_quality": 1, "quality_column": "grade"}}
    assert rows_of(loaded(world, spec, max_prompt_length=10)) == ["2"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"path": "rows.jsonl", "filter": {"min_quality": 9, "quality_column": "grade"}},
            r"data.train.filter leaves no row: it keeps 0 of 8 rows; min_quality took 8, first .*rows.jsonl:1, ",
        ),
        (
            {"path": "other.jsonl", "filter": {"max_quality": 9, "quality_column": "grade"}},
            r"other.jsonl:1: column 'grade' is miss",
        ),
        ({"path": "prompts.jsonl", "filter": {"max_length": 9}}, r"prompts.jsonl:1: the row brings no answer"),
        ({"path": "prompts.jsonl", "order": "length"}, r"data.train.order: 4 of 4 rows bring no answer to look at, first .*:1"),
        ({"path": "prompts.jsonl", "select": {"rule": "loss", "size": 2}}, r"data.train.select: 4 of 4 rows bring no answer"),
        ({"path": "other.jsonl", "order": {"by": "column", "column": "grade"}}, r"other.jsonl:1: column 'grade' is missing"),
        (
            {"path": "other.jsonl", "select": {"rule": "random", "size": 3}},
            r"data.train.select.size: got 3 of 3 rows.*take fewer",
        ),
        (
            {"mixture": [{"path": "other.jsonl"}, {"path": "other.jsonl", "select": {"rule": "fisher", "size": 4}}]},
            r"data.train.mixture.1.select.size: got 4 of 3 rows",
        ),
    ],
)
def test_what_cannot_be_done_is_told_before_step_1(world: Path, source: dict[str, Any], message: str) -> None:
    def there(spec: dict[str, Any]) -> dict[str, Any]:
        return {**spec, "path": str(world / spec["path"])}

    spec = {"mixture": [there(s) for s in source["mixture"]]} if "mixture" in source else there(source)
    with pytest.raises(UserError, match=message):
        loaded(world, spec)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "a", "filter": {}}, "data.filter: has no effect: give it min_length"),
        ({"path": "a", "filter": {"min_lenght": 1}}, "unknown key 'data.filter.min_lenght'; did you mean 'min_length'"),
        ({"path": "a", "filter": {"min_length": 3, "max_length": 2}}, r"'min_length' \(3\) is more than 'max_length' \(2\)"),
        ({"path": "a", "filter": {"min_quality": 1}}, "'quality_column' goes with 'min_quality' or 'max_quality'"),
        ({"path": "a", "filter": {"quality_column": "g", "min_length": 1}}, "'quality_column' goes with"),
        ({"path": "a", "filter": {"deduplicate": "exact", "near_threshold": 0.5}}, "'near_threshold' has no effect with"),
        ({"path": "a", "filter": {"deduplicate": "some"}}, "must be 'exact' or 'near', got 'some'"),
        ({"path": "a", "select": {"rule": "fisher"}}, "missing key 'data.select.size'"),
        ({"path": "a", "select": {"rule": "random", "size": 1, "ridge": 2.0}}, "'ridge' has no effect with rule='random'"),
        ({"path": "a", "select": {"rule": "fisher", "size": 1, "direction": "lowest"}}, "'direction' has no effect with"),
        ({"path": "a", "order": {"by": "column"}}, "'by: column' and a 'column' go together"),
        ({"path": "a", "order": {"by": "loss", "column": "g"}}, "'by: column' and a 'column' go together"),
        (
            {"path": "a", "order": {"by": "loss", "pacing": "sorted", "until": 2.0}},
            "'until' has no effect with pacing='sorted'",
        ),
        ({"path": "a", "order": {"by": "loss", "start": 1.0}}, "'start' is 1, so every row is in the pool"),
        ({"path": "a", "order": {"by": "loss", "start": 0.0}}, "data.order.start: must be greater than 0"),
        ({"path": "a", "weight": 2.0}, "data.train: 'weight' has no effect outside a mixture"),
        ({"mixture": ["a", "b"], "order": "length"}, "'order' stands beside 'mixture'; write it inside the source it is for"),
        ({"mixture": ["a", {"mixture": ["b", "c"]}]}, "a source of a mixture is a file or a task, not another mixture"),
        ({"mixture": ["a", {"path": "b", "weight": 0}]}, "data.mixture.1.weight: must be greater than 0"),
        ({"mixture": ["a"]}, "data.mixture: List should have at least 2 items"),
        ({"mixture": ["a", "b"], "path": "c"}, "needs exactly one of 'path', 'task' and 'mixture', got path='c' and mixture="),
    ],
)
def test_settings_without_sense_are_refused(world: Path, data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(world, data)


def test_a_recipe_with_all_of_it_survives_being_written(world: Path) -> None:
    data = {
        "mixture": [
            {"path": "a.jsonl", "weight": 3, "filter": {"deduplicate": "near", "near_threshold": 0.7}},
            {
                "task": "sums",
                "select": {"rule": "loss", "size": 5, "direction": "lowest"},
                "order": {"by": "column", "column": "x"},
            },
        ]
    }
    made = recipe(world, data)
    assert parse(Recipe, json.loads(json.dumps(made.model_dump(mode="json")))) == made


# --- the untrained model's view -----------------------------------------------------------------------------------------


def test_losses_are_the_means_over_an_answers_tokens(world: Path) -> None:
    one = loaded(world, str(world / "rows.jsonl"))
    model, _ = load_model(str(world / "model"))
    found = base_view.mean_losses(model, one.stream.examples, tokens_per_micro_batch=64)
    for loss, example in zip(found, one.stream.examples, strict=True):
        (t,) = example.expert
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([t.tokens])).logits[0].float(), dim=1)
        wanted = [float(logp[i - 1, token]) for i, token in enumerate(t.tokens) if t.source[i] == Source.EXPERT]
        assert loss == pytest.approx(-sum(wanted) / len(wanted), abs=1e-5)


def test_states_are_what_the_head_predicts_the_trained_tokens_from(world: Path) -> None:
    one = loaded(world, str(world / "rows.jsonl"))
    model, _ = load_model(str(world / "model"))
    trajectories = [t for e in one.stream.examples for t in e.expert]
    found = predicting_states(model, trajectories, tokens_per_micro_batch=40)
    for states, t in zip(found, trajectories, strict=True):
        with torch.no_grad():
            hidden = model.model(torch.tensor([t.tokens])).last_hidden_state[0]
        at = [i - 1 for i, s in enumerate(t.source) if s == Source.EXPERT]
        torch.testing.assert_close(states, hidden[at], rtol=0, atol=1e-5)
        batch = to_batch([Group(Example("", "", ()), (t,))])
        logp = torch.log_softmax(model.lm_head(states), dim=1)[range(len(at)), [t.tokens[i + 1] for i in at]]
        torch.testing.assert_close(logp.detach(), score(model, batch).logp[batch.trained].detach(), rtol=0, atol=1e-5)


def by_determinants(model: Any, examples: Sequence[Example], size: int, ridge: float) -> list[int]:
    """FisherSFT with transformers' own forward pass and every determinant worked out."""
    outer = []
    for e in examples:
        (t,) = e.expert
        with torch.no_grad():
            hidden = model.model(torch.tensor([t.tokens])).last_hidden_state[0].double()
        outer.append(sum(torch.outer(hidden[i - 1], hidden[i - 1]) for i, s in enumerate(t.source) if s == Source.EXPERT))
    design, chosen = ridge * torch.eye(len(outer[0]), dtype=torch.float64), []  # type: ignore[arg-type]
    for _ in range(size):
        values = {i: float(torch.logdet(design + m)) for i, m in enumerate(outer) if i not in chosen}
        chosen.append(max(values, key=lambda i: values[i]))
        design = design + outer[chosen[-1]]
    return chosen


@pytest.mark.parametrize("ridge", [0.1, 1.0])
def test_fisher_chooses_the_rows_of_the_largest_determinant(world: Path, ridge: float, cache: Path) -> None:
    spec = {"path": str(world / "rows.jsonl"), "select": {"rule": "fisher", "size": 4, "ridge": ridge}}
    one = loaded(world, spec)
    model, _ = load_model(str(world / "model"))
    every = loaded(world, str(world / "rows.jsonl")).stream.examples
    wanted = by_determinants(model, every, 4, ridge)
    assert rows_of(one) == [str(i + 1) for i in sorted(wanted)]
    select = one.report[0]["select"]
    assert (select["rule"], select["of"]) == ("fisher", 8)
    assert select["rows"] == [f"{world / 'rows.jsonl'}:{i + 1}" for i in wanted]
    assert select["gains"] == sorted(select["gains"], reverse=True) and len(select["gains"]) == 4
    assert len(list((cache / "selection").iterdir())) == 1


def test_a_second_run_reads_what_the_first_chose(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"path": str(world / "rows.jsonl"), "select": {"rule": "fisher", "size": 4}}
    first = loaded(world, spec)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(base_view, "predicting_states", refuse)
    assert loaded(world, spec).report == first.report
    for other in ({"size": 3}, {"ridge": 2.0}):
        with pytest.raises(AssertionError, match="computed again"):
            loaded(world, {**spec, "select": {**spec["select"], **other}})  # type: ignore[dict-item]
    with pytest.raises(AssertionError, match="computed again"):
        loaded(world, {**spec, "size": 7})


def test_selection_by_loss_and_at_random(world: Path) -> None:
    path = str(world / "rows.jsonl")
    model, _ = load_model(str(world / "model"))
    losses = base_view.mean_losses(model, loaded(world, path).stream.examples, tokens_per_micro_batch=4096)
    by_loss = sorted(range(8), key=lambda i: losses[i])
    lowest = loaded(world, {"path": path, "select": {"rule": "loss", "size": 3, "direction": "lowest"}})
    highest = loaded(world, {"path": path, "select": {"rule": "loss", "size": 5}})
    assert rows_of(lowest) == [str(i + 1) for i in sorted(by_loss[:3])]
    assert rows_of(highest) == [str(i + 1) for i in sorted(by_loss[3:])]
    assert [w.rpartition(":")[2] for w in lowest.report[0]["select"]["rows"]] == [str(i + 1) for i in by_loss[:3]]
    drawn = [rows_of(loaded(world, {"path": path, "select": {"rule": "random", "size": 4}}, seed=s)) for s in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len({tuple(d) for d in drawn}) > 1


def test_rows_are_chosen_of_those_that_the_filter_leaves(world: Path) -> None:
    spec = {
        "path": str(world / "rows.jsonl"),
        "filter": {"deduplicate": "exact", "min_quality": 1, "quality_column": "grade"},
        "select": {"rule": "random", "size": 5},
        "order": {"by": "column", "column": "grade", "direction": "hard_first", "pacing": "sorted"},
    }
    one = loaded(world, spec)
    assert one.report[0]["select"]["of"] == 6 and one.rows == 5
    drawn = [int(e.where.rpartition(":")[2]) for e in one.stream.draw(0, 5)[0]]
    assert drawn == sorted(map(int, rows_of(one)), reverse=True) and not {1, 5} & set(drawn)


@pytest.mark.parametrize("by", ["length", "loss", "column"])
def test_orders(world: Path, by: str) -> None:
    order = {"by": by, "pacing": "sorted", **({"column": "grade"} if by == "column" else {})}
    one = loaded(world, {"path": str(world / "rows.jsonl"), "order": order})
    assert isinstance(one.stream, Curriculum)
    model, _ = load_model(str(world / "model"))
    difficulty = {
        "length": [len(a) for a in ANSWERS],
        "loss": base_view.mean_losses(model, one.stream.examples, tokens_per_micro_batch=4096),
        "column": list(range(8)),
    }[by]
    drawn = [int(e.where.rpartition(":")[2]) - 1 for e in one.stream.draw(0, 8)[0]]
    assert drawn == sorted(range(8), key=lambda i: difficulty[i])


def test_the_hash_covers_what_is_drawn(world: Path) -> None:
    path, other = str(world / "rows.jsonl"), str(world / "other.jsonl")

    def mixed(a: float, b: float) -> dict[str, Any]:
        return {"mixture": [{"path": path, "weight": a}, {"path": other, "weight": b}]}

    specs: list[Any] = [
        path,
        {"path": path, "filter": {"deduplicate": "exact"}},
        {"path": path, "order": "length"},
        {"path": path, "order": {"by": "length", "direction": "hard_first"}},
        {"path": path, "select": {"rule": "random", "size": 4}},
        mixed(1, 1),
        mixed(1, 2),
        {"mixture": [path, other]},
    ]
    hashes = [loaded(world, spec).hash for spec in specs]
    assert hashes[-1] == hashes[-3]
    assert len(set(hashes)) == len(specs) - 1


def test_only_what_looks_at_the_model_needs_it() -> None:
    def needs(**more: Any) -> bool:
        return needs_model(DataSpec(path="a", **more))

    assert not needs() and not needs(select={"rule": "random", "size": 1}, order="length", filter={"min_length": 1})
    assert needs(select={"rule": "fisher", "size": 1}) and needs(select={"rule": "loss", "size": 1}) and needs(order="loss")
    assert needs_model(DataSpec(mixture=["a", {"path": "b", "order": "loss"}]))  # type: ignore[list-item]


# --- mixtures and runs --------------------------------------------------------------------------------------------------


def test_a_mixture_of_a_file_and_a_task(world: Path) -> None:
    spec = {"mixture": [{"path": str(world / "other.jsonl"), "weight": 3}, {"task": "sums", "size": 5}]}
    one = loaded(world, spec)
    assert isinstance(one.stream, Mixture) and one.stream.labels == ("other.jsonl", "sums")
    assert [e.id for e in one.stream.examples][:4] == ["train.0:0", "train.0:1", "train.0:2", "train.1:0"]
    assert one.stream.counts(0, 8) == {"other.jsonl": 6, "sums": 2}
    assert [(p["source"], p["rows"], p["share"]) for p in one.report] == [("other.jsonl", 3, 0.75), ("sums", 5, 0.25)]


def test_one_file_twice_comes_in_two_orders_under_two_names(world: Path) -> None:
    path = str(world / "rows.jsonl")
    one = loaded(world, {"mixture": [path, path]})
    assert isinstance(one.stream, Mixture) and one.stream.labels == ("rows.jsonl#1", "rows.jsonl#2")
    drawn = [e.where for e in one.stream.draw(0, 16)[0]]
    assert drawn[::2] != drawn[1::2] and sorted(drawn[::2]) == sorted(drawn[1::2])


def test_rewards_of_a_task_in_a_mixture_are_found(world: Path) -> None:
    data = {"mixture": [{"task": "sums", "size": 5}, {"task": "sums", "size": 5, "seed": 1}]}
    made = recipe(world, data, method={"grpo": {"num_generations": 2}}, max_steps=1, sampling={"max_completion_length": 3})
    assert "reward" in crosstrain.train(made, world / "sums").metrics


def test_all_streams_of_a_recipe(world: Path) -> None:
    made = recipe(world, {"train": str(world / "rows.jsonl"), "rl": {"path": str(world / "prompts.jsonl"), "size": 2}})
    model, tokenizer = load_model(str(world / "model"))
    found = load_streams(made, tokenizer, model)
    assert (dict(found.rows), dict(found.reports)) == ({"train": 8, "rl": 2}, {})


def test_a_run_with_all_of_it_records_what_was_done(world: Path, tmp_path: Path) -> None:
    data = {
        "mixture": [
            {
                "path": str(world / "rows.jsonl"),
                "weight": 3,
                "filter": {"deduplicate": "near"},
                "select": {"rule": "fisher", "size": 5},
                "order": {"by": "loss", "start": 0.4},
            },
            {"path": str(world / "other.jsonl"), "weight": 1},
        ]
    }
    made = recipe(world, data)
    folder = crosstrain.train(made, tmp_path / "run").folder
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["epoch/train/rows.jsonl"] for line in lines] == pytest.approx([3 / 5, 6 / 5, 9 / 5, 12 / 5])
    assert [line["epoch/train/other.jsonl"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3])
    record = json.loads((folder / "record.json").read_text())
    (first, second) = record["data_report"]["train"]
    assert (first["rows"], first["share"], second["rows"], second["share"]) == (5, 0.75, 3, 0.25)
    assert first["filter"]["dropped"] == {"deduplicate": {"rows": 1, "first": [f"{world / 'rows.jsonl'}:5"]}}
    assert len(first["select"]["rows"]) == 5 and all(math.isfinite(g) for g in first["select"]["gains"])
    assert first["order"]["difficulty"][0] < first["order"]["difficulty"][1] and len(first["order"]["first"]) == 3
    assert any("filter keeps 7 of 8 rows" in w for w in record["warnings"])
    assert record["data"]["train"]["rows"] == 8
    again = crosstrain.train(made, tmp_path / "again").folder
    assert [line["loss"] for line in read_lines(again / "metrics.jsonl")] == [line["loss"] for line in lines]
    plain = crosstrain.train(
        recipe(world, {"mixture": [str(world / "rows.jsonl"), str(world / "other.jsonl")]}), tmp_path / "p"
    )
    assert "data_report" in json.loads((plain.folder / "record.json").read_text())


def test_what_choosing_costs_is_charged_to_the_first_stage(world: Path, tmp_path: Path) -> None:
    path = str(world / "rows.jsonl")
    spec = {"path": path, "select": {"rule": "fisher", "size": 4}, "order": "loss"}
    plain, chosen = loaded(world, path), loaded(world, spec)
    every, left = ([len(t.tokens) for e in one.stream.examples for t in e.expert] for one in (plain, chosen))
    assert (plain.looked_at, chosen.looked_at) == (0, sum(every) + sum(left))
    assert loaded(world, {"path": path, "select": {"rule": "random", "size": 4}, "order": "length"}).looked_at == 0
    budget = {"unit": "processed_tokens", "amount": chosen.looked_at + 1}
    made = recipe(world, spec, max_steps=None, budget=budget)
    folder = crosstrain.train(made, tmp_path / "run").folder
    (line,) = read_lines(folder / "metrics.jsonl")  # one step is over the budget
    trained = [len(t.tokens) for e in chosen.stream.draw(0, 4)[0] for t in e.expert]
    assert line["cost/processed_tokens"] == chosen.looked_at + sum(trained)
    parameters = json.loads((folder / "record.json").read_text())["parameters"]
    assert line["cost/flops"] == pytest.approx(2 * parameters * chosen.looked_at + 6 * parameters * sum(trained))
    with pytest.raises(
        UserError, match=r"budget: choosing and ordering rows .* takes \d+ processed_tokens of the first stage's"
    ):
        crosstrain.train(recipe(world, spec, max_steps=None, budget={**budget, "amount": chosen.looked_at}), tmp_path / "less")


def test_fisher_covers_what_a_crowd_of_copies_hides(world: Path, tmp_path: Path) -> None:
    """30 copies of one row among one each of 6 others: of 7 rows, fisher takes each kind once, and chance mostly copies."""
    rows = [{"prompt": "p", "completion": "a" * 8}] * 30
    rows[5:5] = [{"prompt": "p", "completion": c * 8} for c in "bcdefg"]
    write(tmp_path / "crowd.jsonl", rows)

    def covered(rule: str, seed: int = 0) -> int:
        one = loaded(world, {"path": str(tmp_path / "crowd.jsonl"), "select": {"rule": rule, "size": 7}}, seed=seed)
        return len({row.completion for part in one.parts for row in part.rows})

    assert covered("fisher") == 7
    assert max(covered("random", seed) for seed in range(5)) < 6
