"""Policy gradients without a learned critic: REINFORCE, RLOO, and rejection sampling (RAFT, RAFT++, Reinforce-Rej)."""

from __future__ import annotations

from crosstrain.methods.checks import EQUAL, clip, several
from crosstrain.methods.plans import drop_equal_rewards, right_answers, rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import leave_one_out, ones, positive_reward, raw_reward
from crosstrain.objective.terms import by, clipped, nll, reinforce_loss, surrogate, token_sum
from crosstrain.types import Method, Per, Source, Updates


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
    if num_generations < 2:
        raise ValueError(f"num_generations: got {num_generations}; leaving one out needs at least 2")
    term = surrogate(
        "rl", on=by(Source.POLICY), per=Per(("sequences",)), logged=reinforce_loss(token_sum), describe="-A log pi"
    )
    return Method(terms=(term,), plan=rollouts(num_generations), advantage=leave_one_out)


@method(
    paper="arXiv:2504.11343",
    family="rejection sampling",
    deviates=(
        "RAFT as published (arXiv:2304.06767) goes in rounds over a whole data set; here every step samples, keeps and "
        "imitates."
    ),
)
def raft(num_generations: int = 4, threshold: float = 0.0) -> Method:
    """RAFT: sample, keep what the verifier accepts, imitate it.

    Loss: -log pi averaged over the tokens of kept completions (reward > threshold). Weight: 1 / N on kept tokens, 0 elsewhere.
    A group with nothing kept is dropped.

    threshold: an answer with a larger reward is kept.

    RAFT is arXiv:2304.06767; this per-step form is that of arXiv:2504.11343.
    """

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
)
def reinforce_rej(num_generations: int = 4) -> Method:
    """Reinforce-Rej: REINFORCE on prompts that are neither always right nor always wrong.

    Loss (logged): -sum_t R log pi(y_t) / N over all tokens of kept groups; a group whose rewards are all equal is dropped. Weight
    on grad log pi: R / N. The paper's rewards are 1 and -1: with 0 for a wrong answer only right ones are trained on.
    """
    several(num_generations, EQUAL)
    term = surrogate(
        "rl", on=by(Source.POLICY), per=Per(("own_tokens",)), logged=reinforce_loss(token_sum), describe="-R log pi"
    )
    return Method(terms=(term,), plan=rollouts(num_generations), select=drop_equal_rewards, advantage=raw_reward)
