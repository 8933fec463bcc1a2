"""results.json: every number of a study's report, computed from the files of its runs (docs/results-schema.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from crosstrain.studies.arms import BASE, Arm, read_arms, read_json, reference_evaluation
from crosstrain.studies.measures import all_measures, pass_at
from crosstrain.studies.statistics import Contrast, holm, smallest_detectable_difference, verdict
from crosstrain.studies.tables import Table
from crosstrain.training.checkpoint import write_json

SCHEMA_VERSION = 1
ALPHA = 0.05
FAMILIES = (
    ("accuracy", "primary", "In-distribution accuracy"),
    ("ood_accuracy", "secondary", "Out-of-distribution accuracy"),
    ("forgetting/nll", "secondary", "Forgetting (change of gold answers' NLL per token)"),
)


def write_results(folder: Path) -> dict[str, Any]:
    """Build `folder/results.json` from the study in `folder`, and return what is in it."""
    results = build_results(folder)
    write_json(folder / "results.json", results)
    return results


def build_results(folder: Path) -> dict[str, Any]:
    """The content of results.json; NaN is null. UserError when the folder holds no study, or runs were asked other questions.

    Runs that failed or have not ended are listed with their status; the numbers are about the finished ones.
    """
    study = read_json(folder / "study.json", f"{folder} holds no study: there is no study.json")
    arms = read_arms(folder, study)
    evaluations = [e for arm in arms for e in arm.evaluations.values()]
    base = reference_evaluation(folder, arms)
    ks = study["spec"]["shared"]["evaluation"]["pass_at_k"]
    measures = [m for m in all_measures(evaluations, ks) if not m.change or (base is not None and m.read(base) is not None)]
    tables = {m.key: Table.of(m, arms, base) for m in measures}
    curve = _pass_at_k_curve(arms, evaluations)
    found: dict[str, Any] = _plain(
        {
            "schema_version": SCHEMA_VERSION,
            "study": {key: study.get(key) for key in _ABOUT_STUDY},
            "setup": next((arm.setup for arm in arms if arm.setup and not arm.is_base), arms[0].setup),
            "scope": "method" if any(len(arm.evaluations) > 1 for arm in arms) else "these models",
            "alpha": ALPHA,
            "arms": [_arm_entry(arm, study) for arm in arms],
            "measures": [table.entry() for table in tables.values()],
            "pass_at_k": curve,
            "families": [_family(tables[key], role, label, arms, study) for key, role, label in FAMILIES if key in tables],
        }
    )
    return found


_ABOUT_STUDY = (
    *("name", "title", "status", "quick", "tune", "started_at", "finished_at", "config_hash", "versions", "hardware"),
    *("learning_rates", "budget", "models_kept", "corrections", "spec"),
)


def _arm_entry(arm: Arm, study: Mapping[str, Any]) -> dict[str, Any]:
    rates = (study.get("learning_rates") or {}).get("arms", {})
    return {
        "name": arm.name,
        "base": arm.is_base,
        "rewarded": arm.rewarded,
        "seeds": [seed for seed in arm.evaluations if seed is not None],
        "cost": arm.cost,
        "learning_rates": rates.get(arm.name),
        "methods": list(arm.methods),
        "runs": list(arm.runs),
    }


def _pass_at_k_curve(arms: Sequence[Arm], evaluations: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """pass@k of every arm for k = 1 to half the samples."""
    asked = [s["n"] for e in evaluations for s in e.get("sets", {}).values() if s["kind"] == "in_distribution"]
    curve: dict[str, list[dict[str, Any]]] = {}
    for k in range(1, min(asked, default=0) // 2 + 1):
        table = Table.of(pass_at(k), arms, None)
        for name in table.scores:
            curve.setdefault(name, []).append({"k": k, **asdict(table.estimate(name))})
    return curve


def planned(arms: Sequence[Arm], against: Sequence[str]) -> list[tuple[str, str]]:
    """The planned contrasts as (arm, against): every arm against the base, every RL or hybrid arm against each other reference.

    Two references are compared once.
    """
    pairs: list[tuple[str, str]] = []
    for reference in against:
        for arm in arms:
            wanted = not arm.is_base and (reference == BASE or arm.rewarded)
            if wanted and arm.name != reference and (reference, arm.name) not in pairs:
                pairs.append((arm.name, reference))
    return pairs


def _family(table: Table, role: str, label: str, arms: Sequence[Arm], study: Mapping[str, Any]) -> dict[str, Any]:
    """The planned contrasts of a measure with Holm over them, and the leader compared with everyone, with Holm over all pairs."""
    direction = table.measure.direction or "higher"
    against = [name for name in study["spec"]["contrasts"]["against"] if name in {arm.name for arm in arms}]
    contrasts = holm([table.contrast(a, b) for a, b in planned(arms, against)])
    tested = max(sum(not math.isnan(c.p) for c in contrasts), 1)
    method = table.counted is not None
    trained = [arm.name for arm in arms if not arm.is_base and arm.name in table.scores]
    everyone = [name for name in (arm.name for arm in arms) if name in table.scores]
    pairs = holm([table.contrast(a, b) for i, a in enumerate(everyone) for b in everyone[:i]])
    sign = 1 if direction == "higher" else -1
    means = {name: sign * float(table.scores[name].mean()) for name in trained}
    leaders = [name for name in trained if means[name] == max(means.values())]
    leader = leaders[0] if len(leaders) == 1 else None

    def entry(c: Contrast, tests: int) -> dict[str, Any]:
        return {
            **asdict(c),
            "verdict": verdict(c, alpha=ALPHA, direction=direction) if method else "cannot tell",
            "smallest_detectable": smallest_detectable_difference(c.se, c.df, alpha=ALPHA / tests) if method else math.nan,
        }

    return {
        "measure": table.measure.key,
        "label": label,
        "role": role,
        "direction": direction,
        "contrasts": [entry(c, tested) for c in contrasts],
        "leader": leader,
        "tied": leaders if len(leaders) > 1 else [],
        "leader_against": [entry(_from(leader, c), len(pairs)) for c in pairs if leader in (c.arm, c.against)],
        "all_pairs": len(pairs),
    }


def _from(leader: str | None, c: Contrast) -> Contrast:
    """The same contrast seen from the leader's side."""
    if c.arm == leader:
        return c
    return replace(c, arm=c.against, against=c.arm, difference=-c.difference, low=-c.high, high=-c.low)


def _plain(value: Any) -> Any:
    """The same with what JSON cannot hold (NaN, infinity) as None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
