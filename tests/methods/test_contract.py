"""Every registered method is held to `check_method`, and `check_method` is held to catching broken ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crosstrain.methods import METHODS, load_method
from crosstrain.methods.plans import demonstrations, rollouts
from crosstrain.objective.advantages import ones, raw_reward
from crosstrain.objective.terms import by, nll, surrogate
from crosstrain.testing import check_method
from crosstrain.types import Batch, Method, Per, Scores, Source, Term

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("sft", {"average": "sequences"}),
    ("dpo", {"label_smoothing": 0.2}),
    ("grpo", {"num_iterations": 2, "num_generations": 4}),
    ("grpo", {"average": "tokens", "beta": 0.0, "num_generations": 4}),
    ("grpo", {"average": "constant", "max_completion_length": 16, "num_generations": 4}),
    ("grpo", {"scale_rewards": "none", "num_generations": 4}),
    ("grpo", {"dynamic_sampling": 3, "minibatches": 2, "num_generations": 4}),
    ("luffy", {"baseline": "rollouts"}),
    ("luffy", {"num_iterations": 2}),
    ("hpt", {"gate": 2}),
    ("sft", {"label_smoothing": 0.1, "neftune_noise_alpha": 5.0}),
    ("gem", {"h": "linear"}),
    ("superrl", {"trigger": "advantages", "num_iterations": 2}),
    ("reinforce_pp_baseline", {"beta": 0.1}),
    ("grpo", {"off_policy_correction": "truncate", "num_generations": 4}),
    ("grpo", {"off_policy_correction": "sequence_mask", "dual_clip": 3.0, "num_iterations": 2, "num_generations": 4}),
    ("nft", {"weight": "normalised", "constant": 16.0, "num_generations": 4}),
    ("prefix_rft", {"max_completion_length": 8, "num_generations": 4}),
    ("orpo", {"prompt_nll": True}),
    ("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
    ("online_dpo", {"loss_type": "ipo", "num_generations": 4}),
    ("star", {"num_generations": 2, "max_per_prompt": 1, "start_from": "current"}),
    ("rft", {"num_generations": 4, "with_demonstration": False}),
    ("chord_mu", {"rollouts_from": "train", "demonstrations_from": "train"}),
    ("chord_phi", {"rollouts_from": "train", "demonstrations_from": "train"}),
    ("gkd", {"beta": 0.0, "lmbda": 0.0, "temperature": 2.0}),
    ("gkd", {"beta": 1.0, "seq_kd": True}),
    ("on_policy_distillation", {"mode": "full_logits", "num_iterations": 2}),
    (
        "sdft",
        {"num_generations": 2, "teacher_model_kind": "live", "distillation_mode": "topk_logits", "distillation_alpha": 0.5},
    ),
    (
        "sdft",
        {"num_generations": 2, "distillation_mode": "sampled_token", "distillation_alpha": 1.0, "num_loss_tokens_to_skip": 1},
    ),
    ("asft", {"mode": "sft+kl", "direction": "reverse"}),
    ("replay", {"num_iterations": 2, "num_generations": 4}),
    ("relift", {"buffer_size": 2, "num_generations": 4}),
    ("mifo", {"buffer_size": 2, "num_generations": 4}),
    ("srl", {"think_end": "", "num_generations": 4}),
    ("rollout_selection", {"keep": 3, "num_generations": 6}),
    ("raft", {"average": "all"}),
    ("reinforce_rej", {"average": "all"}),
]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(name: str) -> None:
    check_method(load_method(name))


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=lambda x: str(x))
def test_settings_keep_the_contract(name: str, settings: dict[str, Any]) -> None:
    check_method(load_method(name, **settings))


# --- methods broken on purpose --------------------------------------------------------------------------------------


def imitation(value: Callable[[Scores, Batch, Tensor], Tensor], per: Per | None = None) -> Method:
    """SFT with another value."""
    term = Term("demo", value, by(Source.EXPERT), per or Per(("own_tokens",)))
    return Method(terms=(term,), plan=demonstrations(), advantage=ones)


def divides_by_the_micro_batch() -> Method:
    """The field's commonest bug: a mean over whatever happened to be in the micro-batch."""
    return imitation(lambda scores, batch, on: -scores.logp / on.sum(), Per((), constant=1.0))


