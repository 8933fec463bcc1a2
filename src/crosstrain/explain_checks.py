"""Whether a method could have been given the groups of a batch file, and what its plan makes of them before `select`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from crosstrain.errors import UserError, nearest
from crosstrain.explain_given import demonstrated
from crosstrain.types import Group, Method, Request, Source, State


def as_collected(method: Method, state: State, index: int, group: Group) -> Group:
    """The group as `collect` would hand it on: of a stream of the plan's, started as the plan starts it, its rollouts rewarded.

    Raises UserError for what the method needs and the group lacks, and for what its groups never have.
    """
    group = replace(group, stream=_stream(method, state, index, group.stream))
    needs = method.plan.brings(group.stream)
    if group.by(Source.POLICY) and not group.by(Source.EXPERT) and not method.plan.samples:
        k = next(k for k, t in enumerate(group.trajectories) if t.wrote(Source.POLICY))
        raise UserError(
            f"groups.{index}.trajectories.{k} has tokens of the policy's, and method {method.name} samples nothing: tag the tokens "
            "of the data's answers `expert`"
        )
    if needs == "pair":
        _check_pair(method, index, group)
    elif needs == "label":
        _check_labels(method, index, group)
    else:
        _check_demonstrations(method, state, index, group)
    _check_greedy(method, state, index, group)
    return _rewarded(method, index, _started(method, state, index, group))


def _stream(method: Method, state: State, index: int, given: str) -> str:
    allowed = list(method.plan.streams(state))
    if given in allowed or method.plan.recall is not None:  # what is recalled may be of a stream of its own
        return given
    if given == "train":  # as where none is named: whatever the group has is of the right stream
        return allowed[0] if len(allowed) == 1 else given
    names = " and ".join(allowed)
    raise UserError(f"groups.{index}.stream: got {given!r}; method {method.name} draws from {names}; {nearest(given, allowed)}")


def _check_pair(method: Method, index: int, group: Group) -> None:
    rewards = [t.reward for t in group.trajectories]
    got = ""
    if len(rewards) != 2:
        got = f"{len(rewards)} trajectories"
    elif not all(map(demonstrated, group.trajectories)):
        got = "a trajectory without `expert` tokens"
    elif None in rewards:
        got = f"no `reward` at trajectories.{rewards.index(None)}"
    elif rewards[0] == rewards[1]:
        got = f"two of reward {rewards[0]:g}"
    if got:
        raise UserError(
            f"method {method.name} needs two answers of the data in every group, both `expert`, the better one with the higher "
            f"`reward`; groups.{index} has {got}"
        )
    gap = abs((rewards[0] or 0.0) - (rewards[1] or 0.0))
    if method.saves == "reward model" and gap < 1 - 1e-9:  # its labels are 1 + margin and 0
        raise UserError(
            f"groups.{index}: the rewards of a pair differ by {gap:g}; for method {method.name} that is 1 + margin, so it must be "
            "at least 1: give 1 and 0 where there is no margin"
        )


def _check_labels(method: Method, index: int, group: Group) -> None:
    for k, t in enumerate(group.trajectories):
        where = f"groups.{index}.trajectories.{k}"
        if not demonstrated(t):
            raise UserError(f"method {method.name} needs answers of the data, tagged `expert`; {where} has no such token")
        if t.reward not in (0.0, 1.0):
            got = "none" if t.reward is None else f"{t.reward:g}"
            raise UserError(f"method {method.name} needs a label: {where}.reward must be 1 (wanted) or 0 (unwanted); got {got}")


def _check_demonstrations(method: Method, state: State, index: int, group: Group) -> None:
    plan = method.plan
    shown = [k for k, t in enumerate(group.trajectories) if demonstrated(t)]
    if not plan.samples and plan.needs_expert == "demonstration" and not group.by(Source.EXPERT):
        raise UserError(
            f"method {method.name} needs a demonstration in every group; groups.{index} has none: give a trajectory whose answer "
            "is tagged `expert`"
        )
    if not shown or plan.start(group.example, state):
        return
    where = f"groups.{index}.trajectories.{shown[0]}"
    if plan.recall is not None and plan.needs_expert == "demonstration":
        if len(shown) < len(group.trajectories):
            raise UserError(
                f"{where} is a demonstration beside rollouts; method {method.name} imitates in groups of their own: give it one"
            )
        return
    if plan.expert_streams is None and not any(r.by == "teacher" for r in _asked(method, state, group)):
        hint = "; what a rollout was shown of one are the `expert` tokens before its `policy` ones" if plan.needs_expert else ""
        raise UserError(
            f"{where} is a demonstration (it has `expert` tokens and no `policy` ones), and groups of method {method.name} have "
            f"rollouts only: leave it out{hint}"
        )


def _asked(method: Method, state: State, group: Group) -> Sequence[Request]:
    """What the plan asks for at the start of a group, where that needs no demonstration."""
    plan = method.plan
    if not plan.samples or plan.needs_expert is not None:
        return ()
    return plan.next(replace(group, trajectories=plan.start(group.example, state)), state)


def _check_greedy(method: Method, state: State, index: int, group: Group) -> None:
    wanted = sum(request.n for request in _asked(method, state, group) if request.greedy)
    found = sum(t.greedy for t in group.trajectories)
    if method.plan.recall is None and any(t.replayed for t in group.trajectories):
        raise UserError(f"groups.{index}: `replayed` is true, and method {method.name} remembers no rollouts: leave it out")
    if found and not wanted:
        raise UserError(f"groups.{index}: `greedy` is true, and method {method.name} takes no greedy answers: leave it out")
    if wanted and found != wanted:
        raise UserError(
            f"method {method.name} needs exactly {wanted} trajectory with `greedy: true`, the baseline, in every group; "
            f"groups.{index} has {found}"
        )


def _started(method: Method, state: State, index: int, group: Group) -> Group:
    """The group with the authors that the plan gives to the tokens of its demonstrations (a prompt that is imitated, too)."""
    if not group.example.expert:
        return group
    made = {t.tokens: t.source for t in method.plan.start(group.example, state)}
    if any(made.get(t.tokens, t.source) != t.source for t in group.trajectories):
        _check_one_prompt(index, group)
    return replace(group, trajectories=tuple(replace(t, source=made.get(t.tokens, t.source)) for t in group.trajectories))


def _check_one_prompt(index: int, group: Group) -> None:
    lengths = [t.response_start for t in group.trajectories]
    k = next((k for k, n in enumerate(lengths) if n != lengths[0]), None)
    if k is not None:
        raise UserError(
            f"groups.{index}: the prompt has {lengths[0]} tokens in trajectories.0 and {lengths[k]} in trajectories.{k}, and the "
            "method imitates it: give the same prompt in full in each"
        )


def _rewarded(method: Method, index: int, group: Group) -> Group:
    """The group with a reward at every rollout: the file's, or the plan's own where it has one."""
    plan = method.plan
    absent = [k for k, t in enumerate(group.trajectories) if t.reward is None and t.wrote(Source.POLICY)]
    if not plan.scored or not plan.samples or not absent:
        return group
    where = ", ".join(f"groups.{index}.trajectories.{k}" for k in absent[:5])
    if plan.reward is None:
        raise UserError(f"method {method.name} needs `reward`, which is absent from {where}")
    try:
        found = {k: plan.reward(group, group.trajectories[k], _no_text) for k in absent}
    except (LookupError, ValueError) as error:
        raise UserError(
            f"method {method.name} makes rewards from texts, which are not given here; give `reward`, which is absent from {where}"
        ) from error
    return replace(
        group,
        trajectories=tuple(replace(t, reward=found[k]) if k in found else t for k, t in enumerate(group.trajectories)),
    )


def _no_text(tokens: tuple[int, ...]) -> str:
    raise ValueError("there is no text")
