"""Collecting a step's groups: draws, rounds, prompts, rewards, truncation, and what select keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.methods.plans import rollouts
from crosstrain.rollout.sampler import Completion, Prompt, Sampling
from crosstrain.training.collect import Collected, Truncation, collect, shares
from crosstrain.types import Example, Group, Method, Plan, Request, Source, State, Trajectory


class Counting:
    """A stream without end: example i has the prompt (i + 1, 9)."""

    def __init__(self, *, expert: bool = False) -> None:
        self.expert = expert

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        return [self._example(i) for i in range(position, position + n)], position + n

    def _example(self, i: int) -> Example:
        prompt = (i + 1, 9)
        demonstration = Trajectory((*prompt, 7), (Source.PROMPT, Source.PROMPT, Source.EXPERT))
        return Example(f"train:{i}", "", prompt, (demonstration,) if self.expert else (), where=f"rows.jsonl:{i + 1}")


class Echo:
    """A sampler that notes what it was asked; sample k of a prompt is k + 1 tokens, cut when k is odd."""

    def __init__(self) -> None:
        self.calls: list[list[Prompt]] = []

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, step: int) -> list[list[Completion]]:
        self.calls.append(list(prompts))
        return [[Completion((5,) * (k + 1), (-0.5,) * (k + 1), k % 2 == 0) for k in range(p.n)] for p in prompts]


def half(groups: list[Group]) -> list[Group]:
    """Reward 0.5 for whatever has none."""
    return scored(groups, lambda g, t: 0.5)


def scored(groups: list[Group], reward: Callable[[Group, Trajectory], float | None]) -> list[Group]:
    def one(g: Group, t: Trajectory) -> Trajectory:
        return t if t.reward is not None else replace(t, reward=reward(g, t))

    return [replace(g, trajectories=tuple(one(g, t) for t in g.trajectories)) for g in groups]


def run(
    method: Method, *, n: int = 2, sampler: Any = None, rewards: Any = half, expert: bool = False, **more: Any
) -> Collected:
    settings: dict[str, Any] = {"positions": {}, "truncation": Truncation(), "seed": 0, "step": 3, **more}
    positions = settings.pop("positions")
    streams = {"train": Counting(expert=expert)}
    return collect(
        method,
        method.init(),
        streams,
        positions,
        batch_size=n,
        sampler=sampler,
        sampling=Sampling(),
        rewards=rewards,
        **settings,
    )


def test_imitation_samples_nothing() -> None:
    found = run(load_method("sft"), expert=True, positions={"train": 5})
    assert [g.example.id for g in found.groups] == ["train:5@5", "train:6@6"]
    assert found.positions == {"train": 7}
    assert (found.usage.prefill_tokens, found.usage.generated_tokens) == (0, 0)


def test_rollouts_are_tagged_and_keep_the_samplers_tokens_and_log_probs() -> None:
    sampler = Echo()
    found = run(load_method("grpo", num_generations=2), sampler=sampler)
    first = found.groups[0].trajectories[1]
    assert first.tokens == (1, 9, 5, 5) and first.response == (5, 5)
    assert first.source == (Source.PROMPT, Source.PROMPT, Source.POLICY, Source.POLICY)
    assert first.behaviour_logp[2:] == (-0.5, -0.5) and all(math.isnan(x) for x in first.behaviour_logp[:2])
    assert first.policy_version == 3 and not first.finished and first.reward == 0.5
    assert (found.usage.prefill_tokens, found.usage.generated_tokens) == (4, 2 * (1 + 2))
    assert len(sampler.calls) == 1, "all prompts of a round are sampled together"


def test_every_prompt_of_a_step_has_its_own_random_numbers() -> None:
    """Also an example that is drawn twice in one step; and the key does not depend on the neighbours."""
    sampler = Echo()
    run(load_method("grpo", num_generations=2), sampler=sampler, n=3)
    keys = [p.key for p in sampler.calls[0]]
    assert len(set(keys)) == 3
    run(load_method("grpo", num_generations=2), sampler=sampler, n=1, positions={"train": 2})
    assert sampler.calls[1][0].key == keys[2]


def test_a_demonstration_beside_rollouts_is_scored_with_them() -> None:
    found = run(load_method("luffy", num_generations=2), sampler=Echo(), expert=True)
    assert [t.wrote(Source.EXPERT) for t in found.groups[0].trajectories] == [True, False, False]
    assert [t.reward for t in found.groups[0].trajectories] == [0.5] * 3


def test_several_rounds_are_asked_until_the_plan_is_content() -> None:
    """A plan that retries with an expert prefix where nothing was right; what was scored is not scored again."""

    def following(group: Group, state: State) -> Sequence[Request]:
        own = group.by(Source.POLICY)
        if not own:
            return (Request(1),)
        if len(own) < 3 and group.example.id.startswith("train:0"):
            return (Request(1, prefix=(7,) * len(own)), Request(1, greedy=True))
        return ()

    seen: list[int] = []

    def rewards(groups: list[Group]) -> list[Group]:
        seen.extend(sum(t.reward is None for t in g.trajectories) for g in groups)
        return half(groups)

    sampler = Echo()
    method = Method(terms=(), plan=Plan(next=following, samples=True))
    found = run(method, sampler=sampler, rewards=rewards)
    assert [len(call) for call in sampler.calls] == [2, 2]
    assert [len(g.trajectories) for g in found.groups] == [3, 1]
    assert sum(seen) == 4
    hinted = found.groups[0].trajectories[1]
    assert hinted.tokens == (1, 9, 7, 5) and hinted.source[2] == Source.EXPERT
    assert len({p.key for call in sampler.calls for p in call}) == 4
    assert found.usage.prefill_tokens == 2 + 2 + 3 + 2


@pytest.mark.parametrize(("rule", "expected"), [("score", [0.5, 0.5]), ("mask", [0.5, 0.5]), ("penalise", [0.5, 0.25])])
def test_truncated_completions_are_scored_or_penalised(rule: str, expected: list[float]) -> None:
    found = run(load_method("grpo", num_generations=2), sampler=Echo(), truncation=Truncation(rule, 0.25))
    assert [t.reward for t in found.groups[0].trajectories] == expected


def test_the_penalty_of_long_completions_grows_before_the_limit() -> None:
    """DAPO's equation 13 by hand: at most L - B 0, then ((L - B) - length) / B, beyond L -1."""
    soft = Truncation("penalise", penalty=1.0, buffer=4, limit=20)
    for length, published in ((1, 0.0), (16, 0.0), (17, -0.25), (19, -0.75), (20, -1.0)):
        assert -soft.of(length, finished=True) == published
    assert soft.of(20, finished=False) == 1.0
    found = run(load_method("grpo", num_generations=2), sampler=Echo(), truncation=Truncation("penalise", 0.5, 2, 2))
    lengths = [len(t.response) for t in found.groups[0].trajectories]
    cut = [not t.finished for t in found.groups[0].trajectories]
    expected = [0.5 - (0.5 if c else 0.5 * n / 2) for n, c in zip(lengths, cut, strict=True)]
    assert [t.reward for t in found.groups[0].trajectories] == expected


