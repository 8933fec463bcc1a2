"""Reward models from preferences: a scalar head that scores a whole answer."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from crosstrain.errors import UserError
from crosstrain.methods.registry import method
from crosstrain.types import Batch, Example, Method, Per, Plan, Scores, Source, State, Term, Trajectory


@method(
    paper="arXiv:2203.02155",
    family="preference",
    checked="port",
    fails="Optimised against for long, its reward goes on rising while true quality falls (arXiv:2210.10760).",
    deviates="The paper compares all pairs of up to nine ranked answers; here, as in TRL, a row is one pair.",
)
def reward_model(center_rewards_coefficient: float = 0.0) -> Method:
    """Bradley-Terry reward model: the preferred answer is to have the larger reward.

    Loss: mean over pairs of -log sigmoid(r_w - r_l - margin) + center_rewards_coefficient (r_w + r_l)^2, r the value head's
    output after an answer's last token, margin the row's column of that name (0 or more), or 0. Weight on grad log pi: 0, as no
    log-prob is read; the gradient goes through r, by -+ sigmoid(-(r_w - r_l - margin)) + 2 center_rewards_coefficient (r_w +
    r_l), over the number of pairs.

    center_rewards_coefficient: keeps rewards near 0 (arXiv:2312.09244); off in TRL, which recommends 0.01.

    What such a run leaves is a sequence classifier with one label, which transformers loads, and which a recipe may name under
    `rewards`; its language model answers nothing any more, so it is not evaluated.
    """
    if center_rewards_coefficient < 0:
        raise ValueError(f"center_rewards_coefficient: got {center_rewards_coefficient}; it must be 0 or positive")

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        reward = scores.channels["value"].sum(dim=1)
        better, worse = batch.pairs()
        margin = (batch.reward[better] - batch.reward[worse] - 1).to(reward)
        loss = -F.logsigmoid(reward[better] - reward[worse] - margin)
        return loss + center_rewards_coefficient * (reward[better] + reward[worse]) ** 2

    more = f" + {center_rewards_coefficient:g} (r_w + r_l)^2" if center_rewards_coefficient > 0 else ""
    term = Term(
        "preference",
        value,
        last_token,
        Per(("pairs",)),
        unit="group",
        needs=frozenset({"value"}),
        describe="-log sigmoid(r_w - r_l - margin)" + more,
    )
    return Method(terms=(term,), plan=Plan(start=read_at_the_end, needs_expert="pair"), saves="reward model")


def last_token(batch: Batch) -> Tensor:
    """[B, T] bool: the last trained token of each row that an expert wrote."""
    written = batch.written_by(Source.EXPERT)
    return written & (written.flip(1).cumsum(1).flip(1) == 1)


def read_at_the_end(example: Example, state: State) -> tuple[Trajectory, ...]:
    """Both answers with one token more, the only one to be trained: the value of the state before it is that after the answer.

    Which token it is changes nothing, since nothing comes after it and its log-prob is not read. The margin is in the labels:
    1 + margin for the better answer, 0 for the worse.
    """
    margin = example.columns.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin) or margin < 0:
        raise UserError(f"{example.where}: margin must be a number of 0 or more; got {margin!r}")

    def ended(t: Trajectory) -> Trajectory:
        source = (Source.PROMPT,) * len(t.tokens) + (Source.EXPERT,)
        label = None if t.reward is None else t.reward * (1.0 + margin)
        return replace(t, tokens=(*t.tokens, t.tokens[-1]), source=source, reward=label, behaviour_logp=())

    return tuple(map(ended, example.expert))