def reads_the_padded_length() -> Method:
    """A mean over the rectangle's width, padding included."""
    return imitation(lambda scores, batch, on: -scores.logp / on.shape[1], Per(("sequences",)))


def is_on_the_prompt() -> Method:
    """Counts prompt tokens as its own."""
    term = nll("demo", on=lambda batch: batch.source <= Source.EXPERT, per=Per(("own_tokens",)))
    return Method(terms=(term,), plan=demonstrations(), advantage=ones)


def is_on_the_first_prompt_token() -> Method:
    """Reads one entry of the prompt, where no padding gives it away."""

    def on(batch: Batch) -> Tensor:
        first = torch.zeros_like(batch.trained)
        first[:, 0] = True
        return batch.written_by(Source.EXPERT) | first

    return Method(terms=(nll("demo", on=on, per=Per(("own_tokens",))),), plan=demonstrations(), advantage=ones)


def credits_from_outside_the_mask() -> Method:
    """An advantage summed over a whole row of log-probs, of which only the trained entries are known."""

    def advantage(batch: Batch) -> Tensor:
        return batch.reward - batch.columns["ref_logp"].sum(dim=1)

    term = surrogate("rl", on=by(Source.POLICY), per=Per(("sequences",)), needs=frozenset({"ref_logp"}))
    return Method(terms=(term,), plan=rollouts(4), advantage=advantage)


def is_detached() -> Method:
    """A loss that looks right in the log and teaches nothing."""
    return imitation(lambda scores, batch, on: -scores.logp.detach())


def is_detached_in_part() -> Method:
    """A detached ratio times the advantage: a gradient function is there, the gradient is 0."""
    return imitation(lambda scores, batch, on: -scores.logp.detach() + 0 * scores.logp)


def credits_across_groups() -> Method:
    """A baseline over the whole batch."""
    term = surrogate("rl", on=by(Source.POLICY), per=Per(("sequences",)))
    return Method(terms=(term,), plan=rollouts(4), advantage=lambda batch: batch.reward - batch.reward.mean())


def reads_other_rows() -> Method:
    """A value scaled by the batch's best reward."""
    return replace(
        imitation(lambda scores, batch, on: -scores.logp * (1 + batch.reward.sum()), Per(("sequences",))),
        plan=rollouts(4),
        terms=(
            Term(
                "rl",
                lambda scores, batch, on: -scores.logp * (1 + batch.reward.sum()),
                by(Source.POLICY),
                Per(("sequences",)),
            ),
        ),
        advantage=raw_reward,
    )


def remembers_tuples() -> Method:
    """State that JSON changes: a tuple comes back as a list."""
    return replace(load_method("sft"), init=lambda: {"window": (1, 2)})


def remembers_tensors() -> Method:
    """State that JSON cannot hold."""
    return replace(load_method("sft"), init=lambda: {"mean": torch.zeros(2)})


def depends_on_history() -> Method:
    """State that is kept outside the state."""
    steps: list[int] = []

    def update(state: Any, observed: Any) -> dict[str, int]:
        steps.append(0)
        return {"steps": len(steps)}

    return replace(load_method("sft"), init=lambda: {"steps": 0}, update=update)


def explodes() -> Method:
    """A gradient that is not finite."""
    return imitation(lambda scores, batch, on: torch.sqrt(scores.logp * 0.0))


BROKEN = {
    divides_by_the_micro_batch: "micro-batches",
    reads_the_padded_length: "padding",
    is_on_the_prompt: "not trained",
    is_on_the_first_prompt_token: "not trained",
    credits_from_outside_the_mask: "nan",
    is_detached: "zero everywhere",
    is_detached_in_part: "zero everywhere",
    credits_across_groups: "other groups",
    reads_other_rows: "micro-batches",
    remembers_tuples: "JSON",
    remembers_tensors: "JSON",
    depends_on_history: "after saving and loading",
    explodes: "NaN",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_method_is_caught_and_told_why(broken: Callable[[], Method]) -> None:
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        check_method(broken())


def test_a_method_of_ones_own_passes() -> None:
    """The smallest useful one: imitation of own right answers, weighted by their reward."""
    term = surrogate("rl", on=by(Source.POLICY), per=Per(("own_tokens",)))
    check_method(Method(terms=(term,), plan=rollouts(4), advantage=functools.partial(raw_reward)))
