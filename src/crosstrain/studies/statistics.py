"""Inference about training methods from several seeds and one set of questions: means, paired differences, verdicts.

A study trains each arm with S seeds and asks every model the same Q questions. A score Y of seed s of arm a on question q (the mean
over its samples) is taken to be

    Y[a, s, q] = mean[a] + seed[a, s] + question[q] + (arm x question)[a, q] + noise[a, s, q]

and what is wanted is mean[a] and mean[a] - mean[b]: about the method, over seeds and questions like these, not about one model. On
the same questions question[q] cancels in the difference, whose mean over seeds and questions has the variance

    Var = c * var_seed + Var_q(mean over seeds of Y[a] - Y[b]) / Q            c = 1/S_a + 1/S_b

The second summand is measured directly on the Q differences, and has the noise in it. So the first needs the seeds' own variance:
that of the seeds' means, pooled over *all* arms of the study, less what finite questions put into it,

    var_seed = max(0, V - MSE / Q)      V = sum of squares of the seeds' means / sum of (S_a - 1)
                                        MSE = residual mean square of the seed x question tables

Intervals are t intervals with Satterthwaite's degrees of freedom, in which V counts with sum of (S_a - 1) degrees of freedom and a
set of questions with Q - 1. `docs/statistics.md` says when to trust this, and tests/studies/test_coverage.py measures how often the
intervals cover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

Array = NDArray[Any]
Verdict = Literal["better", "worse", "cannot tell"]
Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class SeedVariance:
    """How much the mean score of a model varies between training seeds, pooled over arms.

    total: variance of the seeds' means. noise: the part of it that comes from the finite number of questions. df: degrees of
    freedom of `total`; 0 when no arm has two seeds, and then both are NaN. Arrays when computed for many studies at once.
    """

    total: Any
    noise: Any
    df: int

    @property
    def seeds(self) -> Any:
        """The seeds' own variance, at least 0."""
        return np.maximum(self.total - self.noise, 0.0)


@dataclass(frozen=True)
class Estimate:
    """A mean with its t interval, standard error and degrees of freedom. No interval (NaN) where all scores are equal: a sample
    without variation cannot say how much the next one would vary."""

    mean: float
    low: float
    high: float
    se: float
    df: float


@dataclass(frozen=True)
class Contrast:
    """`arm` minus `against` on the same questions: difference with its t interval, two-sided p, and p after Holm (NaN before)."""

    arm: str
    against: str
    difference: float
    low: float
    high: float
    se: float
    df: float
    p: float
    p_holm: float = math.nan


def seed_variance(arms: Sequence[Array], strata: Array | None = None) -> SeedVariance:
    """The variance of the seeds' means pooled over arms, and the part of it that finite questions put there.

    arms: one array [..., S, Q] per arm; S may differ between arms, and an arm of one seed adds nothing. strata: [Q], the set each
    question belongs to (see `standard_error`).

    >>> two = np.array([[0.0, 1.0], [1.0, 2.0]])     # the second seed is better by 1 on both questions
    >>> seed_variance([two, two])
    SeedVariance(total=np.float64(0.5), noise=np.float64(0.0), df=2)
    """
    several = [a for a in arms if a.shape[-2] > 1]
    df = sum(a.shape[-2] - 1 for a in several)
    if not df:
        return SeedVariance(math.nan, math.nan, 0)
    squares = sum(a.mean(-1).var(-1, ddof=1) * (a.shape[-2] - 1) for a in several)
    residual = sum(_noise_of_means(a, strata) * (a.shape[-2] - 1) for a in several)
    return SeedVariance(squares / df, residual / df, df)


def unequal_seeds(arms: Sequence[Array]) -> float:
    """p of Bartlett's test that the seeds of all arms, [S, Q] each, vary alike, which pooling takes for granted.

    Small values say that it does not hold; with two or three seeds large ones say little. Arms of one seed, or whose seeds' means
    are all equal, are left out; NaN where fewer than two are left.
    """
    means = [a.mean(-1) for a in arms if a.shape[-2] > 1]
    varied = [m for m in means if m.var() > 0]
    return float(stats.bartlett(*varied).pvalue) if len(varied) > 1 else math.nan


def _noise_of_means(scores: Array, strata: Array | None) -> Any:
    """MSE / Q of the seed x question table [..., S, Q]: what questions add to the variance of a seed's mean."""
    q = scores.shape[-1]
    found: Any = 0.0
    for rows in _sets(strata, q):
        table = scores[..., rows]
        n = table.shape[-1]
        means = table.mean(-1, keepdims=True) + table.mean(-2, keepdims=True) - table.mean((-2, -1), keepdims=True)
        mse = ((table - means) ** 2).sum((-2, -1)) / ((table.shape[-2] - 1) * (n - 1))
        found = found + (n / q) ** 2 * mse / n
    return found


