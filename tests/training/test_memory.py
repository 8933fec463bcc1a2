"""What methods remember: recalled groups, draws by state, rewards of their own, movement, and going on after a stop."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crosstrain.data.streams import Stream
from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.methods.memory import as_json, replayed
from crosstrain.methods.plans import rollouts
from crosstrain.objective.terms import by, nll, surrogate
from crosstrain.rollout.sampler import Sampling
from crosstrain.testing import ScriptedSampler, made_up_examples, made_up_rewards, made_up_text, tiny_model
from crosstrain.training import checkpoint
from crosstrain.training.batching import to_batch
from crosstrain.training.collect import Collected, Truncation, collect
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine
from crosstrain.training.loop import Progress, StageSettings, Step, train_stage
from crosstrain.training.metrics import Meter
from crosstrain.training.optimizer import Optimizer
from crosstrain.training.tally import Tally
from crosstrain.types import ById, Example, Group, Method, Per, Plan, Request, Source, State, Trajectory
from tensors import equal

STREAM = Stream("train", tuple(Example(f"train:{i}", "", (i + 3, 9)) for i in range(6)), seed=4)
ORDER = [e.id for e in STREAM.draw(0, 6)[0]]
GRPO = load_method("grpo", num_generations=2, beta=0.0)


def run(method: Method, *, state: State | None = None, n: int = 2, position: int = 0, **more: Any) -> Collected:
    settings = {"truncation": Truncation(), "rewards": made_up_rewards, "seed": 0, "step": 3, **more}
    return collect(
        method,
        method.init() if state is None else state,
        {"train": STREAM},
        {"train": position},
        batch_size=n,
        sampler=ScriptedSampler(),
        sampling=Sampling(),
        **settings,
    )


def names(groups: Sequence[Group]) -> list[str]:
    return [g.example.id.partition("@")[0] for g in groups]


# --- draws by state -----------------------------------------------------------------------------------------------------


def wanting(*wanted: str) -> Method:
    return replace(GRPO, plan=replace(GRPO.plan, wants=lambda example, state: example.id in wanted))


def test_a_draw_passes_over_what_is_not_wanted_and_the_stream_stands_after_the_last_one_taken() -> None:
    method = wanting(ORDER[1], ORDER[4])
    found = run(method)
    assert names(found.groups) == [ORDER[1], ORDER[4]]
    assert (found.positions, found.skipped) == ({"train": 5}, 3)
    assert [g.example.id for g in found.groups] == [f"{ORDER[1]}@1", f"{ORDER[4]}@4"], "as an unfiltered draw would name them"
    assert run(method).groups == found.groups, "the same draw again"


def test_wanting_everything_is_not_filtering() -> None:
    plain, filtered = run(GRPO, n=4), run(wanting(*ORDER), n=4)
    assert str(filtered.groups) == str(plain.groups)
    assert (filtered.positions, filtered.skipped) == (plain.positions, 0)


def test_a_draw_looks_at_one_pass_of_the_stream_and_fills_up_in_order() -> None:
    found = run(wanting(ORDER[4]), n=3)
    assert names(found.groups) == [ORDER[0], ORDER[1], ORDER[4]], "the first of those passed over, where they stand"
    assert (found.positions, found.skipped) == ({"train": 6}, 3)
    nothing = run(wanting(), n=3)
    assert names(nothing.groups) == ORDER[:3] and nothing.positions == {"train": 6}
    more = run(wanting(), n=8)
    assert len(more.groups) == 8 and more.positions == {"train": 8}, "a batch larger than the stream is still filled"


def test_a_draw_sees_the_state_with_seed_and_batch_size() -> None:
    seen: list[dict[str, Any]] = []
    method = replace(GRPO, plan=replace(GRPO.plan, wants=lambda example, state: not seen.append(dict(state))))
    run(method, state={"step": 7}, n=1)
    assert seen[0] == {"step": 7, "seed": 0, "batch_size": 1}


# --- recalled groups ----------------------------------------------------------------------------------------------------


def own(prompt: tuple[int, ...], *, reward: float = 1.0, replay: bool = True) -> Trajectory:
    source = (Source.PROMPT,) * len(prompt) + (Source.POLICY,) * 2
    logp = (math.nan,) * len(prompt) + (-0.5, -0.25)
    return Trajectory((*prompt, 5, 6), source, reward=reward, behaviour_logp=logp, policy_version=1, replayed=replay)


def recalling(*ids: str, sampled: bool) -> Method:
    """GRPO whose steps begin with remembered rollouts, to which two more are sampled or not."""

    def recall(state: State, by_id: ById) -> Sequence[Group]:
        return [Group(e, (own(e.prompt_tokens),), "train") for e in map(by_id, ids)]

    def following(group: Group, state: State) -> Sequence[Request]:
        new = [t for t in group.by(Source.POLICY) if not t.replayed]
        return () if new or (group.trajectories and not sampled) else (Request(2),)

    return replace(GRPO, plan=Plan(start=lambda e, s: (), next=following, samples=True, recall=recall))


def test_what_is_recalled_comes_first_and_in_place_of_drawn_examples() -> None:
    found = run(recalling("train:5", sampled=False), n=3)
    assert names(found.groups) == ["train:5", *ORDER[:2]] and found.positions == {"train": 2}
    assert found.groups[0].trajectories == (own((8, 9)),)
    assert [len(g.trajectories) for g in found.rewarded] == [0, 2, 2], "rewards are of what was sampled in the step"
    alone = run(recalling("train:5", "train:0", "train:1", sampled=False), n=2)
    assert names(alone.groups) == ["train:5", "train:0", "train:1"] and alone.positions == {"train": 0}
    assert (alone.usage.prefill_tokens, alone.usage.generated_tokens) == (0, 0), (
        "what is remembered was paid for when it was sampled"
    )


def test_rollouts_may_join_a_recalled_one_and_have_random_numbers_of_their_own() -> None:
    twice = run(recalling(ORDER[0], ORDER[0], sampled=True), n=3)
    assert names(twice.groups) == [ORDER[0]] * 3
    assert [len(g.trajectories) for g in twice.groups] == [3, 3, 2] and [len(g.trajectories) for g in twice.rewarded] == [2] * 3
    answers = {g.trajectories[-1].tokens for g in twice.groups}
    assert len(answers) == 3
    assert twice.usage.prefill_tokens == 3 * 2


def test_a_recalled_rollout_keeps_its_reward_and_is_penalised_only_once() -> None:
    cut = replace(own((8, 9), reward=0.75), finished=False)
    method = recalling("train:5", sampled=True)
    method = replace(method, plan=replace(method.plan, recall=lambda s, by_id: [Group(by_id("train:5"), (cut,), "train")]))
    found = run(method, n=1, truncation=Truncation("penalise", 0.25))
    assert found.groups[0].trajectories[0].reward == 0.75


def test_dropped_recalled_groups_are_not_drawn_again_and_further_draws_recall_nothing() -> None:
    method = replace(
        recalling("train:5", sampled=False),
        select=lambda group, state: None if group.example.id.startswith(("train:5", ORDER[0])) else group,
    )
    method = replace(method, plan=replace(method.plan, max_draws=3))
    found = run(method, n=2)
    assert names(found.groups) == [ORDER[1]] and len(found.rewarded) == 3


def test_rollouts_survive_json_and_get_their_prompt_back() -> None:
    example = Example("train:0", "", (3, 9))
    mixed = Trajectory(
        (3, 9, 7, 5), (Source.PROMPT,) * 2 + (Source.EXPERT, Source.POLICY), 1.0, behaviour_logp=(math.nan,) * 3 + (-0.1,)
    )
    again = replayed(json.loads(json.dumps(as_json(mixed), allow_nan=False)), example)
    assert str(replace(again, replayed=False)) == str(mixed) and again.replayed
    unknown = replayed(as_json(replace(mixed, behaviour_logp=())), example)
    assert all(map(math.isnan, unknown.behaviour_logp))


def test_metrics_compare_the_sampler_only_with_what_it_sampled_in_this_step() -> None:
    """A replayed token's log-probs are another policy's, and the policy term's gate is not on it."""
    group = Group(STREAM.examples[0], (own((3, 9)), own((3, 9), reward=0.0, replay=False)))
    batch = to_batch([group])
    assert batch.columns["replayed"].tolist() == [1.0, 0.0]
    assert "replayed" not in to_batch([Group(STREAM.examples[0], (own((3, 9), replay=False),))]).columns
    meter = Meter()
    logp = torch.where(batch.trained, torch.tensor([[-9.0], [-0.75]]), torch.zeros(2, 4))
    meter.add_scores(batch, logp, torch.zeros(2, 4), torch.zeros(2, 4), batch.trained)
    assert meter.metrics()["sampling/sampling_logp_difference/mean"] == pytest.approx((0.25 + 0.5) / 2)
    batch = replace(batch, advantage=torch.ones(2, 4))
    meter.add_clipped(batch, torch.where(torch.tensor([[False], [True]]), torch.ones(2, 4), torch.zeros(2, 4)), batch.trained)
    assert meter.metrics()["clip_ratio/region_mean"] == 0.0


