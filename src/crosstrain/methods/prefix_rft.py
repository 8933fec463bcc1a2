"""Prefix-RFT: one rollout of a group goes on from a part of the demonstration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosstrain.methods.checks import at_least, clip, several
from crosstrain.methods.plans import keyed_uniforms, told
from crosstrain.methods.registry import method
from crosstrain.methods.uft import next_step, nothing
from crosstrain.objective.advantages import centred_on
from crosstrain.objective.schedules import cosine
from crosstrain.objective.terms import by, clipped
from crosstrain.objective.words import says
from crosstrain.types import Batch, Group, Look, Method, Per, Plan, Request, Source, State, Updates

TAUGHT = "taught"
"""The column that says which tokens of a prefix are trained on: 1, else 0."""


@method(
    paper="arXiv:2507.01679",
    family="hybrid",
    works=(
        "Scored 51.8 on average where the same training with the prefix frozen scored 45.4; it needed only 1 to 10 "
        "percent of the demonstrations (arXiv:2507.01679)."
    ),
    fails="With all tokens of the prefix trained on it scored 45.7, and answers grew long (arXiv:2507.01679).",
    deviates=(
        "The settings of the authors' runs are not in their repository: averaging, bounds and schedule are those of an "
        "engineering note made with them. Entropies are ranked over the whole step with the policy that sampled it; there, over a "
        "micro-batch with the current one. There, a micro-batch's sum is divided by the length alone, losses of A < 0 are bounded "
        "by 3 |A| (dual clip), and there is an entropy bonus of 0.001. A plain rollout that is alone in its group gets 0, "
        "there its reward."
    ),
)
def prefix_rft(
    num_generations: int = 8,
    entropy_share: float = 0.2,
    longest: float = 0.95,
    shortest: float = 0.05,
    decay_steps: int = 500,
    epsilon: float = 0.2,
    max_completion_length: int = 8192,
    num_iterations: int = 1,
    minibatches: int = 2,
) -> Method:
    """Prefix-RFT: explore from a prefix of the demonstration, and imitate the prefix as far as the exploration succeeded.

    Of a group's rollouts one starts from the first share l of the demonstration, l uniform between a bound that falls from
    `longest` to `shortest` along half a cosine over decay_steps steps, and `longest`.

    Loss: PPO's clipped loss, r = pi / pi_old, summed over all tokens and divided by sequences times max_completion_length (Dr.
    GRPO), with the advantages
        plain rollouts            R - mean R of the plain rollouts
        continuation of a prefix  R, since it is alone in its group
        prefix                    R - mean R of the plain rollouts, on the entropy_share of the step's prefix tokens on which the
                                  policy is least sure, 0 on the others
    Weight on grad log pi: gate r A / (sequences max_completion_length).

    entropy_share: the share of prefix tokens that are trained on, rounded up, 0.2 in the paper. longest, shortest: bounds of
    the share of the demonstration that is shown, 0.95 and 0.05 in the paper. decay_steps: steps over which the bound falls; 500
    in the paper, its whole training. max_completion_length: the constant that sums are divided by; set it to your own token
    limit.
    """
    several(num_generations, "one rollout has a prefix")
    if not 0 < entropy_share <= 1:
        raise ValueError(f"entropy_share: got {entropy_share}; it must be in (0, 1]")
    if not 0 <= shortest <= longest < 1:
        raise ValueError(f"got shortest={shortest}, longest={longest}; they must be in [0, 1), shortest not above longest")
    at_least(1, max_completion_length=max_completion_length, decay_steps=decay_steps)
    clip(epsilon=epsilon)
    bound = cosine(longest, shortest, decay_steps)

    def following(group: Group, state: State) -> Sequence[Request]:
        if group.trajectories:
            return ()
        low = bound(int(state["step"]))
        [u] = keyed_uniforms(1, "prefix_rft", state.get("seed", 0), group.example.id, state["step"])
        answer = told(group.example)
        length = min(max(int((low + u * (longest - low)) * len(answer)), 1), len(answer) - 1)
        return (Request(num_generations - 1), Request(1, answer[:length])) if length else (Request(num_generations),)

    def least_sure(look: Look, batch: Batch) -> Tensor:
        entropy, prefix = look(batch).channels["entropy"], batch.written_by(Source.EXPERT)
        n = int(prefix.sum())
        n -= int((1 - entropy_share) * n)  # the authors count what is left out
        chosen = torch.zeros_like(entropy)
        ranked = torch.where(prefix, -entropy, torch.full_like(entropy, torch.inf)).flatten().argsort(stable=True)
        chosen.view(-1)[ranked[:n]] = 1.0
        return chosen

    term = clipped(
        "rl",
        epsilon,
        epsilon,
        on=by(Source.POLICY, Source.EXPERT),
        per=Per(("sequences",), constant=float(max_completion_length)),
        needs=frozenset({TAUGHT}),
    )
    return Method(
        terms=(term,),
        plan=Plan(start=nothing, next=following, samples=True, needs_expert="demonstration"),
        advantage=by_part,
        updates=Updates(num_iterations, minibatches),
        init=lambda: {"step": 0},
        update=next_step,
        columns={TAUGHT: least_sure},
    )


@says(
    "R - mean R of the plain rollouts on these and on the least sure tokens of a prefix, R on what continues a prefix, else 0"
)
def by_part(batch: Batch) -> Tensor:
    """[B, T]: the reward less the plain rollouts' mean on their tokens and on the taught ones of a prefix, the reward itself on
    what continues a prefix, 0 elsewhere."""
    prefix = batch.source == int(Source.EXPERT)
    plain = ~prefix.any(dim=1)
    centred = centred_on(batch, plain)
    own = torch.where(plain, centred, batch.reward)[:, None].expand(prefix.shape)
    return torch.where(prefix, centred[:, None] * batch.columns[TAUGHT].to(centred.dtype), own)
