"""PPO with a critic: a value head on the policy's own hidden states, and the generalised advantage estimate."""

from __future__ import annotations

import torch
from torch import Tensor

from crosstrain.methods.checks import clip
from crosstrain.methods.plans import rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.returns import Estimator, gae, kl_penalty, token_rewards, whitened_tokens
from crosstrain.objective.terms import by, clipped, entropy_bonus, kl
from crosstrain.objective.words import says
from crosstrain.types import Batch, Look, Method, Per, Scores, Source, Term, Updates, Value

RETURNS = "returns"
"""The column of what the value head is to predict."""


@method(
    paper="arXiv:1707.06347",
    family="reinforcement learning",
    checked="port",
    works="With a critic trained beforehand, another lam for it and one by length for the policy it reached 60 points on AIME24 "
    "(VAPO, arXiv:2504.05118).",
    fails="On long chains of thought a critic that starts untrained fails: 11 points there (arXiv:2504.05118). In RLHF "
    "REINFORCE-style methods without a critic did better (arXiv:2402.14740).",
    deviates="The critic is a head on the policy's hidden states; TRL and verl train a second model. The score is added on the "
    "last own token (TRL: one place after the end token, where there is room). TRL's missing_eos_penalty is the recipe's "
    "`sampling.truncated: penalise`. Advantages are divided by std + 1e-8 (TRL, verl: the root of variance + 1e-8).",
)
def ppo(
    num_generations: int = 1,
    kl_coef: float = 0.05,
    kl_estimator: Estimator = "k1",
    kl_in_reward: bool = True,
    cliprange: float = 0.2,
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_rewards: bool = False,
    entropy_coef: float = 0.0,
    dual_clip: float | None = None,
    num_ppo_epochs: int = 4,
    num_mini_batches: int = 1,
) -> Method:
    """PPO: a clipped ratio, and a learned value that tells each token's credit.

    V(t) is the value of the state before token t, a linear head on the last hidden states. With d_t = r_t + gamma V_old(t+1) -
    V_old(t), where r_t = -kl_coef KL_t, and on the last own token the reward as well,
        G_t = sum over k of (gamma lam)^k d_{t+k}    (GAE, arXiv:1506.02438)
    R = G + V_old is what the head is to predict, and A is G normalised over all own tokens of the step.

    Loss (logged), averaged over all own tokens of an update, with r = pi / pi_old:
        max(-A r, -A clip(r, 1 - cliprange, 1 + cliprange))
        + vf_coef / 2 max((V - R)^2, (clip(V, V_old - cliprange_value, V_old + cliprange_value) - R)^2)
    Weight on grad log pi: gate r A / N; on grad V: vf_coef (R - V) / N, 0 where V left the clip and the clipped loss is the larger.

    kl_coef: the coefficient of the KL to the reference; 0 turns it off. kl_estimator: how KL_t is estimated from d = log pi - log
    ref: "k1" d, "k2" d^2 / 2, "k3" exp(-d) - 1 + d. kl_in_reward: True takes the KL of the policy that sampled off the reward;
    False makes the KL a loss of its own, kl_coef times kl_estimator (k1 has no expected gradient there). cliprange: how far below
    and above 1 the ratio may be. cliprange_value: how far V may be from V_old; 0 does not clip. vf_coef: how much the critic's loss
    counts, and so how much it moves the language model that both share. gamma: the discount. lam: GAE's lambda; 1 sums up all that
    follows, 0 looks one token ahead. whiten_rewards: True divides r_t by its std over the step, its mean kept. entropy_coef: the
    coefficient of the paper's entropy bonus, 0 for none. dual_clip: for A < 0 the loss is at most -dual_clip A (verl: 3).
    num_ppo_epochs: passes over what was collected. num_mini_batches: optimizer steps that a pass is cut into, by group.

    Names and defaults are those of TRL's PPOConfig. The stage's `value_learning_rate` says how fast the head itself learns. Tokens
    that a tool or a user wrote inside a response are skipped: own tokens around them are neighbours. A response that was cut ends
    like any other, with a value of 0 after it.
    """
    _check(kl_coef, kl_estimator, kl_in_reward, cliprange_value, vf_coef, gamma, lam, entropy_coef)
    clip(cliprange=cliprange, dual_clip=dual_clip)
    on, per = by(Source.POLICY), Per(("own_tokens",))
    in_reward = kl_in_reward and kl_coef > 0

    def returns(look: Look, batch: Batch) -> Tensor:
        penalty = kl_penalty(look, batch, kl_coef, kl_estimator) if in_reward else None
        rewards = token_rewards(batch, penalty=penalty)
        if whiten_rewards:
            rewards = whitened_tokens(batch, rewards, shift_mean=False)
        old = batch.columns["old_value"]
        estimate = gae(batch, rewards, old, gamma=gamma, lam=lam)
        return (estimate + old.to(estimate)).to(old)

    @says("GAE less its mean, by its standard deviation, both over the own tokens of the step")
    def credit(batch: Batch) -> Tensor:
        return whitened_tokens(batch, batch.columns[RETURNS] - batch.columns["old_value"])

    terms: list[Term] = [
        clipped(
            "rl",
            cliprange,
            cliprange,
            on=on,
            per=per,
            dual=dual_clip,
            needs=frozenset({"ref_logp"}) if in_reward else frozenset(),
        ),
        Term(
            "value",
            value_loss(cliprange_value),
            on,
            per,
            vf_coef,
            needs=frozenset({"value", "old_value", RETURNS}),
            describe="max((V - R)^2, (clip(V) - R)^2) / 2" if cliprange_value > 0 else "(V - R)^2 / 2",
        ),
    ]
    if kl_coef > 0 and not kl_in_reward:
        terms.append(kl("kl", on=on, per=per, estimator=kl_estimator, coef=kl_coef))
    if entropy_coef > 0:
        terms.append(entropy_bonus("entropy", on=on, per=per, coef=entropy_coef))
    return Method(
        terms=tuple(terms),
        plan=rollouts(num_generations),
        advantage=credit,
        credits="step",
        updates=Updates(num_ppo_epochs, num_mini_batches),
        columns={RETURNS: returns},
        reference="stage_start",
    )


