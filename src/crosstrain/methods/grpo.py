"""GRPO and its named settings: group-relative policy optimisation with a clipped ratio."""

from __future__ import annotations

from typing import Literal

from crosstrain.methods.checks import EQUAL, at_least, clip, inert, several
from crosstrain.methods.plans import drop_equally_right, rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import centred, group_normalised
from crosstrain.objective.gates import Correction, correction
from crosstrain.objective.terms import by, clipped, kl, seq_mean, token_sum
from crosstrain.types import Method, Per, Source, Term, Updates, keep

Average = Literal["sequences", "tokens", "constant"]


@method(
    paper="arXiv:2402.03300",
    family="reinforcement learning",
    checked="port",
    works=(
        "Raises accuracy at one sample above the base model's (arXiv:2504.13837), and forgets less than imitation for the "
        "same gain (arXiv:2509.04259)."
    ),
    fails=(
        "At many samples per question (128 and more) the base model stays ahead (arXiv:2504.13837). A prompt whose "
        "rewards are all equal teaches nothing; dividing by the standard deviation and by an answer's own length biases "
        "it (arXiv:2503.20783)."
    ),
    deviates=(
        "Under the same name TRL has no KL, divides by all tokens and clips as DAPO does; verl divides by all tokens. The "
        "defaults here are the paper's."
    ),
)
def grpo(
    num_generations: int = 8,
    beta: float = 0.04,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    scale_rewards: Literal["group", "none"] = "group",
    average: Average = "sequences",
    max_completion_length: int | None = None,
    num_iterations: int = 1,
    minibatches: int = 1,
    dynamic_sampling: int = 1,
    dual_clip: float | None = None,
    off_policy_correction: Correction = "none",
    correction_cap: float = 2.0,
    correction_lowest: float = 0.5,
) -> Method:
    """GRPO: each completion against the others of its group.

    Loss (logged): mean over sequences of the mean over tokens of max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon_high))
    + beta k3, with A = (R - group mean) / (group std + 1e-6), std with n - 1, and r = pi / pi_old.
    Weight on grad log pi: gate r A / (T_i N) for the policy term, beta (ref / pi - 1) / (T_i N) for the KL term.

    beta: the coefficient of the KL, 0.04 in the paper; 0 turns it off (no reference is kept then). epsilon_high: DAPO's upper
    bound; equal to epsilon by default. scale_rewards: "group" divides A by the group's std, "none" only centres (Dr. GRPO).
    average: what the loss is divided by: "sequences" is the paper's; "tokens" divides by all tokens of the step (DAPO); "constant"
    by sequences times max_completion_length (Dr. GRPO). max_completion_length: the constant of average "constant".
    dynamic_sampling: up to that many draws per step to replace groups whose rewards are all equal (1: keep them, as the paper
    does). dual_clip: for A < 0 the loss is at most -dual_clip A. off_policy_correction: what the policy term is multiplied with,
    without gradient, where the sampler's probabilities differ from the trainer's, w = pi_old / pi_sampler: "truncate" min(w,
    correction_cap) (TIS); "mask" w within [correction_lowest, correction_cap] and 0 outside (IcePop; 0.5 and 5 there);
    "sequence_mask" the product over a sequence, 0 above the cap (TRL; 3 there). In one process w is 1 but for rounding.
    correction_cap, correction_lowest: the bounds of `off_policy_correction`; 2 is verl's cap.

    With one update per batch r = 1 and the clip is inert. TRL's GRPO differs in its defaults: beta 0, DAPO's token average, and a
    KL term multiplied by r (use_bias_correction_kl).
    """
    _check(beta, scale_rewards, average, max_completion_length)
    _check_correction(off_policy_correction, correction_cap, correction_lowest)
    clip(epsilon=epsilon, high=epsilon_high, dual_clip=dual_clip)
    at_least(1, dynamic_sampling=dynamic_sampling)
    if dynamic_sampling > 1:
        several(num_generations, EQUAL)
    if scale_rewards == "none":
        several(num_generations, "a single completion is its group's mean, and its advantage always 0")
    high = epsilon if epsilon_high is None else epsilon_high
    normalise = seq_mean if average == "sequences" else token_sum
    per = {
        "sequences": Per(("sequences",)),
        "tokens": Per(("own_tokens",)),
        "constant": Per(("sequences",), constant=float(max_completion_length or 1)),
    }[average]
    on, weight = by(Source.POLICY), None
    if off_policy_correction != "none":
        weight = correction(off_policy_correction, correction_cap, correction_lowest)
    terms: list[Term] = [
        clipped(
            "rl",
            epsilon,
            high,
            on=on,
            per=per,
            dual=dual_clip,
            corrected=weight,
            normalise=normalise,
            needs=frozenset() if weight is None else frozenset({"behaviour_logp"}),
            describe="max(-A r, -A clip(r)), r = pi / old" + ("" if weight is None else ", times w"),
        )
    ]
    if beta > 0:
        terms.append(kl("kl", on=on, per=per, normalise=normalise, coef=beta))
    return Method(
        terms=tuple(terms),
        plan=rollouts(num_generations, max_draws=dynamic_sampling),
        select=drop_equally_right if dynamic_sampling > 1 else keep,
        advantage=group_normalised if scale_rewards == "group" else centred,
        updates=Updates(num_iterations, minibatches),
        reference="stage_start",
    )


