"""What `crosstrain eval` shows."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from synthetic import write_study

from crosstrain.cli_model import measures_table


def test_eval_shows_every_measure_with_its_interval_the_base_and_the_change(tmp_path: Path) -> None:
    write_study(tmp_path, arms=["sft"])
    found, base = (json.loads((tmp_path / "runs" / name / "evaluation.json").read_text()) for name in ("sft/seed-0", "base"))
    console = Console(width=160, record=True)
    console.print(measures_table(found, base, [1, 2, 4]))
    shown = console.export_text()
    rows = {
        cells[1].strip(): [c.strip() for c in cells[2:-1]] for line in shown.splitlines() if len(cells := line.split("│")) > 3
    }
    correct = [q["correct"] for s in found["sets"].values() if s["kind"] == "in_distribution" for q in s["questions"]]
    accuracy = 100 * sum(map(sum, correct)) / sum(map(len, correct))
    value, ends, before, change, of_change = rows["Accuracy"]
    low, high = (float(x) for x in ends.split(" to "))
    assert value == f"{accuracy:.1f}%" and low < accuracy < high
    assert float(change.removesuffix(" pts")) == round(accuracy - float(before.removesuffix("%")), 1)
    assert " to " in of_change
    assert rows["Forgetting, nats per token"][3].startswith("+")
    assert "schema_version" not in shown and "seconds" not in shown


def test_eval_without_a_base_shows_values_only(tmp_path: Path) -> None:
    write_study(tmp_path, arms=["sft"])
    found = json.loads((tmp_path / "runs/sft/seed-0/evaluation.json").read_text())
    assert [str(c.header) for c in measures_table(found, None, [1]).columns] == ["measure", "value", "interval"]