# --- rewards of the method's own ----------------------------------------------------------------------------------------


def test_a_plan_may_score_completions_itself_from_text() -> None:
    def reward(group: Group, rollout: Trajectory, decode: Any) -> float:
        return float(len(decode(rollout.response)))

    method = replace(GRPO, plan=replace(rollouts(2), reward=reward))
    found = run(method, rewards=None, decode=lambda tokens: "x" * len(tokens))
    assert [[t.reward for t in g.trajectories] for g in found.groups] == [
        [float(len(t.response)) for t in g.trajectories] for g in found.groups
    ]
    with pytest.raises(ValueError, match="decode"):
        run(method, rewards=None)
    with pytest.raises(UserError, match="needs a reward"):
        run(replace(GRPO, plan=rollouts(2)), rewards=None)


# --- in the loop --------------------------------------------------------------------------------------------------------


class Run:
    """A stage on a tiny fp32 model and a real stream, which can be stopped and gone on with."""

    def __init__(self, method: Method, folder: Path | None = None, **settings: Any) -> None:
        self.method, self.model = method, tiny_model(dtype=torch.float32)
        stream = Stream("train", tuple(made_up_examples(method, 8)), seed=1)
        self.engine = Engine(
            model=self.model,
            parameters=10,
            layout="shared",
            device=torch.device("cpu"),
            streams={"train": stream},
            sampler=ScriptedSampler(),
            rewards=made_up_rewards,
            decode=made_up_text,
        )
        self.settings = StageSettings(**{"batch_size": 4, "learning_rate": 1e-2, "max_steps": 5, **settings})
        self.optimizer = Optimizer(self.model, "fp32")
        self.progress = Progress(state=method.init())
        if folder is not None:
            place = checkpoint.latest(folder)
            assert place is not None
            found = checkpoint.load(place)
            saved = dict(found.state)
            tally, *costs = saved.pop("tally"), saved.pop("cost"), saved.pop("stage_cost")
            self.progress = Progress(**saved, cost=Cost(**costs[0]), stage_cost=Cost(**costs[1]), tally=Tally(**tally))
            self.optimizer.load(found.weights, found.moments)

    def steps(self, stop: int | None = None) -> list[Step]:
        found = []
        for step in train_stage(self.engine, self.method, self.settings, self.optimizer, self.progress):
            found.append(step)
            if self.progress.step == stop:
                break
        return found

    def save(self, folder: Path) -> None:
        state = {**asdict(self.progress), "state": dict(self.progress.state)}
        made = checkpoint.Checkpoint(self.optimizer.weights(), self.optimizer.moments(), state)
        checkpoint.save(folder, self.progress.step, made)


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("replay", {"num_generations": 4}),
    ("solve_rate_selection", {"num_generations": 4}),
    ("difficulty_curriculum", {"num_generations": 4}),
    ("bread", {"num_generations": 4}),
    ("srl", {"num_generations": 4}),
    ("relift", {"num_generations": 4, "buffer_size": 2}),
    ("mifo", {"num_generations": 4, "buffer_size": 2}),
]

