"""The model card of a trained model: what it is, how it was made, and how well it does, with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from scipy import stats

from crosstrain.config import Recipe, to_yaml
from crosstrain.in_turn import in_turn
from crosstrain.training.cost import Cost


def model_card(
    recipe: Recipe,
    record: Mapping[str, Any],
    cost: Cost,
    evaluation: Mapping[str, Any] | None,
    *,
    saves: str = "language model",
) -> str:
    """The README.md of a model folder: Hugging Face metadata with evaluation results, then the same for people.

    Intervals are 95% t intervals over questions, for this one model; how much a method varies between training seeds is what a
    study measures.
    """
    rows = evaluation_rows(evaluation)
    methods = [stage.method.name for stage in recipe.stages]
    header = {
        "base_model": recipe.model.name,
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if saves == "reward model" else "text-generation",
        "tags": ["crosstrain", *dict.fromkeys(methods)],
        "model-index": [{"name": in_turn(methods), "results": [_result(row) for row in rows]}],
    }
    table = ["| questions | task | accuracy | 95% interval | questions x samples |", "|---|---|---|---|---|"]
    table += [f"| {r['name']} | {r['task']} | {r['mean']:.1%} | {_ends(r)} | {r['questions']} x {r['n']} |" for r in rows]
    data = [f"- `{name}`: {d['rows']} rows, sha256 `{d['hash']}`" for name, d in record.get("data", {}).items()]
    spent = (
        f"{cost.processed_tokens:,} tokens processed, {cost.generated_tokens:,} generated, "
        f"{cost.demonstrations:,} demonstrations, {cost.flops:.3g} FLOPs, {cost.seconds:,.0f} s"
    )
    return "\n".join(
        [
            "---",
            yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {record.get('model', recipe.model.name)}, trained with {in_turn(methods)}",
            "",
            f"Trained with crosstrain {record.get('versions', {}).get('crosstrain', '')}. Cost: {spent}.",
            "",
            "## Evaluation",
            "",
            *(table if rows else ["This run was not evaluated."]),
            "",
            "Intervals are over questions, for this one model. They do not say how much the method varies between seeds.",
            "",
            "## Data",
            "",
            *(data or ["None recorded."]),
            "",
            "## Recipe",
            "",
            "```yaml",
            to_yaml(recipe).strip(),
            "```",
            "",
        ]
    )


def evaluation_rows(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Accuracy of each evaluated set with its 95% t interval over questions; none where all questions went alike."""
    rows = []
    for name, found in (evaluation or {}).get("sets", {}).items():
        scores = [statistics.fmean(q["correct"]) for q in found["questions"]]
        mean, half = statistics.fmean(scores), _half_width(scores)
        low, high = (None, None) if half is None else (max(0.0, mean - half), min(1.0, mean + half))
        task = f"{found['task']} (version {found['task_version']})"
        rows.append(
            {"name": name, "task": task, "mean": mean, "low": low, "high": high, "questions": len(scores), "n": found["n"]}
        )
    return rows


def _ends(row: Mapping[str, Any]) -> str:
    return "unknown: all questions went alike" if row["low"] is None else f"{row['low']:.1%} to {row['high']:.1%}"


def _half_width(scores: Sequence[float]) -> float | None:
    if len(scores) < 2 or statistics.stdev(scores) == 0:
        return None
    return float(stats.t.ppf(0.975, len(scores) - 1)) * statistics.stdev(scores) / math.sqrt(len(scores))


def _result(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": row["name"], "type": row["task"]},
        "metrics": [
            {
                "type": "accuracy",
                "value": round(row["mean"], 4),
                "name": "accuracy" if row["low"] is None else f"accuracy (95% interval {row['low']:.4f} to {row['high']:.4f})",
            }
        ],
    }
