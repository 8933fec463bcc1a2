"""GEM and OTR: supervised fine-tuning that looks at the whole next-token distribution."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crosstrain.methods.plans import demonstrations
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import ones
from crosstrain.objective.terms import by, of_channel
from crosstrain.types import Channel, Method, Per, Source


@method(
    paper="arXiv:2408.16673",
    family="supervised",
    deviates="Averaged over the tokens of the step; the authors' code averages over those of a micro-batch. Later copies of "
    "their script take h linear.",
)
def gem(beta: float = 0.7, h: Literal["logsigmoid", "linear"] = "logsigmoid") -> Method:
    """GEM: imitation that keeps the distribution broad.

    Loss: sum_t of -sum_v q_v w_v (log pi(y_t) - log pi(v)) over the vocabulary, divided by all supervised tokens, with
    q = sg(softmax(z / beta)), z the logits, and w_v = 1 (h "linear") or sg(sigmoid(0.01 (z_v - z_y))) ("logsigmoid").

    Weight: a gradient on logits, not on log pi(y_t) alone; with h "linear" it is softmax(z / beta) - onehot(y_t): beta times
    cross-entropy at temperature beta.

    beta: the temperature of q, 0.7 in the authors' code; near 1 it is plain imitation's gradient. h: the form of w_v, by default
    the authors'.
    """
    if beta <= 0:
        raise ValueError(f"beta: got {beta}; it must be positive")
    if h not in ("logsigmoid", "linear"):
        raise ValueError(f"h: got {h!r}; allowed: logsigmoid, linear")
    name = f"gem_{h}_{beta:g}"
    term = of_channel(
        "demo",
        name,
        on=by(Source.EXPERT),
        per=Per(("own_tokens",)),
        describe=f"-sum_v q_v w_v (log pi(y) - log pi(v)), q = softmax(z / {beta:g})",
    )
    return Method(terms=(term,), plan=demonstrations(), advantage=ones, channels={name: _gem(beta, h == "linear")})


@method(
    paper="arXiv:2509.26313",
    family="supervised",
    checked="reconstructed",
    deviates=(
        "Reconstructed from descriptions: no code of the authors was found, and both settings are unconfirmed. The paper "
        "draws tokens at every position; this is what their mean tends to."
    ),
)
def otr(beta: float = -0.1, temperature: float = 1.3) -> Method:
    """OTR (one-token rollout), in expectation: at every position of the demonstration, one token of its own is rewarded.

    Loss: -sum_v q_v R_v log pi(v) over the vocabulary, averaged over all supervised tokens, with q = sg(softmax(z /
    temperature)), z the logits, R = 1 for the demonstration's token and beta for any other.

    Weight: on the whole distribution; at temperature 1 it is (1 - beta) p_t on grad log pi(y_t): `dft` times a constant.

    beta: the reward of a wrong token; -0.1 is unconfirmed. temperature: that at which the token is drawn; 1.3 is unconfirmed.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}; it must be positive")
    if beta >= 1:
        raise ValueError(f"beta: got {beta}; it must be below 1, the right token's reward")
    name = f"otr_{temperature:g}_{beta:g}"

    def channel(logits: Tensor, targets: Tensor) -> Tensor:
        logp, q = torch.log_softmax(logits, dim=-1), torch.softmax(logits.detach() / temperature, dim=-1)
        at = targets[:, None]
        right = (q.gather(1, at) * logp.gather(1, at))[:, 0]
        return -(1 - beta) * right - beta * (q * logp).sum(dim=-1)

    term = of_channel(
        "demo",
        name,
        on=by(Source.EXPERT),
        per=Per(("own_tokens",)),
        describe=f"-sum_v q_v R_v log pi(v), R = 1 for y, {beta:g} for others, q = softmax(z / {temperature:g})",
    )
    return Method(terms=(term,), plan=demonstrations(), advantage=ones, channels={name: channel})


def _gem(beta: float, linear: bool) -> Channel:
    def channel(logits: Tensor, targets: Tensor) -> Tensor:
        at = targets[:, None]
        logp = torch.log_softmax(logits, dim=-1)
        with torch.no_grad():
            weight = torch.softmax(logits / beta, dim=-1)
            if not linear:
                weight = weight * torch.sigmoid(0.01 * (logits - logits.gather(1, at)))
        return (weight * logp).sum(dim=-1) - weight.sum(dim=-1) * logp.gather(1, at)[:, 0]

    return channel