def test_a_group_whose_answers_differ_in_length_alone_is_replaced() -> None:
    """DAPO's filter is about what the verifier says: a penalty for length makes no group one to learn from."""
    soft, dapo = Truncation("penalise", 0.5, 2, 2), load_method("dapo", num_generations=2, dynamic_sampling=3)
    found = run(dapo, sampler=Echo(), truncation=soft)
    assert found.groups == [] and found.drawn == 6
    assert {t.reward for g in found.rewarded for t in g.trajectories} == {0.25, 0.0}, "they are not equal with it"

    def first_right(groups: list[Group]) -> list[Group]:
        return scored(groups, lambda g, t: float(len(t.response) == 2))

    [kept, _] = run(dapo, sampler=Echo(), rewards=first_right, truncation=soft).groups
    assert [t.reward for t in kept.trajectories] == [-0.25, 0.5]


def test_dynamic_sampling_replaces_dropped_groups_and_stops_at_its_limit() -> None:
    """Every second group is mixed: two draws of 4 give 4 groups; with none mixed, 3 draws give none."""

    def mixed_when_even(groups: list[Group]) -> list[Group]:
        return scored(groups, lambda g, t: float(len(t.tokens) == 3) if g.example.prompt_tokens[0] % 2 == 0 else 1.0)

    method = load_method("dapo", num_generations=2, dynamic_sampling=3)
    found = run(method, n=4, sampler=Echo(), rewards=mixed_when_even)
    assert [g.example.prompt_tokens[0] for g in found.groups] == [2, 4, 6, 8]
    assert (found.drawn, found.positions) == (8, {"train": 8})
    nothing = run(method, n=4, sampler=Echo())
    assert (nothing.groups, nothing.drawn, nothing.usage.generated_tokens) == ([], 12, 36)


