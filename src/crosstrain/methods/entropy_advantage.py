"""GRPO with an advantage that is larger where the policy was uncertain."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from crosstrain.methods.grpo import grpo
from crosstrain.methods.registry import method
from crosstrain.objective.returns import shaped_by_entropy
from crosstrain.objective.words import says, words_of
from crosstrain.types import Batch, Look, Method

ENTROPY = "sampled_entropy"
"""The column of the entropy that the policy had when it sampled."""


@method(
    paper="arXiv:2506.14758",
    family="reinforcement learning",
    checked="paper",
    works="Raised pass@k for large k on competition mathematics over the same GRPO and PPO without it, with Qwen2.5 7B models "
    "(arXiv:2506.14758).",
    fails="With Llama-3.2-3B the paper's own gains in pass@1 are small or negative (arXiv:2506.14758).",
    deviates="Entropy is that of the policy which sampled the batch, in every update on it; the authors take the current policy's. "
    "Group size and number of updates are GRPO's here, not the authors'.",
)
def entropy_advantage(
    num_generations: int = 8,
    alpha: float = 0.4,
    kappa: float = 2.0,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float = 0.28,
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """Entropy-shaped advantage: GRPO with A + min(alpha H, |A| / kappa) for A, H the entropy of each token's distribution.

    Loss (logged): max(-A' r, -A' clip(r, 1 - epsilon, 1 + epsilon_high)) over all tokens of the step, r = pi / pi_old, A' the
    shaped advantage, without gradient. Weight on grad log pi: gate r A' / N. An uncertain token of a right answer is raised more,
    one of a wrong answer lowered less, and no sign turns. With alpha 0 it would be `grpo` with average "tokens".

    alpha: how much entropy counts; 0.4 in the paper for GRPO, 0.1 for PPO. kappa: the bound on what entropy adds, as a share 1 /
    kappa of |A|; the paper's. epsilon, epsilon_high: DAPO's bounds of the clip, as in the paper's GRPO. beta: the coefficient of a
    k3 KL term, 0 for none, as in the paper.
    """
    if alpha <= 0 or kappa <= 1:
        raise ValueError(f"got alpha={alpha}, kappa={kappa}; alpha must be positive (0 is `grpo`) and kappa above 1")
    core = grpo(
        num_generations=num_generations,
        beta=beta,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        average="tokens",
        num_iterations=num_iterations,
        minibatches=minibatches,
    )

    def entropy(look: Look, batch: Batch) -> Tensor:
        return look(batch).channels["entropy"]

    @says(f"A + min({alpha:g} H, |A| / {kappa:g}), A = {words_of(core.advantage)}")
    def shaped(batch: Batch) -> Tensor:
        return shaped_by_entropy(core.advantage(batch)[:, None], batch.columns[ENTROPY], alpha, kappa)

    policy, *rest = core.terms
    return replace(
        core,
        terms=(replace(policy, needs=policy.needs | {ENTROPY}), *rest),
        advantage=shaped,
        columns={ENTROPY: entropy},
    )
