"""What `crosstrain explain --batch` is given: log-probs and rewards of a batch in a JSON file, read and checked.

    {"step": 0, "groups": [{"trajectories": [
        {"source": ["prompt", "policy", "policy"], "reward": 1.0, "logp": [0, -0.5, -1.2], "old_logp": [0, -0.6, -1.2]}]}]}

Every list of a trajectory has one entry per token; what stands at prompt tokens is ignored.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from crosstrain.errors import UserError
from crosstrain.types import Example, Group, Source, Trajectory

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Numbers = list[float]


class GivenTrajectory(BaseModel):
    """One sequence: who wrote each token, and what is known of it."""

    model_config = STRICT
    source: list[Literal["prompt", "expert", "policy", "tool"]] = Field(min_length=1)
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
    trajectories: list[GivenTrajectory] = Field(min_length=1)


class GivenBatch(BaseModel):
    """What an optimizer step is given. step: optimizer steps taken before it. state: the method's, where it is not the first."""

    model_config = STRICT
    step: int = Field(0, ge=0)
    state: dict[str, Any] | None = None
    groups: list[GivenGroup] = Field(min_length=1)


PER_TOKEN = ("old_logp", "ref_logp", "behaviour_logp", "teacher_logp", "entropy", "value", "old_value")
"""Lists that a trajectory may bring beside `logp`. `value` is that of the state before each token; a reward model reads the last
as the answer's reward."""

OLD = frozenset({"old_logp", "old_value"})
"""What is the current policy's where it is not given: one inner update."""


def to_group(index: int, given: GivenGroup) -> Group:
    """The group, its trajectories numbered by `policy_version`; UserError for lists of the wrong length and log-probs above 0."""
    trajectories = []
    for k, t in enumerate(given.trajectories):
        where = f"groups.{index}.trajectories.{k}"
        for name in ("logp", *PER_TOKEN):
            values = getattr(t, name)
            if values is not None and len(values) != len(t.source):
                raise UserError(
                    f"{where}.{name}: got {len(values)} numbers for {len(t.source)} tokens; give one per entry of `source`"
                )
        high = [i for i, (x, s) in enumerate(zip(t.logp, t.source, strict=True)) if s != "prompt" and x > 0]
        if high:
            raise UserError(f"{where}.logp.{high[0]}: got {t.logp[high[0]]}; a log-prob is at most 0")
        source = tuple(Source[s.upper()] for s in t.source)
        if source[0] != Source.PROMPT:
            raise UserError(
                f"{where}.source.0: got {t.source[0]!r}; the first token is one of the prompt's, which nothing predicts"
            )
        # the version says which trajectory this is, whatever select makes of the group; no two texts, and no two prompts, are alike
        tokens = tuple(index * 10**9 + i + (0 if s == Source.PROMPT else (k + 1) * 10**5) for i, s in enumerate(source))
        kept = {"reward": t.reward, "finished": t.finished, "greedy": t.greedy, "replayed": t.replayed}
        trajectories.append(Trajectory(tokens, source, **kept, policy_version=k))
    expert = tuple(t for t in trajectories if t.wrote(Source.EXPERT) and not t.wrote(Source.POLICY))
    prompt = trajectories[0].tokens[: trajectories[0].response_start]
    return Group(Example(given.id or str(index), "", prompt, expert), tuple(trajectories), given.stream)
