"""SDFT: the model itself, with the demonstration in its prompt, is the teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from crosstrain.methods.plans import rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.denominators import old
from crosstrain.objective.divergences import at_the_target, generalised_jsd, on_top_k
from crosstrain.objective.terms import by, seq_mean
from crosstrain.types import (
    Batch,
    Comparison,
    Divergence,
    Method,
    Per,
    Scores,
    Source,
    Term,
    Updates,
    Weights,
)

Mode = Literal["full_logits", "topk_logits", "sampled_token"]


SHOWN = "demonstration"
"""The context that the teacher reads."""


@method(
    paper="arXiv:2601.19897",
    family="distillation",
    checked="port",
    works="Learning a new skill or new facts from demonstrations with less forgotten than by SFT; the more, the better the model "
    "learns from its prompt (arXiv:2601.19897).",
    fails="Small models, which learn little from a demonstration in their prompt (arXiv:2601.19897).",
    deviates="Written from TRL's trainer, copies of the authors' code and what they say of it. The paper's first text has a "
    "reverse KL (alpha 1); the authors say that its results were made with the forward one (alpha 0), and one answer to a prompt. "
    "Copies of their script leave the first 3 tokens without a loss. TRL's defaults are alpha 0.5 on the 100 most likely tokens, a "
    "teacher with the start's weights, and a rate of 0.05. The template is TRL's, without the words that the authors put around "
    "the demonstration.",
)
def sdft(
    num_generations: int = 1,
    distillation_alpha: float = 0.0,
    distillation_mode: Mode = "full_logits",
    distillation_topk: int | None = None,
    distillation_add_tail: bool = False,
    distillation_is_clip: float = 2.0,
    num_loss_tokens_to_skip: int = 0,
    teacher_model_kind: Literal["ema", "base", "live"] = "ema",
    teacher_update_rate: float | None = None,
    teacher_prompt_template: str = "{prompt}\n\n{privileged_context}",
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """SDFT (self-distillation fine-tuning): own answers, towards what the model says of them with the demonstration before it.

    Loss: mean over own completions of the mean over their tokens of w D(q, pi), pi the policy at the plain prompt, q the same
    model with the demonstration in its prompt, without gradient. D is `gkd`'s divergence with beta = distillation_alpha, and w
    = min(pi / pi_old, distillation_is_clip) of the token, without gradient: 1 with one update per batch. Weight on grad log pi:
    none, as the gradient is on all logits; in mode "sampled_token" -w (log pi - log q) / (T_i N). Both distributions are at the
    temperature of sampling, as in TRL.

    num_generations: answers to a prompt; one in the paper. distillation_alpha: which divergence it is, 0 the forward KL(q ||
    pi), the authors', 1 the reverse KL(pi || q), in between `gkd`'s mixture; 0.5 in TRL. distillation_mode: "full_logits" over
    the whole vocabulary; "topk_logits" over the policy's distillation_topk most likely tokens, TRL's default; "sampled_token"
    at the answer's own token alone: sg(log pi - log q) log pi, which needs distillation_alpha 1. distillation_topk: how many
    tokens in mode "topk_logits"; None is TRL's 100. distillation_add_tail: in that mode all other tokens count as one more;
    else the chosen ones are scaled to add up to 1. distillation_is_clip: the bound of w, TRL's. num_loss_tokens_to_skip: so
    many first tokens of an answer have no loss; an answer with no others counts among the answers all the same.
    teacher_model_kind: whose weights q has: "base", those of the stage's start (TRL's default); "live", the policy's own;
    "ema", an average that starts with the stage's and follows the policy's. teacher_update_rate: the share of the way to the
    policy's weights that this average goes after every optimizer step; None is 0.01, as one description has it (TRL: 0.05).
    teacher_prompt_template: the teacher's last user message, of {prompt}, the student's, and {privileged_context}, the words of
    the row's demonstration; TRL's.

    Completions need no reward.
    """
    divergence = _divergence(distillation_mode, distillation_alpha, distillation_topk, distillation_add_tail)
    of, rate = _teacher(teacher_model_kind, teacher_update_rate)
    _check(distillation_is_clip, num_loss_tokens_to_skip, teacher_prompt_template)

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        logp = scores.logp.detach()
        moved = logp - old(logp, batch, on)
        counted = on & (on.cumsum(dim=1) > num_loss_tokens_to_skip)
        return scores.channels["distil"] * moved.exp().clamp(max=distillation_is_clip) * seq_mean(counted, batch)

    term = Term(
        "distil",
        value,
        by(Source.POLICY),
        Per(("sequences",)),
        unit="sequence",
        needs=frozenset({"distil", "old_logp"}),
        describe=f"D(pi with the demonstration, pi), alpha = {distillation_alpha:g}, {distillation_mode}",
    )

    return Method(
        terms=(term,),
        plan=replace(rollouts(num_generations), scored=False, needs_expert="demonstration"),
        contexts={SHOWN: teacher_prompt_template.replace("{privileged_context}", "{completion}")},
        comparisons={"distil": Comparison(divergence, of=of, context=SHOWN)},
        updates=Updates(num_iterations, minibatches),
        reference="stage_start",
        average=rate,
    )


def _divergence(mode: str, alpha: float, k: int | None, tail: bool) -> Divergence:
    if mode not in ("full_logits", "topk_logits", "sampled_token"):
        raise ValueError(f"distillation_mode: got {mode!r}; allowed: full_logits, topk_logits, sampled_token")
    if not 0 <= alpha <= 1:
        raise ValueError(f"distillation_alpha: got {alpha}; it must be from 0 (forward KL) to 1 (reverse KL)")
    if mode != "topk_logits" and (k is not None or tail):
        got = f"distillation_add_tail: got {tail}" if k is None else f"distillation_topk: got {k}"
        raise ValueError(f"{got}, which has an effect in mode topk_logits alone; got distillation_mode={mode!r}")
    if mode == "sampled_token" and alpha != 1:
        raise ValueError(f"distillation_mode: sampled_token is the reverse KL: distillation_alpha must be 1; got {alpha}")
    if k is not None and k < 1:
        raise ValueError(f"distillation_topk: got {k}; it must be at least 1")
    if mode == "topk_logits":
        return on_top_k(alpha, 100 if k is None else k, tail)
    return at_the_target if mode == "sampled_token" else generalised_jsd(alpha)


def _teacher(kind: str, rate: float | None) -> tuple[Weights, float | None]:
    """Whose weights the teacher has, and how fast their average follows the policy's."""
    kinds: dict[str, Weights] = {"ema": "average", "base": "reference", "live": "current"}
    if kind not in kinds:
        raise ValueError(f"teacher_model_kind: got {kind!r}; allowed: ema, base, live")
    if kind != "ema" and rate is not None:
        raise ValueError(f"teacher_update_rate has an effect on an average alone; got teacher_model_kind={kind!r}")
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(
            f"teacher_update_rate: got {rate}; it must be above 0 (the start's weights) and at most 1 (the policy's)"
        )
    return kinds[kind], (0.01 if rate is None else rate) if kind == "ema" else None


def _check(clip: float, skip: int, template: str) -> None:
    if clip <= 0:
        raise ValueError(f"distillation_is_clip: got {clip}; it must be positive")
    if skip < 0:
        raise ValueError(f"num_loss_tokens_to_skip: got {skip}; it must be at least 0")
    for part in ("{prompt}", "{privileged_context}"):
        if part not in template:
            raise ValueError(f"teacher_prompt_template: got {template!r}; it must contain {part}")