@method(paper="arXiv:2503.20783", family="reinforcement learning")
def dr_grpo(
    num_generations: int = 8, max_completion_length: int = 3000, epsilon: float = 0.2, num_iterations: int = 1
) -> Method:
    """Dr. GRPO: GRPO without the two biases, no std and no division by a sequence's own length.

    Loss: `grpo` with beta 0, scale_rewards "none" and average "constant": sum over tokens / (sequences * max_completion_length).
    Weight on grad log pi: gate r A / (N max_completion_length), A = R - group mean.

    max_completion_length: the constant, 3000 in the authors' script; set it to your own token limit.
    """
    return grpo(
        num_generations=num_generations,
        beta=0.0,
        epsilon=epsilon,
        scale_rewards="none",
        average="constant",
        max_completion_length=max_completion_length,
        num_iterations=num_iterations,
    )


@method(
    paper="arXiv:2503.14476",
    family="reinforcement learning",
    deviates=(
        "The authors' scripts also set a dual clip of 10, which is off here; they draw three times as many prompts as a step has, "
        "and stop with an error when ten draws were not enough, where a step here trains on what it has."
    ),
)
def dapo(
    num_generations: int = 16,
    epsilon: float = 0.2,
    epsilon_high: float = 0.28,
    dynamic_sampling: int = 10,
    num_iterations: int = 1,
    minibatches: int = 16,
) -> Method:
    """DAPO: GRPO with a higher upper clip, a token average, no KL, and resampling of groups whose rewards are all equal.

    Loss: `grpo` with epsilon_high 0.28, average "tokens", beta 0 and up to 10 draws. Weight on grad log pi: gate r A / N, N all
    tokens of the step.

    epsilon_high: the paper's, so that unlikely tokens can rise. minibatches: the paper's 512 prompts in mini-batches of 32.
    dynamic_sampling: draws per step at most, the authors' 10; with 1 groups of equal rewards stay.

    The overlong punishment is the recipe's: `sampling: {truncated: penalise, truncation_penalty: 1.0, overlong_buffer: 4096}`. As
    in the authors' code, which groups are dropped is decided by rewards without it.
    """
    return grpo(
        num_generations=num_generations,
        beta=0.0,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        average="tokens",
        num_iterations=num_iterations,
        minibatches=minibatches,
        dynamic_sampling=dynamic_sampling,
    )


def _check(beta: float, scale_rewards: str, average: str, max_completion_length: int | None) -> None:
    if beta < 0:
        raise ValueError(f"beta: got {beta}; it must be 0 (no KL) or positive")
    if scale_rewards not in ("group", "none"):
        raise ValueError(f"scale_rewards: got {scale_rewards!r}; allowed: group, none")
    if average not in ("sequences", "tokens", "constant"):
        raise ValueError(f"average: got {average!r}; allowed: sequences, tokens, constant")
    if (average == "constant") != (max_completion_length is not None):
        raise ValueError(
            f"max_completion_length: got {max_completion_length} with average {average!r}; "
            "average 'constant' needs it and no other average uses it"
        )
    if max_completion_length is not None:
        at_least(1, max_completion_length=max_completion_length)


def _check_correction(kind: str, cap: float, lowest: float) -> None:
    if kind not in ("none", "truncate", "mask", "sequence_mask"):
        raise ValueError(f"off_policy_correction: got {kind!r}; allowed: none, truncate, mask, sequence_mask")
    if not cap > 0:
        raise ValueError(f"correction_cap: got {cap}; it must be positive")
    if not 0 <= lowest < cap:
        raise ValueError(f"correction_lowest: got {lowest}; it must be 0 or more, and below correction_cap = {cap:g}")
    if kind == "none":
        inert("off_policy_correction is 'none'", correction_cap=(cap, 2.0))
    if kind != "mask":
        inert(f"off_policy_correction is {kind!r}", correction_lowest=(lowest, 0.5))