WHAT_MEMORY_DOES = {
    "replay": "weight_share/replay/policy",
    "solve_rate_selection": "examples_skipped",
    "difficulty_curriculum": "examples_skipped",
    "relift": "weight_share/demo/expert",
    "mifo": "weight_share/demo/expert",
}


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_a_stopped_run_ends_as_if_it_had_not_been(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    method = load_method(name, **settings)
    whole = Run(method)
    lines = whole.steps()
    stopped = Run(method)
    stopped.steps(stop=3)
    stopped.save(tmp_path)
    resumed = Run(method, tmp_path)
    rest = resumed.steps()
    if name in WHAT_MEMORY_DOES:
        assert any(WHAT_MEMORY_DOES[name] in s.metrics for s in rest), "nothing was remembered over the stop"
    timings = ("time", "seconds")
    for one, other in zip(lines[3:], rest, strict=True):
        kept = [{k: v for k, v in s.metrics.items() if not any(t in k for t in timings)} for s in (one, other)]
        assert kept[0] == kept[1]
    assert dict(whole.progress.state) == dict(resumed.progress.state)
    assert whole.progress.positions == resumed.progress.positions
    weights = dict(whole.model.named_parameters())
    assert equal(dict(resumed.model.named_parameters()), weights)


def test_the_loop_lets_a_method_remember_what_was_collected_before_select() -> None:
    seen: list[int] = []

    def remember(state: State, groups: Sequence[Group]) -> State:
        seen.append(len(groups))
        return {"seen": [*state["seen"], *names(groups)]}

    def update(state: State, observed: Any) -> State:
        assert len(state["seen"]) == 4 * len(seen), "remember comes first"
        return state

    method = replace(
        GRPO,
        init=lambda: {"seen": []},
        remember=remember,
        update=update,
        select=lambda g, s: g if g.example.id[6] == "1" else None,
    )
    run = Run(method, max_steps=2)
    run.steps()
    assert seen == [4, 4]
    assert run.progress.state["seen"] == [e.id for e in run.engine.streams["train"].draw(0, 8)[0]]  # type: ignore[index]


def test_skipped_examples_are_logged() -> None:
    found = Run(wanting("train:0", "train:1"), batch_size=2, max_steps=1).steps()
    assert found[0].metrics["examples_skipped"] >= 0
    assert "examples_skipped" not in Run(GRPO, max_steps=1).steps()[0].metrics


# --- movement -----------------------------------------------------------------------------------------------------------


def moving(marks: Sequence[bool], seen: list[dict[str, float]]) -> Method:
    def update(state: State, observed: Any) -> State:
        seen.append({k.removeprefix("moved/"): v for k, v in observed.items() if k.startswith("moved/")})
        return {"step": state["step"] + 1}

    return Method(
        terms=(nll("demo", on=by(Source.EXPERT), per=Per(("own_tokens",))),),
        plan=load_method("sft").plan,
        init=lambda: {"step": 0},
        update=update,
        movement=lambda state: marks[state["step"]],
    )


def test_movement_is_the_distance_from_where_a_phase_began() -> None:
    """Phases of two steps and one: the second step's is over both of its phase."""
    seen: list[dict[str, float]] = []
    run = Run(moving([False, False, True], seen), max_steps=3)
    at = [{n: p.detach().clone() for n, p in run.model.named_parameters()}]
    lines = []
    for step in train_stage(run.engine, run.method, run.settings, run.optimizer, run.progress):
        lines.append(step.metrics)
        at.append({n: p.detach().clone() for n, p in run.model.named_parameters()})
    for (begin, end), found in zip(((0, 1), (0, 2), (2, 3)), seen, strict=True):
        expected = {n: float((at[end][n] - at[begin][n]).square().mean().sqrt()) for n in at[0]}
        assert found == pytest.approx(expected)
    assert not any(k.startswith("moved/") for line in lines for k in line), "hundreds of numbers are no metrics"


def test_marks_are_saved_with_the_moments_and_forgotten_by_a_new_stage() -> None:
    model = tiny_model(dtype=torch.float32)
    optimizer = Optimizer(model, "fp32")
    assert not optimizer.marked
    optimizer.mark()
    with torch.no_grad():
        next(iter(model.parameters())).add_(0.5)
    moved = optimizer.moved()
    name = next(iter(moved))
    assert moved[name] == pytest.approx(0.5) and sum(moved.values()) == moved[name]
    other = Optimizer(tiny_model(dtype=torch.float32), "fp32")
    other.load(optimizer.weights(), optimizer.moments())
    assert other.moved() == moved
    other.begin(restart=False)
    assert not other.marked and "marked" not in str(list(other.moments()))


def test_a_term_can_be_on_remembered_rollouts_alone() -> None:
    """The loop hands a method's terms the column `replayed`, of the rows it recalled."""

    def remembered(batch: Any) -> Any:
        return batch.written_by(Source.POLICY) & (batch.columns["replayed"][:, None] > 0)

    term = surrogate("replay", on=remembered, per=Per(("own_tokens",)))
    method = replace(recalling("train:5", sampled=True), terms=(term,), advantage=lambda batch: batch.reward)
    (step,) = Run(method, batch_size=2, max_steps=1).steps()
    assert step.metrics["weight_share/replay/policy"] == 1.0
