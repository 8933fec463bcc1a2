"""`crosstrain data check RECIPE.yaml`: filters, shares, selection and curriculum as a run would have them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import crosstrain
from crosstrain.cli import main
from crosstrain.cli_data import check_recipe
from crosstrain.testing import save_tiny_model
from crosstrain.training.record import read_lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    rows = [{"prompt": f"p{i % 5}", "completion": "x" * (i % 5 + 1), "grade": -i} for i in range(6)]
    for name, content in (("rows", rows), ("other", [{"prompt": f"o{i}", "completion": "y"} for i in range(3)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    return folder


def recipe(world: Path, data: Any, **more: Any) -> Path:
    content = {
        "model": str(world / "model"),
        "data": data,
        "method": "sft",
        "max_steps": 1,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "evaluation": {"forgetting": False, "divergence": False},
        "precision": "fp32",
        "device": "cpu",
        **more,
    }
    (world / "recipe.yaml").write_text(yaml.safe_dump(content))
    return world / "recipe.yaml"


def said(file: Path) -> str:
    out = io.StringIO()
    check_recipe(file, console=Console(file=out, width=300))
    return out.getvalue()


def test_a_mixture_with_filter_selection_and_curriculum(world: Path) -> None:
    file, other = world / "rows.jsonl", world / "other.jsonl"
    first = {"path": str(file), "weight": 3, "filter": {"deduplicate": "exact"}, "order": {"by": "column", "column": "grade"}}
    second = {"path": str(other), "select": {"rule": "fisher", "size": 2}, "order": {"by": "length", "pacing": "sorted"}}
    shown = said(recipe(world, {"mixture": [first, second]}))
    assert "train: 7 rows\n" in shown
    assert "  rows.jsonl: 5 rows, share 75.0%, 3 of the first 4\n" in shown
    assert f"    filter keeps 5 of 6 rows; deduplicate took 1, first {file}:6\n" in shown
    easy = f"first {file}:5 (-4), {file}:4 (-3), {file}:3 (-2)"
    assert f"    order: by grade, easy first, linear, a pool of 1 that grows to all over 5 draws; {easy}\n" in shown
    assert "  other.jsonl: 2 rows, share 25.0%, 1 of the first 4\n" in shown
    assert f"    select: fisher takes 2 of 3, first {other}:" in shown
    assert "    order: by length, easy first, sorted; first " in shown
    batch = shown.split("first batch of 4 at seed 0")[1]
    assert batch.count(f"{file}:") == 3 and batch.count(f"{other}:") == 1 and "p4[[xxxxx<|im_end|>]]" in batch


def test_the_first_batch_is_the_one_that_is_trained_on(world: Path, tmp_path: Path) -> None:
    file = recipe(world, {"path": str(world / "rows.jsonl"), "order": {"by": "loss"}}, seed=3)
    folder = crosstrain.train(file, tmp_path / "run").folder
    batch = said(file).split("first batch of 4 at seed 3")[1]
    looked_at = 6 * 2 + (1 + 2 + 3 + 4 + 5 + 1) + 6  # prompts, answers and their ends of all rows, for their losses
    trained = 4 * 2 + batch.count("x") + batch.count("<|im_end|>")
    assert read_lines(folder / "metrics.jsonl")[0]["cost/processed_tokens"] == looked_at + trained


def test_streams_and_tasks(world: Path) -> None:
    shown = said(recipe(world, {"train": str(world / "rows.jsonl"), "more": {"task": "sums", "size": 3}}))
    assert "train: 6 rows\n  rows.jsonl: 6 rows\n" in shown and "more: 3 rows\n  sums: 3 rows\n" in shown
    assert "first batch of 8 at seed 0" in shown  # no stage draws from it


def test_what_a_method_lacks_is_an_error_after_the_rows_were_shown(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(recipe(world, str(world / "rows.jsonl"), method="dpo"))]) == 2
    shown = capsys.readouterr()
    assert "train: 6 rows\n" in shown.out and "method dpo needs `chosen` and `rejected`, which 6 of 6 rows" in shown.err


def test_mistakes(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(world, {"path": str(world / "rows.jsonl"), "filter": {"min_length": 99}})
    assert main(["data", "check", str(file)]) == 2
    assert "data.train.filter leaves no row: it keeps 0 of 6 rows; min_length took 6" in capsys.readouterr().err
    assert main(["data", "check", str(file), "--max-length", "9"]) == 2
    assert "--max-length has no effect on a recipe" in capsys.readouterr().err
    assert main(["data", "check", str(file), "--ask"]) == 2
    assert f"--ask is for a recipe whose data have a `teacher`; those of {file} have none" in capsys.readouterr().err
    (world / "bad.jsonl").write_text('{"promt": "a"}\n{"prompt": ""}\n')
    assert main(["data", "check", str(recipe(world, str(world / "bad.jsonl")))]) == 2
    shown = capsys.readouterr()
    assert [line.split(" ")[0] for line in shown.out.splitlines()] == [f"{world}/bad.jsonl:{n}:" for n in (1, 2)]