def value_loss(cliprange_value: float) -> Value:
    """max((V - R)^2, (clip(V) - R)^2) / 2 per token, [B, T], clip(V) within cliprange_value of V_old; 0: (V - R)^2 / 2."""

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        now = scores.channels["value"]
        target = batch.columns[RETURNS].to(now)
        loss = (now - target) ** 2
        if cliprange_value > 0:
            old = batch.columns["old_value"].to(now)
            near = now.clamp(old - cliprange_value, old + cliprange_value)
            loss = torch.maximum(loss, (near - target) ** 2)
        return loss / 2

    return value


def _check(
    kl_coef: float,
    kl_estimator: str,
    kl_in_reward: bool,
    cliprange_value: float,
    vf_coef: float,
    gamma: float,
    lam: float,
    entropy_coef: float,
) -> None:
    if kl_coef < 0 or entropy_coef < 0:
        raise ValueError(f"got kl_coef={kl_coef}, entropy_coef={entropy_coef}; both must be 0 or positive")
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"kl_estimator: got {kl_estimator!r}; allowed: k1, k2, k3")
    if kl_coef == 0 and (kl_estimator != "k1" or not kl_in_reward):
        raise ValueError(f"kl_coef is 0, so kl_estimator={kl_estimator!r} and kl_in_reward={kl_in_reward} have no effect")
    if vf_coef <= 0:
        raise ValueError(f"vf_coef: got {vf_coef}; it must be positive, or the critic would never learn")
    if cliprange_value < 0:
        raise ValueError(f"cliprange_value: got {cliprange_value}; it must be positive, or 0 for no clip")
    if not (0 < gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"got gamma={gamma}, lam={lam}; gamma must be in (0, 1] and lam in [0, 1]")
