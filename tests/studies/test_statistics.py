from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.formula.api import ols

from crosstrain.studies.statistics import (
    Contrast,
    arm_mean,
    compare,
    holm,
    seed_variance,
    smallest_detectable_difference,
    standard_error,
    unequal_seeds,
    verdict,
)

RNG = np.random.default_rng(3)


def scores(seeds: int, questions: int, shift: float = 0.0, seed_sd: float = 0.3) -> np.ndarray:
    return (
        shift + RNG.normal(0, seed_sd, (seeds, 1)) + RNG.normal(0, 1, (1, questions)) + RNG.normal(0, 0.5, (seeds, questions))
    )


def test_one_model_against_another_is_the_paired_t_test() -> None:
    a, b = scores(1, 40, 0.3)[0], scores(1, 40)[0]
    expected = stats.ttest_rel(a, b)
    found = compare(a, b, None, names=("x", "y"))
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    low, high = expected.confidence_interval()
    assert (found.low, found.high, found.df) == pytest.approx((low, high, 39))
    assert (found.arm, found.against) == ("x", "y")


def test_the_seeds_variance_components_are_those_of_a_two_way_analysis_of_variance() -> None:
    import pandas as pd

    table = scores(4, 25)
    rows = [{"s": s, "q": q, "y": table[s, q]} for s in range(4) for q in range(25)]
    anova = sm.stats.anova_lm(ols("y ~ C(s) + C(q)", pd.DataFrame(rows)).fit())
    mean_square = anova["sum_sq"] / anova["df"]
    found = seed_variance([table])
    assert found.total == pytest.approx(mean_square["C(s)"] / 25)
    assert found.noise == pytest.approx(mean_square["Residual"] / 25)
    assert found.df == 3


def test_seed_variance_is_pooled_by_degrees_of_freedom_and_one_seed_adds_nothing() -> None:
    two, four, one = scores(2, 10), scores(4, 10), scores(1, 10)
    found = seed_variance([two, four, one])
    assert found.df == 4
    assert found.total == pytest.approx((two.mean(1).var(ddof=1) + 3 * four.mean(1).var(ddof=1)) / 4)


def test_without_two_seeds_the_seeds_variance_is_unknown() -> None:
    found = seed_variance([scores(1, 10)])
    assert found.df == 0
    assert math.isnan(found.total)
    assert math.isnan(compare(scores(1, 10), scores(1, 10), found).p)


def test_when_seeds_vary_most_the_interval_is_the_t_interval_over_seeds() -> None:
    a, b = scores(5, 30, seed_sd=1000.0), scores(5, 30, seed_sd=1000.0)
    found = compare(a, b, seed_variance([a, b]))
    classic = stats.ttest_ind(a.mean(1), b.mean(1))
    assert found.p == pytest.approx(classic.pvalue, rel=1e-3)
    assert found.df == pytest.approx(8, rel=1e-3)


def test_negative_seed_variance_counts_as_none() -> None:
    table = np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]])  # seeds agree on average and on no question
    found = seed_variance([table, table])
    assert found.total == 0 < found.noise
    assert found.seeds == 0
    difference = compare(table + np.array([0.0, 0.1, 0.2, 0.3]), table, found)
    assert difference.df == 3
    assert difference.se == pytest.approx(np.std([0.0, 0.1, 0.2, 0.3], ddof=1) / 2)


def test_the_base_has_no_seeds() -> None:
    arms = [scores(3, 20), scores(3, 20)]
    pooled, base = seed_variance(arms), scores(1, 20)[0]
    se, _ = standard_error(arms[0].mean(0) - base, 1 / 3, pooled)
    assert compare(arms[0], base, pooled).se == pytest.approx(float(se))
    assert arm_mean(base, pooled).se == pytest.approx(stats.sem(base))


def test_sets_that_differ_on_average_are_not_counted_as_uncertainty() -> None:
    easy, hard = scores(3, 12, shift=50.0), scores(3, 8, shift=-50.0)
    both, sets = np.concatenate([easy, hard], axis=1), np.array(["easy"] * 12 + ["hard"] * 8)
    split = standard_error(both.mean(0), 0.0, None, sets)[0]
    parts = (12 / 20) ** 2 * stats.sem(easy.mean(0)) ** 2 + (8 / 20) ** 2 * stats.sem(hard.mean(0)) ** 2
    assert split == pytest.approx(math.sqrt(parts))
    assert split < standard_error(both.mean(0), 0.0, None)[0] / 10
    with pytest.raises(ValueError, match="at least 2 questions"):
        standard_error(both.mean(0), 0.0, None, np.array(["easy"] * 19 + ["hard"]))


