"""Many simulated studies at once, with the truth known: how often do the planned contrasts' intervals cover it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from crosstrain.studies.statistics import seed_variance, standard_error


@dataclass(frozen=True)
class World:
    """How scores come about; all on the scale of log-odds.

    seed: sd between training seeds, one value per arm or one for all. difficulty: sd between questions. interaction: sd of what a
    method gains on a question. noise: sd of what a seed gains on a question. samples: answers per question; None leaves the
    log-odds themselves as scores, as with likelihoods.
    """

    seeds: int
    seed: float | tuple[float, ...]
    arms: int = 6
    questions: int = 128
    difficulty: float = 1.5
    interaction: float = 0.4
    noise: float = 0.3
    samples: int | None = 8


def coverage(world: World, replications: int, rng: np.random.Generator) -> dict[str, float]:
    """The share of 95% intervals that hold the true difference: arms against the untrained base, and arms against each other."""
    hits: dict[str, list[NDArray[np.bool_]]] = {"base": [], "arms": []}
    for _ in range(-(-replications // 500)):
        levels = np.linspace(0.6, -0.4, world.arms)
        arms, base, truth = _draw(world, levels, 500, rng)
        pooled = seed_variance(list(np.moveaxis(arms, 1, 0)))
        means = arms.mean(2)
        for i in range(world.arms):
            hits["base"].append(_covers(means[:, i] - base, 1 / world.seeds, pooled, truth[i] - truth[-1]))
            for j in range(i):
                hits["arms"].append(_covers(means[:, i] - means[:, j], 2 / world.seeds, pooled, truth[i] - truth[j]))
    return {name: float(np.mean(found)) for name, found in hits.items()}


def _covers(differences: NDArray[np.float64], share: float, pooled: object, truth: float) -> NDArray[np.bool_]:
    se, df = standard_error(differences, share, pooled)  # type: ignore[arg-type]
    return np.asarray(np.abs(differences.mean(-1) - truth) <= stats.t.ppf(0.975, df) * se)


def _draw(
    world: World, levels: NDArray[np.float64], n: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64], Sequence[float]]:
    """Scores of the arms [n, A, S, Q] and of the base [n, Q], and the true means of the arms and, last, of the base."""
    a, s, q = world.arms, world.seeds, world.questions
    sd = np.broadcast_to(np.asarray(world.seed, float), (a,))
    difficulty = rng.normal(0, world.difficulty, (n, 1, 1, q))
    odds = levels[:, None, None] + difficulty + rng.normal(0, world.interaction, (n, a, 1, q))
    odds = odds + rng.normal(0, 1, (n, a, s, 1)) * sd[:, None, None] + rng.normal(0, world.noise, (n, a, s, q))
    start = -1.5
    base = start + difficulty[:, 0, 0] + rng.normal(0, world.interaction, (n, q))
    if world.samples is None:
        return odds, base, [*levels.tolist(), start]
    fixed = world.difficulty**2 + world.interaction**2
    truth = [_mean_sigmoid(m, fixed + v**2 + world.noise**2) for m, v in zip(levels, sd, strict=True)]
    return (
        rng.binomial(world.samples, _sigmoid(odds)) / world.samples,
        rng.binomial(world.samples, _sigmoid(base)) / world.samples,
        [*truth, _mean_sigmoid(start, fixed)],
    )


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))


def _mean_sigmoid(mean: float, variance: float) -> float:
    """E sigmoid(N(mean, variance)), by Gauss-Hermite quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(80)
    return float((w * _sigmoid(mean + np.sqrt(variance) * x)).sum() / w.sum())
