"""Kill -9 a run whose data are filtered, chosen, ordered and mixed: it goes on as it would have."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_resume import TIMINGS, finish, kill_after, steps

from crosstrain.testing import save_tiny_model

DATA: dict[str, list[dict[str, Any]]] = {
    "mixture": [
        {
            "weight": 2,
            "filter": {"deduplicate": "near"},
            "select": {"rule": "fisher", "size": 6},
            "order": {"by": "loss", "start": 0.3, "until": 1.5},
        },
        {"weight": 1, "order": {"by": "length", "pacing": "sorted", "direction": "hard_first"}},
        {"weight": 0.5, "select": {"rule": "random", "size": 4}},
    ]
}


@pytest.mark.parametrize("cached", [True, False])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "model")
    rows = [{"prompt": f"say {i}", "completion": f"it is {i**5}"} for i in (*range(8), 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = tmp_path / "recipe.yaml"
    recipe = {
        "model": str(tmp_path / "model"),
        "data": {"mixture": [{"path": str(tmp_path / "rows.jsonl"), **part} for part in DATA["mixture"]]},
        "method": "sft",
        "max_steps": 8,
        "batch_size": 3,
        "learning_rate": 1e-2,
        "evaluation": {"forgetting": False, "divergence": False},
        "save": {"save_steps": 1},
        "precision": "fp32",
        "device": "cpu",
    }
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("CROSSTRAIN_CACHE", str(tmp_path / "cache"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(path, whole)
    last = len(steps(whole))

    kill_after(random.Random(cached).randint(1, last - 3), path, killed)
    assert len(steps(killed)) < last, "the run was over before it was killed"
    if not cached:  # what was chosen is worked out again, on the same weights
        monkeypatch.setenv("CROSSTRAIN_CACHE", str(tmp_path / "other cache"))
    finish(path, killed)

    clean, again = ([{k: v for k, v in line.items() if k not in TIMINGS} for line in steps(f)] for f in (whole, killed))
    assert again == clean
    assert clean[-1]["epoch/train/rows.jsonl#1"] == pytest.approx(14 / 6)  # 24 examples: 13.7, 6.9, 3.4
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    torch.testing.assert_close(other, one, rtol=0, atol=0)
    records = [json.loads((folder / "record.json").read_text()) for folder in (whole, killed)]
    assert records[0]["data_report"] == records[1]["data_report"] and records[0]["data"] == records[1]["data"]