def test_many_studies_at_once_are_each_of_them() -> None:
    a, b = RNG.normal(size=(6, 3, 15)), RNG.normal(size=(6, 3, 15))
    se, df = standard_error(a.mean(1) - b.mean(1), 2 / 3, seed_variance([a, b]))
    for i in range(6):
        one = compare(a[i], b[i], seed_variance([a[i], b[i]]))
        assert (one.se, one.df) == pytest.approx((se[i], df[i]))


@given(st.integers(2, 4), st.integers(2, 4), st.integers(3, 12), st.integers(0, 1000))
def test_swapping_arms_and_shifting_both_change_nothing_but_the_sign(s_a: int, s_b: int, q: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(s_a, q)), rng.normal(size=(s_b, q))
    pooled, order = seed_variance([a, b]), rng.permutation(q)
    one, other = compare(a, b, pooled), compare(b, a, pooled)
    moved = compare(a[:, order] + 5, b[:, order] + 5, seed_variance([a[:, order] + 5, b[:, order] + 5]))
    assert (other.difference, other.low, other.p) == pytest.approx((-one.difference, -one.high, one.p))
    assert (moved.difference, moved.se, moved.df) == pytest.approx((one.difference, one.se, one.df))


def test_equal_scores_everywhere() -> None:
    same = np.ones((3, 10))
    pooled = seed_variance([same, same])
    assert compare(same, same, pooled).p == 1
    none = compare(same, 0 * same, pooled)
    assert (none.p, none.difference) == (0, 1)
    # without variation there is nothing to make an interval of, and no difference can be called too small to find
    assert math.isnan(none.low) and math.isnan(none.high)
    assert math.isnan(arm_mean(same, pooled).low)
    assert math.isnan(smallest_detectable_difference(none.se, none.df))


def contrast(p: float, difference: float = 1.0) -> Contrast:
    return Contrast("a", "b", difference, 0, 2, 0.5, 10, p)


def test_holm_by_hand_and_around_what_is_unknown() -> None:
    found = holm([contrast(0.04), contrast(math.nan), contrast(0.01), contrast(0.03)])
    assert [found[i].p_holm for i in (0, 2, 3)] == pytest.approx([0.06, 0.03, 0.06])
    assert math.isnan(found[1].p_holm)
    assert holm([]) == []
    assert math.isnan(holm([contrast(math.nan)])[0].p_holm)


@pytest.mark.parametrize(
    ("p", "difference", "direction", "expected"),
    [
        (0.01, 1.0, "higher", "better"),
        (0.01, -1.0, "higher", "worse"),
        (0.01, 1.0, "lower", "worse"),
        (0.2, 1.0, "higher", "cannot tell"),
        (math.nan, 1.0, "higher", "cannot tell"),
    ],
)
def test_verdicts(p: float, difference: float, direction: str, expected: str) -> None:
    [one] = holm([contrast(p, difference)])
    assert verdict(one, direction=direction) == expected  # type: ignore[arg-type]


def test_verdicts_go_by_the_corrected_p() -> None:
    assert {verdict(c) for c in holm([contrast(0.03), contrast(0.04)])} == {"cannot tell"}


@pytest.mark.parametrize(("df", "within"), [(6, 0.01), (40, 0.005)])
def test_the_smallest_detectable_difference_is_found_four_times_in_five(df: int, within: float) -> None:
    true = smallest_detectable_difference(0.5, df)
    critical = stats.t.ppf(0.975, df)
    assert stats.nct.sf(critical, df, true / 0.5) == pytest.approx(0.8, abs=within)
    assert smallest_detectable_difference(0.5, df, alpha=0.01) > true


def test_seeds_that_vary_unequally_are_noticed() -> None:
    steady, shaky = scores(5, 30, seed_sd=0.1), scores(5, 30, seed_sd=20.0)
    assert unequal_seeds([steady, shaky]) == pytest.approx(stats.bartlett(steady.mean(1), shaky.mean(1)).pvalue)
    assert unequal_seeds([steady, shaky]) < 0.001
    assert math.isnan(unequal_seeds([steady, np.ones((3, 30)), scores(1, 30)]))
