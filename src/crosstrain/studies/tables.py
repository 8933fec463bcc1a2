"""One measure of every arm: its mean and interval, and differences between arms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from crosstrain.errors import UserError
from crosstrain.studies.arms import Arm
from crosstrain.studies.measures import Measure, Scores
from crosstrain.studies.statistics import (
    Array,
    Contrast,
    Estimate,
    SeedVariance,
    arm_mean,
    compare,
    seed_variance,
    unequal_seeds,
)


@dataclass(frozen=True)
class Table:
    """A measure of every arm that has it: scores [S, Q] per arm, [Q] for the base; the questions' sets; the seeds' variance."""

    measure: Measure
    scores: Mapping[str, Array]
    strata: Array
    seeds: SeedVariance

    @staticmethod
    def of(measure: Measure, arms: Sequence[Arm], reference: Mapping[str, Any] | None) -> Table:
        """Gather a measure from the arms' evaluations; changes are against `reference`, and there are none without it."""
        before = measure.read(reference) if measure.change and reference is not None else None
        first: Scores | None = None
        scores: dict[str, Array] = {}
        for arm in arms:
            rows = []
            for seed, evaluation in arm.evaluations.items():
                found = measure.read(evaluation)
                if found is None or (measure.change and before is None):
                    continue
                first = first or found
                _same_questions(measure, first, found, arm.name, seed)
                values = np.array(found.values, float)
                rows.append(values - np.array(before.values, float) if before is not None else values)
            if rows:
                scores[arm.name] = rows[0] if arm.is_base else np.stack(rows)
        strata = joined_sets(first.sets if first else ())
        return Table(measure, scores, strata, seed_variance([s for s in scores.values() if s.ndim == 2], strata))

    @property
    def counted(self) -> SeedVariance | None:
        """The seeds' variance; None when no arm has two seeds, so that intervals are about these models alone."""
        return self.seeds if self.seeds.df else None

    def estimate(self, arm: str) -> Estimate:
        """The mean of an arm; the interval stays within the measure's bounds."""
        found = arm_mean(self.scores[arm], self.counted, self.strata)
        low, high = self.measure.bounds or (-math.inf, math.inf)
        return Estimate(found.mean, max(found.low, low), min(found.high, high), found.se, found.df)

    def contrast(self, arm: str, against: str) -> Contrast:
        """`arm` minus `against`; all NaN where one of them has no finished run."""
        if arm not in self.scores or against not in self.scores:
            return Contrast(arm, against, *[math.nan] * 6)
        return compare(self.scores[arm], self.scores[against], self.counted, self.strata, names=(arm, against))

    def entry(self) -> dict[str, Any]:
        """The measure's entry in results.json."""
        m = self.measure
        described = {k: getattr(m, k) for k in ("key", "label", "group", "unit", "format", "direction", "change", "about")}
        return {
            **described,
            "questions": len(self.strata),
            "seed_sd": math.sqrt(self.seeds.seeds) if self.seeds.df else math.nan,
            "unequal_seeds_p": unequal_seeds([s for s in self.scores.values() if s.ndim == 2]),
            "arms": {
                name: {
                    **asdict(self.estimate(name)),
                    "by_seed": scores.mean(-1).tolist() if scores.ndim == 2 else [],
                    "seed_sd": float(scores.mean(-1).std(ddof=1)) if scores.ndim == 2 and len(scores) > 1 else math.nan,
                }
                for name, scores in self.scores.items()
            },
        }


def joined_sets(sets: Sequence[str]) -> Array:
    """The set of each question, with all in one where a set is too small to say how much its questions differ."""
    strata = np.array(sets, dtype=object)
    names, counts = np.unique(strata.astype(str), return_counts=True)
    return np.full(strata.shape, "all", dtype=object) if len(names) and counts.min() < 2 else strata


def _same_questions(measure: Measure, first: Scores, found: Scores, arm: str, seed: int | None) -> None:
    if found.ids != first.ids or found.sets != first.sets:
        raise UserError(
            f"{measure.key}: {arm}{'' if seed is None else f', seed {seed}'} was asked other questions than the runs before it; "
            "paired differences need the same ones, so evaluate that run again"
        )