def standard_error(
    per_question: Array, share: float, seeds: SeedVariance | None, strata: Array | None = None
) -> tuple[Any, Any]:
    """Standard error and degrees of freedom of the mean of `per_question`, [..., Q].

    per_question: means over seeds, or differences of such means between two arms. share: 1/S of one arm, 1/S_a + 1/S_b of a
    difference; a model without training seeds adds 0. seeds: None leaves the seeds' variance out, so that the result is about
    these very models. strata: [Q], the set each question belongs to; the sets are taken as given and the questions in them as
    drawn, so that how sets differ on average is not counted as uncertainty. Every set needs two questions.
    """
    q = per_question.shape[-1]
    parts = []
    for rows in _sets(strata, q):
        found = per_question[..., rows]
        n = found.shape[-1]
        parts.append(((n / q) ** 2 * found.var(-1, ddof=1) / n, n - 1))
    square: Any = sum(part for part, _ in parts)
    spread: Any = sum(part**2 / df for part, df in parts)
    if seeds is not None and share > 0:
        own = share * seeds.seeds
        square = square + own
        # V's own uncertainty counts, also that of the part taken off; where nothing is left of it, the questions are all there is.
        spread = spread + np.where(own > 0, (share * seeds.total) ** 2 / max(seeds.df, 1), 0.0)
    df = np.divide(square**2, spread, out=np.full_like(np.asarray(square, float), math.inf), where=np.asarray(spread) > 0)
    return np.sqrt(square), np.maximum(df, 1.0)


def _sets(strata: Array | None, q: int) -> list[Array]:
    """The questions of each set, as indices."""
    names = [None] if strata is None else list(dict.fromkeys(strata.tolist()))
    rows = [np.arange(q) if strata is None else np.flatnonzero(strata == name) for name in names]
    if any(len(r) < 2 for r in rows):
        raise ValueError("every set needs at least 2 questions to say how much questions differ")
    return rows


def arm_mean(scores: Array, seeds: SeedVariance | None, strata: Array | None = None, *, level: float = 0.95) -> Estimate:
    """The mean score of an arm and its t interval.

    scores: [S, Q], or [Q] for one model that was not trained (the base), which has no seeds to vary. seeds: None gives an
    interval about these very models (see `standard_error`).

    >>> arm_mean(np.array([0.0, 1.0, 0.0, 1.0]), None).mean
    0.5
    """
    per_question, share = _over_seeds(scores)
    se, df = standard_error(per_question, share, seeds, strata)
    mean, half = float(per_question.mean()), _half_width(se, df, level)
    return Estimate(mean, mean - half, mean + half, float(se), float(df))


def compare(
    a: Array,
    b: Array,
    seeds: SeedVariance | None,
    strata: Array | None = None,
    *,
    names: tuple[str, str] = ("a", "b"),
    level: float = 0.95,
) -> Contrast:
    """The difference of two arms' mean scores, a minus b, on the same questions.

    a, b: [S, Q], or [Q] for a model without training seeds; the number of seeds may differ. Seeds are not paired: seed 0 of two
    methods has nothing in common but a number. Where all differences and all seeds are equal the standard error is 0, there is no
    interval (NaN), and p is 1 for no difference and 0 for any.
    """
    (of_a, share_a), (of_b, share_b) = _over_seeds(a), _over_seeds(b)
    differences = of_a - of_b
    se, df = standard_error(differences, share_a + share_b, seeds, strata)
    difference, half = float(differences.mean()), _half_width(se, df, level)
    p = float(difference == 0) if se == 0 else float(2 * stats.t.sf(abs(difference) / se, df))
    return Contrast(*names, difference, difference - half, difference + half, float(se), float(df), p)


def _over_seeds(scores: Array) -> tuple[Array, float]:
    """Means over seeds, [Q], and the share of the seeds' variance that is left in them."""
    return (scores, 0.0) if scores.ndim == 1 else (scores.mean(0), 1 / scores.shape[0])


def _half_width(se: Any, df: Any, level: float) -> float:
    return float(stats.t.ppf((1 + level) / 2, df) * se) if se > 0 else math.nan


def holm(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """The contrasts with p adjusted by Holm's method over all of them; one without a p counts for nothing and keeps NaN.

    >>> [c.p_holm for c in holm([Contrast("a", "b", 1, 0, 2, 1, 9, p) for p in (0.01, 0.04)])]
    [0.02, 0.04]
    """
    tested = [i for i, c in enumerate(contrasts) if not math.isnan(c.p)]
    adjusted = multipletests([contrasts[i].p for i in tested], method="holm")[1] if tested else []
    found = dict(zip(tested, adjusted, strict=True))
    return [replace(c, p_holm=float(found.get(i, math.nan))) for i, c in enumerate(contrasts)]


def verdict(contrast: Contrast, *, alpha: float = 0.05, direction: Direction = "higher") -> Verdict:
    """Whether `arm` is better or worse than `against`, or one cannot tell, by p after Holm.

    direction: whether a higher or a lower score is better.

    >>> verdict(Contrast("a", "b", -0.2, -0.3, -0.1, 0.05, 9, 0.001, 0.01), direction="lower")
    'better'
    """
    if math.isnan(contrast.p_holm) or contrast.p_holm >= alpha:
        return "cannot tell"
    return "better" if (contrast.difference > 0) == (direction == "higher") else "worse"


def smallest_detectable_difference(se: float, df: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true difference that a two-sided t test at `alpha` would find with probability `power`, given its standard error.

    (t[1 - alpha/2, df] + t[power, df]) * se (Bloom 1995); a few percent below the exact value at 2 degrees of freedom, the same
    from 6 on. NaN for a standard error of 0, which says nothing. For a planned contrast, alpha is divided by the number of
    contrasts: what Holm asks of the first of them.

    >>> round(smallest_detectable_difference(1.0, 1e9), 2)
    2.8
    """
    return float((stats.t.ppf(1 - alpha / 2, df) + stats.t.ppf(power, df)) * se) if se > 0 else math.nan