def test_a_step_never_grows_beyond_its_batch_size() -> None:
    def all_but_the_first(groups: list[Group]) -> list[Group]:
        return scored(groups, lambda g, t: float(len(t.tokens)) if g.example.prompt_tokens[0] > 1 else 1.0)

    found = run(load_method("dapo", num_generations=2), n=3, sampler=Echo(), rewards=all_but_the_first)
    assert [g.example.prompt_tokens[0] for g in found.groups] == [2, 3, 4]


def test_a_completion_without_a_score_is_left_out_and_does_not_stop_the_group() -> None:
    """`rewards` counted it as missing; what cannot be credited is not trained on, and never counts as 0."""

    def one_missing(groups: list[Group]) -> list[Group]:
        return scored(groups, lambda g, t: None if len(t.tokens) == 4 else float(len(t.tokens)))

    found = run(load_method("grpo", num_generations=3), sampler=Echo(), rewards=one_missing)
    assert [[t.reward for t in g.trajectories] for g in found.groups] == [[3.0, 5.0]] * 2
    assert [len(g.trajectories) for g in found.rewarded] == [3, 3], "metrics still see it"


def test_a_group_none_of_whose_completions_has_a_score_is_dropped() -> None:
    def first_missing(groups: list[Group]) -> list[Group]:
        return scored(groups, lambda g, t: None if g.example.prompt_tokens[0] == 1 else 1.0)

    for name, settings in (("grpo", {}), ("luffy", {}), ("hpt", {"num_generations": 8})):
        found = run(load_method(name, **settings), sampler=Echo(), rewards=first_missing, expert=True)
        assert [g.example.prompt_tokens[0] for g in found.groups] == [2], name
        assert found.drawn == 2


def test_rows_that_lack_what_the_method_needs_are_named() -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:1.*completion"):
        run(load_method("sft"))
    with pytest.raises(UserError, match=r"rows.jsonl:1.*chosen"):
        run(load_method("dpo"), expert=True)
    with pytest.raises(UserError, match=r"rows.jsonl:1.*label"):
        run(Method(terms=(), plan=Plan(needs_expert="label"), name="kto"), expert=True)


def test_a_sampling_method_needs_a_reward_and_a_known_stream() -> None:
    with pytest.raises(UserError, match="needs a reward"):
        run(load_method("grpo"))
    elsewhere = replace(load_method("sft"), plan=Plan(streams=lambda state: {"demos": 1.0}))
    with pytest.raises(UserError, match="'demos'; the recipe has train"):
        run(elsewhere)


def test_streams_share_a_step() -> None:
    assert shares({"rl": 1.0, "demos": 1.0}, 3) == {"rl": 2, "demos": 1}
    assert shares({"rl": 0.75, "demos": 0.25}, 8) == {"rl": 6, "demos": 2}
    assert shares({"rl": 1.0, "demos": 0.0}, 4) == {"rl": 4, "demos": 0}


def test_a_rollout_plan_asks_once() -> None:
    plan = rollouts(3)
    example = Counting().draw(0, 1)[0][0]
    assert [r.n for r in plan.next(Group(example, ()), {})] == [3]
    own = Trajectory((1, 5), (Source.PROMPT, Source.POLICY))
    assert plan.next(Group(example, (own,)), {}) == ()
