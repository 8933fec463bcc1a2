"""What `crosstrain explain --batch` is given: log-probs and rewards of a batch in a JSON file, read and checked.

    {"step": 0, "groups": [{"trajectories": [
        {"source": ["prompt", "policy", "policy"], "reward": 1.0, "logp": [0, -0.5, -1.2], "old_logp": [0, -0.6, -1.2]}]}]}

Every list of a trajectory has one entry per token; what stands at prompt tokens is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from crosstrain.errors import UserError
from crosstrain.types import Example, Group, Source, Trajectory

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
"""Numbers are numbers: neither "1.0" nor true is one. A whole number may stand for any."""

Numbers = list[float]

LARGEST = torch.finfo(torch.float32).max
"""Of a reward: training keeps rewards in fp32."""


def _some(things: str) -> AfterValidator:
    """A check that a list is not empty."""

    def check(value: list[Any]) -> list[Any]:
        if not value:
            raise ValueError(f"got an empty list; give at least one {things}")
        return value

    return AfterValidator(check)


class GivenTrajectory(BaseModel):
    """One sequence: who wrote each token, and what is known of it."""

    model_config = STRICT
    source: Annotated[list[Literal["prompt", "expert", "policy", "tool"]], _some("token's author")]
    logp: Numbers
    reward: float | None = None
    finished: bool = True
    greedy: bool = False
    replayed: bool = False
    old_logp: Numbers | None = None
    ref_logp: Numbers | None = None
    behaviour_logp: Numbers | None = None
    teacher_logp: Numbers | None = None
    entropy: Numbers | None = None
    value: Numbers | None = None
    old_value: Numbers | None = None


class GivenGroup(BaseModel):
    """The trajectories of one example."""

    model_config = STRICT
    id: str | None = None
    stream: str = "train"
    trajectories: Annotated[list[GivenTrajectory], _some("trajectory")]


class GivenBatch(BaseModel):
    """What an optimizer step is given. step: optimizer steps taken before it. state: the method's, where it is not the first."""

    model_config = STRICT
    step: int = Field(0, ge=0)
    state: dict[str, Any] | None = None
    groups: Annotated[list[GivenGroup], _some("group")]


LOG_PROBS = ("logp", "old_logp", "ref_logp", "behaviour_logp", "teacher_logp")
"""Lists of numbers that are at most 0."""

PER_TOKEN = (*LOG_PROBS[1:], "entropy", "value", "old_value")
"""Lists that a trajectory may bring beside `logp`. `value` is that of the state before each token; a reward model reads the last
of an expert's as the answer's reward."""

OLD = frozenset({"old_logp", "old_value"})
"""What is the current policy's where it is not given: one inner update."""


def to_group(index: int, given: GivenGroup) -> Group:
    """The group, its trajectories numbered by `policy_version`; UserError for lists of the wrong length, for rewards out of reach,
    and for trajectories without an answer."""
    trajectories = []
    for k, t in enumerate(given.trajectories):
        where = f"groups.{index}.trajectories.{k}"
        for name in ("logp", *PER_TOKEN):
            values = getattr(t, name)
            if values is not None and len(values) != len(t.source):
                raise UserError(
                    f"{where}.{name}: got {len(values)} numbers for {len(t.source)} tokens; give one per entry of `source`"
                )
        if t.reward is not None and abs(t.reward) > LARGEST:
            raise UserError(
                f"{where}.reward: got {t.reward:g}; a reward is from {-LARGEST:.3g} to {LARGEST:.3g}, as training has it in "
                "32 bits: scale the rewards down"
            )
        source = tuple(Source[s.upper()] for s in t.source)
        if source[0] != Source.PROMPT:
            raise UserError(
                f"{where}.source.0: got {t.source[0]!r}; the first token is one of the prompt's, which nothing predicts: put "
                "'prompt' before it, and a 0 before the numbers of every other list"
            )
        if set(source) == {Source.PROMPT}:
            raise UserError(f"{where}.source: nothing comes after the prompt; name the authors of the answer's tokens, too")
        # the version says which trajectory this is, whatever select makes of the group; no two texts, and no two prompts, are alike
        tokens = tuple(index * 10**9 + i + (0 if s == Source.PROMPT else (k + 1) * 10**5) for i, s in enumerate(source))
        kept = {"reward": t.reward, "finished": t.finished, "greedy": t.greedy, "replayed": t.replayed}
        trajectories.append(Trajectory(tokens, source, **kept, policy_version=k))
    expert = tuple(t for t in trajectories if demonstrated(t))
    prompt = trajectories[0].tokens[: trajectories[0].response_start]
    return Group(Example(given.id or str(index), "", prompt, expert), tuple(trajectories), given.stream)


def demonstrated(t: Trajectory) -> bool:
    """Whether it is the data's own answer: an expert's, with nothing that the policy wrote."""
    return t.wrote(Source.EXPERT) and not t.wrote(Source.POLICY)


def check_signs(index: int, given: GivenGroup, group: Group) -> None:
    """UserError for log-probs above 0 and entropies below, wherever a token may be trained on."""
    for k, (t, made) in enumerate(zip(given.trajectories, group.trajectories, strict=True)):
        read = [i for i, s in enumerate(made.source) if s != Source.PROMPT]
        for name in (*LOG_PROBS, "entropy"):
            values, sign = getattr(t, name) or [], -1 if name == "entropy" else 1
            slack = 1e-6 if name == "entropy" else 0.0  # which rounding may leave below 0
            wrong = next((i for i in read if values and sign * values[i] > slack), None)
            if wrong is not None:
                bound = "an entropy is at least 0" if name == "entropy" else "a log-prob is at most 0"
                raise UserError(f"groups.{index}.trajectories.{k}.{name}.{wrong}: got {values[wrong]}; {bound}")
