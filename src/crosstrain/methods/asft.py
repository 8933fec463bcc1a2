"""ASFT: imitation weighted by the token's own probability, anchored to where it started."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from crosstrain.methods.plans import demonstrations
from crosstrain.methods.registry import method
from crosstrain.methods.sft import dft, sft
from crosstrain.objective.advantages import ones
from crosstrain.objective.divergences import forward_kl, reverse_kl
from crosstrain.objective.terms import by, of_channel
from crosstrain.types import Comparison, Method, Per, Source


@method(
    paper="arXiv:2509.23753",
    family="supervised",
    works="Where DFT drifts, as on medical questions; there it is ahead of both SFT and DFT (arXiv:2509.23753).",
    deviates="The direction of the KL is that of the authors' code; what the paper's text says could not be established. Their "
    "code averages over a micro-batch, this over the step.",
)
def asft(
    kl_weight: float = 0.1, mode: Literal["asft", "sft+kl"] = "asft", direction: Literal["forward", "reverse"] = "forward"
) -> Method:
    """ASFT (anchored supervised fine-tuning): `dft`, kept near the model that it started from.

    Loss: -sum_t sg(p_t) log p_t / N + kl_weight sum_t KL(ref || pi) / N over all N supervised tokens, the KL over the
    vocabulary at every token, ref the model that the stage started from (with LoRA in a first stage the adapter off). Weight on
    grad log pi: p_t / N from the first part; the KL has a gradient on all logits, kl_weight (pi - ref) / N.

    kl_weight: how much the KL counts, 0.1 in the authors' code, 0.05 in their example. mode: "asft" is the loss above; "sft+kl"
    has plain cross-entropy in place of DFT's, a weight of 1 / N (the authors' other modes are the methods `sft` and `dft`).
    direction: "forward" is KL(ref || pi), as their code has it, "reverse" KL(pi || ref).
    """
    if mode not in ("asft", "sft+kl"):
        raise ValueError(f"mode: got {mode!r}; allowed: asft, sft+kl (without a KL, use the method `sft` or `dft`)")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction: got {direction!r}; allowed: forward, reverse")
    if kl_weight <= 0:
        raise ValueError(f"kl_weight: got {kl_weight}; it must be positive (without a KL, use the method `sft` or `dft`)")
    base = dft() if mode == "asft" else sft()
    between = "KL(ref || pi)" if direction == "forward" else "KL(pi || ref)"
    anchor = of_channel(
        "anchor",
        "kl",
        on=by(Source.EXPERT),
        per=Per(("own_tokens",)),
        coef=kl_weight,
        describe=f"{between} over the vocabulary",
    )
    return replace(
        base,
        terms=(*base.terms, anchor),
        plan=demonstrations(),
        advantage=ones,
        reference="stage_start",
        comparisons={"kl": Comparison(forward_kl if direction == "forward" else reverse_kl, of="reference")},
    )
