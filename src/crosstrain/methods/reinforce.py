"""Policy gradients without a learned critic: REINFORCE, RLOO, and rejection sampling (RAFT, RAFT++, Reinforce-Rej)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crosstrain.methods.checks import EQUAL, clip, several
from crosstrain.methods.plans import drop_equal_rewards, right_answers, rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import leave_one_out, ones, positive_reward, raw_reward
from crosstrain.objective.terms import by, clipped, nll, reinforce_loss, surrogate, token_sum
from crosstrain.objective.words import says
from crosstrain.types import Batch, Method, Per, Source, Updates, keep

Average = Literal["kept", "all"]


@method(paper="doi:10.1007/BF00992696", family="reinforcement learning", checked="paper", year=1992)
def reinforce(num_generations: int = 1) -> Method:
    """REINFORCE: raise the log-probability of each completion in proportion to its reward, without a baseline.

    Loss (logged): -sum_t R log pi(y_t) / N over sequences. Weight on grad log pi: R / N on every token. Williams 1992.
    """
    term = surrogate(
        "rl", on=by(Source.POLICY), per=Per(("sequences",)), logged=reinforce_loss(token_sum), describe="-R log pi"
    )
    return Method(terms=(term,), plan=rollouts(num_generations), advantage=raw_reward)


@method(
    paper="arXiv:2402.14740",
    family="reinforcement learning",
    checked="port",
    deviates=(
        "TRL's trainer of that name has a clipped ratio of whole sequences and takes a KL off the reward; the paper's "
        "estimator, which this is, has neither."
    ),
)
def rloo(num_generations: int = 4) -> Method:
    """RLOO: REINFORCE with the mean reward of the group's other completions as baseline.

    Loss (logged): -sum_t A log pi(y_t) / N over sequences, A_i = R_i - mean of R_j over j != i. Weight: A / N.
    No ratio and no KL term, as the paper's estimator; TRL's trainer of that name adds a sequence-level clipped ratio and
    takes a KL off the reward.
    """
    several(num_generations, "a single completion leaves nothing when it is left out")
    term = surrogate(
        "rl", on=by(Source.POLICY), per=Per(("sequences",)), logged=reinforce_loss(token_sum), describe="-A log pi"
    )
    return Method(terms=(term,), plan=rollouts(num_generations), advantage=leave_one_out)


@method(
    paper="arXiv:2504.11343",
    family="rejection sampling",
    deviates=(
        "RAFT as published (arXiv:2304.06767) goes in rounds over a whole data set; here every step samples, keeps and "
        "imitates. The authors' code divides by the tokens of dropped completions too, which is the setting `average`; their "
        "script adds a KL term of 0.001 and takes four optimizer steps per batch."
    ),
)
def raft(num_generations: int = 4, threshold: float = 0.0, average: Average = "kept") -> Method:
    """RAFT: sample, keep what the verifier accepts, imitate it.

    Loss: -log pi averaged over the tokens of kept completions (reward > threshold). Weight: 1 / N on kept tokens, 0 elsewhere.
    A group with nothing kept is dropped.

    threshold: an answer with a larger reward is kept. average: the tokens that N counts: those of kept completions ("kept"), or of
    all sampled ones ("all"), as in the authors' code, so that a step in which little is right is a small one.

    RAFT is arXiv:2304.06767; this per-step form is that of arXiv:2504.11343.
    """
    _check_average(average)
    if average == "all":
        term = surrogate(
            "kept",
            on=by(Source.POLICY),
            per=Per(("own_tokens",)),
            logged=reinforce_loss(token_sum),
            describe="-A log pi, A = 1 where kept",
        )

        @says(f"1 where R > {threshold:g}, else 0")
        def accepted(batch: Batch) -> Tensor:
            return (batch.reward > threshold).to(batch.reward)

        return Method(terms=(term,), plan=rollouts(num_generations), advantage=accepted)
    term = nll("kept", on=by(Source.POLICY), per=Per(("own_tokens",)))
    return Method(terms=(term,), plan=rollouts(num_generations), select=right_answers(threshold), advantage=ones)


@method(
    paper="arXiv:2504.11343",
    family="rejection sampling",
    works="About as good as GRPO (arXiv:2504.11343).",
)
def raft_pp(num_generations: int = 4, epsilon: float = 0.2, num_iterations: int = 1, minibatches: int = 4) -> Method:
    """RAFT++: RAFT with PPO's ratio and clip, for more than one optimizer step per batch.

    Loss (logged): -sum_t min(A r, A clip(r, 1 - epsilon, 1 + epsilon)) / N over all tokens of the step, A = max(R, 0),
    r = pi / pi_old. Weight on grad log pi: A r / N where r <= 1 + epsilon, else 0. With one optimizer step and rewards of 0 and 1,
    the direction of `raft`.
    """
    clip(epsilon=epsilon)
    term = clipped(
        "kept",
        epsilon,
        epsilon,
        on=by(Source.POLICY),
        per=Per(("own_tokens",)),
        describe="max(-A r, -A clip(r)), r = pi / old, A = max(R, 0)",
    )
    updates = Updates(num_iterations, minibatches)
    return Method(terms=(term,), plan=rollouts(num_generations), advantage=positive_reward, updates=updates)


@method(
    paper="arXiv:2504.11343",
    family="rejection sampling",
    works=(
        "Most of what GRPO gains over rejection sampling is from leaving out prompts that are always wrong, as this does "
        "(arXiv:2504.11343)."
    ),
    deviates=(
        "The authors' code divides by the tokens of dropped groups too, which is the setting `average`. Their script takes four "
        "optimizer steps per batch, with PPO's ratio and clip and a dual clip of 3, and adds a KL term of 0.001; here a batch is "
        "used once, without a KL. Their code trains on a group of one, here refused."
    ),
)
def reinforce_rej(num_generations: int = 4, average: Average = "kept") -> Method:
    """Reinforce-Rej: REINFORCE on prompts that are neither always right nor always wrong.

    Loss (logged): -sum_t R log pi(y_t) / N over all tokens of kept groups; a group whose rewards are all equal is dropped. Weight
    on grad log pi: R / N. The paper's rewards are 1 and -1: with 0 for a wrong answer only right ones are trained on.

    average: the tokens that N counts: those of kept groups ("kept"), or of all ("all"), as in the authors' code, so that a step in
    which few rewards differ is a small one.
    """
    several(num_generations, EQUAL)
    _check_average(average)
    term = surrogate(
        "rl", on=by(Source.POLICY), per=Per(("own_tokens",)), logged=reinforce_loss(token_sum), describe="-R log pi"
    )
    return Method(
        terms=(term,),
        plan=rollouts(num_generations),
        select=drop_equal_rewards if average == "kept" else keep,
        advantage=raw_reward if average == "kept" else where_rewards_differ,
    )


@says("R, but 0 in a group whose rewards are all equal")
def where_rewards_differ(batch: Batch) -> Tensor:
    """The reward itself, [B], but 0 in a group whose rewards are all equal."""
    same = batch.group[:, None] == batch.group[None, :]
    differ = (same & (batch.reward[:, None] != batch.reward[None, :])).any(dim=1)  # a mean of equal numbers may be another
    return torch.where(differ, batch.reward, torch.zeros_like(batch.reward))


def _check_average(average: str) -> None:
    if average not in ("kept", "all"):
        raise ValueError(f"average: got {average!r}; allowed: kept, all")
