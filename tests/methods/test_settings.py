"""What a method refuses: numbers that would turn, empty or silently change training, and settings that nothing reads."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from crosstrain.errors import UserError
from crosstrain.methods import METHODS, load_method
from crosstrain.methods.checks import COUNTS

NUMBERS = (-1.0, 0.0, 1.0, 1.5, 3.0)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_is_refused_is_named_as_the_user_wrote_it(name: str) -> None:
    """Each numeric setting by itself, at values some of which are out of range: the message says its name and what was got."""
    for setting, default in METHODS[name].settings.items():
        for value in NUMBERS if isinstance(default, float) else map(int, NUMBERS[:3]):
            if isinstance(default, bool | str):
                continue
            try:
                load_method(name, **{setting: value})
            except UserError as error:
                said = str(error).removeprefix(f"method {name}: ")
                assert said.startswith(f"{setting}: got {value}") or f"{setting}={value}" in said, said


@pytest.mark.parametrize(("name", "setting"), [(name, s) for name in METHODS for s in METHODS[name].settings if s in COUNTS])
def test_a_number_of_things_is_at_least_1(name: str, setting: str) -> None:
    for value in (0, -3):
        with pytest.raises(UserError, match=rf"{name}: {setting}: got {value}; it must be at least 1"):
            load_method(name, **{setting: value})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # lengths and constants
    ("grpo", {"average": "constant", "max_completion_length": 0}, "max_completion_length: got 0; it must be at least 1"),
    ("dr_grpo", {"max_completion_length": 0}, "max_completion_length: got 0; it must be at least 1"),
    ("dr_grpo", {"max_completion_length": -100}, "max_completion_length: got -100; it must be at least 1"),
    ("uft", {"num_generations": 0}, "num_generations: got 0; it must be at least 1"),
    ("uft", {"hint_steps": 0}, "hint_steps: got 0; it must be at least 1"),
    ("sdft", {"distillation_mode": "topk_logits", "distillation_topk": 0}, "distillation_topk: got 0; it must be at least 1"),
    # bounds of a ratio
    ("cispo", {"bounds": "band", "epsilon": -1.0}, r"epsilon: got -1.0; it must be in (0, 1]"),
    ("cispo", {"bounds": "band", "epsilon": 2.0}, r"epsilon: got 2.0; it must be in (0, 1]"),
    ("cispo", {"bounds": "band", "epsilon_high": 0.0}, "epsilon_high: got 0.0; it must be positive"),
    ("cispo", {"epsilon": -1.0}, r"epsilon: got -1.0; it must be in (0, 1]"),
    ("cispo", {"epsilon": 0.3}, "epsilon: got 0.3, which has no effect, as bounds is 'cap'"),
    ("grpo", {"epsilon": -0.1}, "epsilon: got -0.1; it must be in (0, 1)"),
    ("grpo", {"epsilon_high": 0.0}, "epsilon_high: got 0.0; it must be positive"),
    ("grpo", {"epsilon_high": 0.5, "dual_clip": 1.5}, "dual_clip: got 1.5; it must be above the clip's own upper bound, 1.5"),
    ("gspo", {"epsilon_high": -1.0}, "epsilon_high: got -1.0; it must be positive"),
    ("psft", {"epsilon": 1.0}, "epsilon: got 1.0; it must be in (0, 1)"),
    ("raft_pp", {"epsilon": 0.0}, "epsilon: got 0.0; it must be in (0, 1)"),
    ("chord_phi", {"epsilon": 2.0}, "epsilon: got 2.0; it must be in (0, 1)"),
    ("mifo", {"epsilon_high": 0.0}, "epsilon_high: got 0.0; it must be positive"),
    ("ppo", {"cliprange": -0.1}, "cliprange: got -0.1; it must be in (0, 1)"),
    ("ppo", {"dual_clip": 1.0}, "dual_clip: got 1.0; it must be above the clip's own upper bound, 1.2"),
    ("sapo", {"temperature_neg": -1.0}, "temperature_neg: got -1.0; it must be positive"),
    ("trapo", {"lowest": 0.0}, "lowest: got 0.0; it must be in (0, 1]"),
    ("replay", {"gamma": 0.0}, "gamma: got 0.0; it must be positive"),
    # corrections
    ("grpo", {"correction_cap": 0.0}, "correction_cap: got 0.0; it must be positive"),
    ("grpo", {"correction_lowest": 2.5}, "correction_lowest: got 2.5; it must be 0 or more, and below correction_cap = 2"),
    ("grpo", {"correction_lowest": -0.5}, "correction_lowest: got -0.5; it must be 0 or more"),
    ("grpo", {"correction_cap": 3.0}, "correction_cap: got 3.0, which has no effect, as off_policy_correction is 'none'"),
    (
        "grpo",
        {"off_policy_correction": "truncate", "correction_lowest": 0.25},
        "correction_lowest: got 0.25, which has no effect, as off_policy_correction is 'truncate'",
    ),
    (
        "grpo",
        {"off_policy_correction": "sequence_mask", "correction_lowest": 0.25},
        "correction_lowest: got 0.25, which has no effect, as off_policy_correction is 'sequence_mask'",
    ),
    # groups of one
    ("dr_grpo", {"num_generations": 1}, "num_generations: got 1; a single completion is its group's mean"),
    (
        "grpo",
        {"num_generations": 1, "scale_rewards": "none"},
        "num_generations: got 1; a single completion is its group's mean",
    ),
    ("grpo", {"num_generations": 1, "dynamic_sampling": 2}, "num_generations: got 1; the rewards of a single completion"),
    ("dapo", {"num_generations": 1}, "num_generations: got 1; the rewards of a single completion are all equal"),
    ("nft", {"num_generations": 1}, "num_generations: got 1; the rewards of a single completion are all equal"),
    ("clip_cov", {"num_generations": 1}, "num_generations: got 1; the rewards of a single completion are all equal"),
    ("kl_cov", {"num_generations": 1}, "num_generations: got 1; the rewards of a single completion are all equal"),
    ("reinforce_rej", {"num_generations": 1}, "num_generations: got 1; the rewards of a single completion are all equal"),
    ("relift", {"num_generations": 1}, "num_generations: got 1; a single rollout is its group's mean"),
    ("mifo", {"num_generations": 1}, "num_generations: got 1; a single rollout is its group's mean"),
    ("srl", {"num_generations": 1}, "num_generations: got 1; the spread of a single reward is none"),
    ("rollout_selection", {"keep": 1}, "keep: got 1 with num_generations=64; it must be in [2, num_generations]"),
    ("rollout_selection", {"num_generations": 1, "keep": 1}, "num_generations: got 1; rewards of a single rollout do not vary"),
    ("raft", {"average": "sampled"}, "average: got 'sampled'; allowed: kept, all"),
    ("reinforce_rej", {"average": "tokens"}, "average: got 'tokens'; allowed: kept, all"),
    # without effect, or the other way round
    ("iw_sft", {"weight": "token", "highest": 4.0}, "highest: got 4.0, which has no effect, as weight is 'token'"),
    ("chord_mu", {"mu": 0.1, "mu_valley": 0.5}, "mu_valley: got 0.5 with mu=0.1; mu falls to it"),
    ("chord_mu", {"mu_warmup_steps": -1}, "mu_warmup_steps: got -1; it must be at least 0"),
    ("chord_mu", {"mu_decay_steps": 0}, "mu_decay_steps: got 0; it must be at least 1"),
    ("srl", {"dynamic_sampling": 0}, "dynamic_sampling: got 0; it must be at least 1"),
    ("grpo", {"average": "constant", "max_completion_length": 2.5}, "max_completion_length must be a whole number; got 2.5"),
    ("grpo", {"epsilon_high": "0.3"}, "epsilon_high must be a finite number; got '0.3'"),
    ("dft", {"x": 1}, "unknown setting 'x'; it has no settings"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED, ids=str)
def test_what_would_not_train_as_it_says_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(f'method {name}: {message}')}"):
        load_method(name, **settings)


TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"num_generations": 1}),  # its advantage is the reward itself
    ("dr_grpo", {"max_completion_length": 1, "num_generations": 2}),
    ("cispo", {"bounds": "band", "epsilon": 1.0}),
    ("grpo", {"off_policy_correction": "truncate", "correction_cap": 1.0}),
    ("grpo", {"off_policy_correction": "mask", "correction_lowest": 0.0, "correction_cap": 5.0}),
    ("grpo", {"off_policy_correction": "sequence_mask", "correction_cap": 3.0}),
    ("gmpo", {"epsilon": 1.0}),  # of a logarithm
    ("chord_mu", {"mu": 0.05}),
    ("rollout_selection", {"num_generations": 2, "keep": 2}),
    ("iw_sft", {"weight": "mean", "highest": 4.0}),
]


@pytest.mark.parametrize(("name", "settings"), TAKEN, ids=str)
def test_what_is_at_a_bound_is_taken(name: str, settings: dict[str, Any]) -> None:
    assert load_method(name, **settings).settings.items() >= settings.items()


def test_a_band_that_reaches_down_to_0_does_not_cut_from_below() -> None:
    from worked import answer, group, prepared, weights_of

    method = load_method("cispo", bounds="band", epsilon=1.0)
    logp = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64)
    ratios = torch.tensor([[0.01], [1.0]], dtype=torch.float64)
    batch = prepared(method, [group(answer("O", 1.0), answer("O", 0.0))], old_logp=logp - ratios.log())
    weights = weights_of(method, batch, logp).weights
    assert float(weights[0, 0]) == pytest.approx(0.01 * float(-weights[1, 0]))
