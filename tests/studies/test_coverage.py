"""The 95% intervals of planned contrasts cover the truth 93 to 97 times in 100, in studies simulated from known truths.

Coverage is the mean over a simulated study's contrasts, so its standard error at N studies is below sqrt(0.95 * 0.05 / N): 0.34%
at 4,000. Random numbers are fixed.
"""

from __future__ import annotations

import numpy as np
import pytest
from coverage_model import World, coverage

# On the log-odds scale: 0.1 moves accuracy by about 2 points between seeds, 1 by about 17 and dwarfs the questions' part.
SEED_SPREADS = {"no": 0.0, "small": 0.1, "middling": 0.3, "dominating": 1.0}


def check(world: World, replications: int, low: float = 0.93, high: float = 0.97) -> None:
    for against, share in coverage(world, replications, np.random.default_rng(20261124)).items():
        assert low <= share <= high, f"{world}, against {against}: {share:.4f}"


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", ["no", "dominating"])
def test_intervals_cover_on_binary_questions(seeds: int, spread: str) -> None:
    check(World(seeds, SEED_SPREADS[spread], questions=64), 2000)


@pytest.mark.parametrize("spread", ["no", "small", "dominating"])
def test_intervals_cover_on_likelihoods(spread: str) -> None:
    check(World(3, SEED_SPREADS[spread], questions=48, samples=None), 2000)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", list(SEED_SPREADS))
@pytest.mark.parametrize("interaction", [0.2, 0.8])
@pytest.mark.parametrize("samples", [8, None])
def test_intervals_cover_in_many_worlds(seeds: int, spread: str, interaction: float, samples: int | None) -> None:
    check(World(seeds, SEED_SPREADS[spread], interaction=interaction, samples=samples), 4000)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_intervals_cover_with_two_arms_or_noisy_seeds(seeds: int, noise: float) -> None:
    """With 2 arms of 2 seeds the pooled variance has 2 degrees of freedom; the intervals are then somewhat too narrow at worst."""
    for spread in SEED_SPREADS.values():
        check(World(seeds, spread, arms=6, noise=noise), 4000)
        check(World(seeds, spread, arms=2, noise=noise), 4000, low=0.91, high=0.98)


@pytest.mark.slow
def test_intervals_err_on_the_wide_side_when_neither_seeds_nor_methods_differ() -> None:
    """The documented corner: no seed variance and no question on which one method gains more; 2 seeds are too wide by a little."""
    for seeds in (2, 3, 5):
        check(World(seeds, 0.0, interaction=0.0), 4000, low=0.95, high=0.975)


@pytest.mark.slow
def test_pooling_unequal_seed_variances_covers_too_little() -> None:
    """The documented limit of pooling: where some arms vary much more than others, contrasts cover less than they say."""
    steady, shaky = (0.1, 0.1, 0.1), (0.6, 0.6, 0.6)
    for against, share in coverage(World(3, (*steady, *shaky)), 4000, np.random.default_rng(1)).items():
        assert 0.90 <= share <= 0.94, (against, share)
