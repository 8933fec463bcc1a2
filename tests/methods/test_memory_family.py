"""Replay, prompt and rollout selection, ReLIFT, MIFO, BREAD and SRL: what they train on, and with what weight."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

import pytest
import torch
from torch import Tensor
from worked import Line, agrees, answer, gradient_of, group, prepared, random_groups, random_logps, rectangle, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.methods.bread import bisect
from crosstrain.methods.data_selection import most_varied
from crosstrain.methods.mifo import importance, least_sure, most_important
from crosstrain.methods.replay import draw, likeliest
from crosstrain.objective.denominators import shaped, shaped_behaviour
from crosstrain.types import Batch, Example, Group, Method, Request, Scores, Source, State, Trajectory

LN2 = math.log(2)


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rolled(name: str, *rewards: float | None) -> Group:
    """A group of own answers of one token with these rewards, whose example is `train:<name>`, drawn at position 3."""
    answers = tuple(answer("O", r) for r in rewards)
    return Group(Example(f"train:{name}@3", "", (1,)), answers)


def ready(method: Method, **more: Any) -> dict[str, Any]:
    """The state as a plan sees it."""
    return {**method.init(), "seed": 0, "batch_size": 4, **more}


# --- replay ---------------------------------------------------------------------------------------------------------------


def again(trajectory: Trajectory, *ratios: float) -> Trajectory:
    """The rollout as a remembered one that was sampled at these ratios below probabilities of 1/2."""
    logp = (math.nan, *(math.log(0.5 / r) for r in ratios))
    return replace(trajectory, replayed=True, behaviour_logp=logp)


def test_replay_by_hand() -> None:
    """Rewards 1 (replayed), 0, 0: A is 2/3, -1/3, -1/3. The replayed tokens have w = 1 and 0.4: w / (w + 0.1) = 10/11 and 0.8,
    weights 0.1 w / (w + 0.1)^2 = 0.1 / 1.21 and 0.04 / 0.25 = 0.16. Four tokens."""
    method = load_method("replay")
    groups = [group(again(answer("OO", 1.0), 1.0, 0.4), answer("O", 0.0), answer("O", 0.0))]
    found = weights_of(method, prepared(method, groups), torch.full((3, 2), -LN2))
    torch.testing.assert_close(
        found.weights, of([[2 / 3 * 0.1 / 1.21, 2 / 3 * 0.16], [-1 / 3, 0], [-1 / 3, 0]]) / 4, rtol=0, atol=1e-7
    )
    assert found.logged == pytest.approx((-2 / 3 * (10 / 11 + 0.8) + 2 / 3) / 4)


def replay_paper(batch: Batch, logp: Tensor, gamma: float) -> Tensor:
    """arXiv:2510.02245: the mixed group's centred rewards; ratios to the old policy, and w / (w + gamma) of the ratio to the one
    that sampled."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for r in range(len(batch)):
        mean = float(batch.reward[batch.group == batch.group[r]].mean())
        for t in range(1, int(batch.length[r])):
            if bool(batch.columns["replayed"][r]):
                w = (logp[r, t - 1] - batch.columns["behaviour_logp"][r, t]).exp()
                share = w / (w + gamma)
            else:
                share = (logp[r, t - 1] - batch.columns["old_logp"][r, t]).exp()
            total, tokens = total - (batch.reward[r] - mean) * share, tokens + 1
    return total / tokens


@pytest.mark.parametrize("seed", range(3))
def test_replays_second_implementation(seed: int) -> None:
    rng = random.Random(seed)
    method = load_method("replay", num_iterations=2, gamma=0.2)
    groups = random_groups(seed, own=3)
    for i in (0, 2):
        kept = answer("O" * rng.randint(1, 4), 1.0)
        groups[i] = replace(
            groups[i], trajectories=(again(kept, *(rng.uniform(0.2, 3) for _ in kept.response)), *groups[i].trajectories)
        )
    logp, batch = random_logps(method, groups, seed)
    leaf = logp.clone().requires_grad_()
    loss = replay_paper(batch, leaf, 0.2)
    (gradient,) = torch.autograd.grad(loss, leaf)
    found = weights_of(method, batch, logp)
    torch.testing.assert_close(found.weights, -gradient, rtol=0, atol=1e-8)
    assert found.logged == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_without_anything_remembered_replay_is_an_unclipped_dr_grpo_over_tokens(seed: int) -> None:
    def paper(groups: list[list[Line]]) -> Tensor:
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for g in groups:
            mean = statistics.fmean(line.reward for line in g)
            for line in g:
                total = total - sum((line.reward - mean) * (x - o).exp() for x, o in zip(line.logp, line.old, strict=True))
                tokens += len(line)
        return total / tokens

    agrees(load_method("replay", num_iterations=2), paper, random_groups(seed, own=4), seed)


def test_a_behaviour_of_density_1_is_luffys_shaping() -> None:
    logp = of([[0.9, 0.4, 0.01]]).log()
    batch = prepared(load_method("replay"), [group(answer("OOO", 1.0))])
    batch = batch.with_columns(behaviour_logp=torch.zeros_like(logp))
    torch.testing.assert_close(shaped_behaviour(0.1)(logp, batch, batch.trained), shaped(0.1)(logp, batch, batch.trained))
    with pytest.raises(ValueError, match="gamma"):
        shaped_behaviour(0.0)


def success(name: str, *rewards: float, logp: float = -0.5) -> Group:
    g = rolled(name, *rewards)
    own = tuple(replace(t, behaviour_logp=(math.nan, logp), policy_version=0) for t in g.trajectories)
    return replace(g, trajectories=own)


def test_replay_remembers_successes_of_partly_solved_prompts() -> None:
    method = load_method("replay", per_prompt=2, num_generations=4)
    state: State = method.init()
    state = method.remember(state, [success("a", 1, 0, 0), success("b", 0, 0), success("c", 1, 1), success("d", 0.5, 0)])
    assert set(state["memory"]) == {"train:a", "train:d"} and state["active"], "4 of 9 is more than 0.35"
    assert state["memory"]["train:a"]["rate"] == pytest.approx(1 / 3) and len(state["memory"]["train:a"]["kept"]) == 1
    state = method.remember(state, [success("a", 1, 1, 0, logp=-0.1)])
    assert [k["behaviour_logp"] for k in state["memory"]["train:a"]["kept"]] == [[-0.1], [-0.1]], "the last two"
    state = method.remember(state, [success("a", 0, 0)])
    assert state["memory"]["train:a"]["rate"] == 0 and len(state["memory"]["train:a"]["kept"]) == 2
    assert draw({**state, "seed": 0}, 5, 0.5, 1.0) == ["train:d"], "what is never solved now is not drawn"
    state = method.remember(state, [success("d", 1, 1)])
    assert set(state["memory"]) == {"train:a"}, "what is always solved is left"


def test_replay_forgets_the_prompts_seen_longest_ago() -> None:
    method = load_method("replay", capacity=2)
    state: State = method.init()
    for step, name in enumerate("abc"):
        state = method.update(method.remember(state, [success(name, 1, 0)]), {})
        assert state["step"] == step + 1
    assert set(state["memory"]) == {"train:b", "train:c"}


def test_replay_waits_until_enough_is_solved_and_then_stays() -> None:
    method = load_method("replay", start_rate=0.5, replay_ratio=0.5, num_generations=4)
    examples = {"train:a": Example("train:a", "", (1,))}
    state = ready(method)
    state = dict(method.remember(state, [success("a", 1, 0, 0)]))
    assert method.plan.recall is not None and method.plan.recall(state, examples.__getitem__) == ()
    state = dict(method.remember(state, [success("a", 1, 0)]))
    [found] = method.plan.recall(state, examples.__getitem__)
    [kept] = found.trajectories
    assert (kept.replayed, kept.reward, found.stream) == (True, 1.0, "train")
    assert method.plan.next(found, state) == (Request(3),)
    fresh = replace(found, trajectories=(kept, answer("O", 0.0)))
    assert method.plan.next(fresh, state) == ()
    assert method.plan.next(replace(found, trajectories=()), state) == (Request(4),)
    state = dict(method.remember(state, [success("b", 0, 0)]))
    assert state["active"]


def test_a_share_of_a_steps_prompts_is_replayed() -> None:
    """Half or all of four prompts, where four are remembered; a step without scores neither begins replay nor ends anything."""
    for ratio, n in ((0.5, 2), (1.0, 4)):
        method = load_method("replay", replay_ratio=ratio)
        assert method.plan.recall is not None
        waiting = ready(method, **method.remember(ready(method), [rolled("a", None)]))
        assert not waiting["active"] and waiting["memory"] == {}
        state = dict(method.remember(waiting, [success(name, 1, 0) for name in "abcd"]))
        assert len(method.plan.recall(state, lambda name: Example(name, "", (1,)))) == n


def test_a_replayed_group_keeps_its_stream() -> None:
    """A stage may draw the plan's `train` from a stream of another name, which the ids of its examples start with."""
    method = load_method("replay", num_generations=2, replay_ratio=1.0)
    example = Example("prompts/a.jsonl:0@3", "", (1,))
    state = ready(method, **method.remember(method.init(), [replace(success("a", 1, 0), example=example)]))
    assert method.plan.recall is not None
    [found] = method.plan.recall(state, {"prompts/a.jsonl:0": example}.__getitem__)
    assert found.stream == "train"


def test_replay_draws_prompts_by_their_rate_each_once() -> None:
    """Three rates; two prompts share one. Of single draws the shares are normal densities, a rate's shared by its prompts."""
    memory = {"train:a": 0.5, "train:b": 0.5, "train:c": 0.9, "train:d": 0.1}
    state = {"memory": {n: {"rate": r, "kept": []} for n, r in memory.items()}, "seed": 0}
    density = {r: math.exp(-(((r - 0.5) / 0.3) ** 2) / 2) for r in (0.5, 0.9, 0.1)}
    counts = dict.fromkeys(memory, 0)
    for step in range(3000):
        [name] = draw({**state, "step": step}, 1, 0.5, 0.3)
        counts[name] += 1
    expected = {"train:a": density[0.5] / 2, "train:b": density[0.5] / 2, "train:c": density[0.9], "train:d": density[0.1]}
    total = sum(density.values())
    assert all(counts[n] / 3000 == pytest.approx(expected[n] / total, abs=0.03) for n in memory)
    whole = draw({**state, "step": 0}, 9, 0.5, 0.3)
    assert sorted(whole) == sorted(memory)
    turned = {"memory": dict(reversed(state["memory"].items())), "seed": 0, "step": 0}  # type: ignore[call-overload]
    assert draw(turned, 9, 0.5, 0.3) == whole, "the order of a dictionary that was saved changes nothing"


def test_of_two_replayed_prompts_the_second_has_the_same_chances_of_its_rate() -> None:
    """Two prompts of rate 1/2 and many of 1/4, alike far from the target: whichever came first, half of the draws are of 1/2."""
    memory = {f"train:{i}": {"rate": 0.5 if i < 2 else 0.25, "kept": []} for i in range(42)}
    found = [0, 0, 0]
    for step in range(2000):
        names = draw({"memory": memory, "seed": 0, "step": step}, 2, 0.375, 1.0)
        found[sum(memory[n]["rate"] == 0.5 for n in names)] += 1
    assert [n / 2000 for n in found] == pytest.approx([0.25, 0.5, 0.25], abs=0.035)


def test_the_likeliest_rollout_is_replayed() -> None:
    kept = [{"behaviour_logp": x} for x in ([-1.0, -1.0], [None, -0.5], [-0.5, -0.5])]
    assert likeliest(kept) is kept[1]


# --- which prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["solve_rate_selection", "difficulty_curriculum", "rollout_selection"])
def test_selections_have_grpos_terms(name: str) -> None:
    """Whatever they choose, what is chosen weighs as in GRPO."""
    settings = {"epsilon": 0.1, "num_iterations": 2, "beta": 0.01}
    method = load_method(name, **settings, **({"keep": 4, "num_generations": 4} if name == "rollout_selection" else {}))
    grpo = load_method("grpo", **settings)
    groups = random_groups(1, own=4)
    logp, batch = random_logps(grpo, groups, 1)
    one, other = weights_of(method, batch, logp), weights_of(grpo, batch, logp)
    assert torch.equal(one.weights, other.weights) and one.logged == other.logged
    assert torch.equal(method.advantage(batch), grpo.advantage(batch)) and method.reference == grpo.reference


def test_prompts_are_drawn_by_the_share_solved_last() -> None:
    method = load_method("solve_rate_selection", lowest=0.25, highest=0.75, revisit=0.0)
    groups = [rolled("a", 0, 0, 0, 0), rolled("b", 1, 0, 0, 0), rolled("c", 1, 1, 1, None), rolled("d", None)]
    state = {**method.remember(method.init(), groups), "seed": 0}
    assert state["rates"] == {"train:a": 0.0, "train:b": 0.25, "train:c": 1.0}
    assert method.plan.wants is not None
    wanted = [n for n in "abcde" if method.plan.wants(Example(f"train:{n}", "", (1,)), state)]
    assert wanted == ["b", "d", "e"], "in the band, or unknown"
    later = {**method.remember(state, [rolled("a", 1, 1, 0, 0), rolled("b", 0)]), "seed": 0}
    assert method.plan.wants(Example("train:a", "", (1,)), later) and not method.plan.wants(Example("train:b", "", (1,)), later)


def test_a_prompt_outside_the_band_is_looked_at_again_now_and_then() -> None:
    method = load_method("solve_rate_selection", revisit=0.1)
    assert method.plan.wants is not None
    state = {**method.remember(method.init(), [rolled("a", 0)]), "seed": 5}
    drawn = [method.plan.wants(Example("train:a", "", (1,)), {**state, "step": step}) for step in range(2000)]
    assert statistics.fmean(drawn) == pytest.approx(0.1, abs=0.02)
    assert drawn == [method.plan.wants(Example("train:a", "", (1,)), {**state, "step": step}) for step in range(2000)]


def test_the_target_difficulty_follows_the_reward() -> None:
    """50 tanh(2 (1 - 0.5)) = 38.08 up from 0, the same again, then at the top; a reward of 0.5 leaves it."""
    method = load_method("difficulty_curriculum")
    state: State = method.init()
    targets = []
    for reward in (1.0, 1.0, 1.0, 0.5, 0.0, math.nan):
        state = method.update(state, {"reward": reward})
        targets.append(state["target"])
    step = 50 * math.tanh(1.0)
    assert targets == pytest.approx([step, 2 * step, 100, 100, 100 - step, 100 - step])
    assert method.update(state, {})["target"] == state["target"], "a step without rewards"


def test_prompts_near_the_target_are_drawn() -> None:
    """Solve rates 1, 0.5 and 0 are difficulties 0, 50 and 100."""
    method = load_method("difficulty_curriculum", initial_target=60.0, width=10.0, revisit=0.0)
    assert method.plan.wants is not None
    state = {**method.remember(method.init(), [rolled("a", 1), rolled("b", 1, 0), rolled("c", 0)]), "seed": 0}
    wanted = {
        t: [n for n in "abcd" if method.plan.wants(Example(f"train:{n}", "", (1,)), {**state, "target": t})]
        for t in (60, 9, 95)
    }
    assert wanted == {60: ["b", "d"], 9: ["a", "d"], 95: ["c", "d"]}


def test_a_column_may_say_how_difficult_rows_are() -> None:
    method = load_method("difficulty_curriculum", column="level", initial_target=50.0, width=5.0, revisit=0.0)
    assert method.plan.wants is not None
    state = {**method.remember(method.init(), [rolled("a", 1)]), "seed": 0}
    assert state["rates"] == {}
    rows = [Example(f"train:{i}", "", (1,), columns={"level": v}) for i, v in enumerate((45, 55.0, 56, 0))]
    assert [method.plan.wants(e, state) for e in rows] == [True, True, False, False]
    for bad in (None, "5", 101, -1, True):
        with pytest.raises(UserError, match=r"rows.jsonl:7.*'level'.*0 to 100"):
            method.plan.wants(Example("train:9", "", (1,), columns={"level": bad}, where="rows.jsonl:7"), state)


# --- which rollouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_most_varied_subset_is_the_best_of_all_subsets(seed: int) -> None:
    """By trying all of them."""
    rng = random.Random(seed)
    rewards = [rng.choice((0.0, 1.0, 0.5, rng.random())) for _ in range(8)]
    for n in range(1, 9):
        chosen = most_varied(rewards, n)
        assert len(set(chosen)) == n and chosen == sorted(chosen)
        best = max(statistics.pvariance(c) for c in itertools.combinations(rewards, n))
        assert statistics.pvariance([rewards[i] for i in chosen]) == pytest.approx(best)


def test_rollout_selection_by_hand() -> None:
    """Of rewards 1, 0.5, 0, 0.25 the two extremes are kept: A of +-0.7071, half for two sequences."""
    method = load_method("rollout_selection", num_generations=4, keep=2)
    groups = [group(answer("OO", 1.0), answer("O", 0.5), answer("O", 0.0), answer("O", 0.25))]
    found = weights_of(method, prepared(method, groups), torch.full((2, 2), -1.0))
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    torch.testing.assert_close(found.weights, of([[a / 4, a / 4], [-a / 2, 0]]))
    assert most_varied([1.0] * 5, 2) == [3, 4] and most_varied([0.1 + 1e-12] + [0.1] * 7, 2) == [0, 7]


# --- ReLIFT -----------------------------------------------------------------------------------------------------------------


def demonstrated(name: str, n: int = 3) -> Example:
    source = (Source.PROMPT,) + (Source.EXPERT,) * n
    return Example(f"train:{name}", "", (1,), (Trajectory(tuple(range(1, n + 2)), source),))


@pytest.mark.parametrize("name", ["relift", "mifo"])
def test_unsolved_prompts_are_buffered_and_their_demonstrations_imitated_in_a_step_of_their_own(name: str) -> None:
    method = load_method(name, buffer_size=2, num_generations=4)
    plan, state = method.plan, ready(method)
    assert plan.recall is not None
    assert plan.streams(state) == {"train": 1.0} and plan.recall(state, demonstrated) == []
    state = dict(method.remember(state, [rolled("a", 0, 0), rolled("b", 1, 0), rolled("c", None, None)]))
    assert state["buffer"] == ["train:a"] and not state["imitated"], "without a score nobody knows"
    assert plan.streams(state) == {"train": 1.0} and plan.recall(state, demonstrated) == [], "one is not yet two"
    state = dict(method.remember(state, [rolled("d", 0), rolled("e", 0), rolled("f", 0.0)]))
    assert state["buffer"] == ["train:a", "train:d", "train:e", "train:f"] and not state["imitated"]
    assert plan.streams(state) == {}
    groups = plan.recall(state, lambda n: demonstrated(n.removeprefix("train:")))
    assert [g.example.id for g in groups] == ["train:a", "train:d"]
    assert all(g.trajectories == g.example.expert and plan.next(g, state) == () for g in groups)
    state = dict(method.update(method.remember(state, groups), {}))
    assert state["buffer"] == ["train:e", "train:f"] and state["imitated"], "the rest waits for its turn"
    assert plan.next(Group(demonstrated("x"), ()), state) == (Request(4),)


def test_relift_by_hand() -> None:
    """A step of rollouts: ratios 1 and e^0.4 > 1.28 (closed), A = +-1/2, three tokens. One of demonstrations: -log pi over five."""
    method = load_method("relift", num_iterations=2)
    logp = torch.full((2, 2), -1.0, dtype=torch.float64)
    old = of([[-1.0, -1.4], [-1.0, -1.0]])
    rl = weights_of(method, prepared(method, [group(answer("OO", 1.0), answer("O", 0.0))], old_logp=old), logp)
    torch.testing.assert_close(rl.weights, of([[0.5, 0], [-0.5, 0]]) / 3)
    assert rl.logged == pytest.approx((-0.5 - 0.5 * 1.28 + 0.5) / 3)
    demos = [group(answer("EE"), name="a"), group(answer("EEE"), name="b")]
    sft = weights_of(method, prepared(method, demos), torch.full((2, 3), -2.0))
    torch.testing.assert_close(sft.weights, of([[0.2, 0.2, 0], [0.2, 0.2, 0.2]]))
    assert sft.logged == pytest.approx(2.0)


def relift_paper(groups: list[list[Line]]) -> Tensor:
    """arXiv:2506.07527: GRPO without std over tokens where there are rollouts, negative log-likelihood where there are none."""
    own, demo = [], []
    for g in groups:
        mean = statistics.fmean(line.reward for line in g)
        for line in g:
            demo += line.logp if line.expert else []
            own += (
                [] if line.expert else [((x - o).exp(), line.reward - mean) for x, o in zip(line.logp, line.old, strict=True)]
            )
    rl = sum(-torch.minimum(a * r, a * r.clamp(0.8, 1.28)) for r, a in own) / len(own) if own else torch.zeros(())
    return rl - sum(demo) / len(demo) if demo else rl


@pytest.mark.parametrize("seed", range(3))
def test_relifts_second_implementation(seed: int) -> None:
    method = load_method("relift", num_iterations=2)
    agrees(method, relift_paper, random_groups(seed, own=4), seed)
    agrees(method, relift_paper, random_groups(seed, demonstration=True), seed)


@pytest.mark.parametrize("seed", range(2))
def test_relift_is_grpo_without_std_and_plain_sft(seed: int) -> None:
    """In a step of rollouts and one of demonstrations, both of which are held to TRL's losses elsewhere."""
    relift = load_method("relift", num_iterations=2, minibatches=1)
    grpo = load_method("grpo", beta=0.0, scale_rewards="none", average="tokens", epsilon_high=0.28, num_iterations=2)
    for other, groups in ((grpo, random_groups(seed, own=4)), (load_method("sft"), random_groups(seed, demonstration=True))):
        logp, batch = random_logps(relift, groups, seed)
        one, two = weights_of(relift, batch, logp), weights_of(other, batch, logp)
        torch.testing.assert_close(one.weights, two.weights, rtol=0, atol=1e-12)
        assert one.logged == pytest.approx(two.logged)


# --- MIFO -------------------------------------------------------------------------------------------------------------------


def looked(batch: Batch, entropy: Tensor) -> Any:
    return lambda other, **which: Scores(torch.zeros_like(entropy), {"entropy": entropy})


def test_mifo_imitates_where_the_policy_is_least_sure() -> None:
    """Half of three tokens is two (1.5), of two one; entropies of 3, 1, 2 and 1, 1: weights 1/3 on the three chosen."""
    method = load_method("mifo", entropy_share=0.5)
    batch = prepared(method, [group(answer("EEE"), name="a"), group(answer("EE"), name="b")])
    entropy = rectangle(of([[3, 1, 2], [1, 1, 0]]), batch, outside=9.0)
    column = method.columns["unsure"](looked(batch, entropy), batch)
    assert column[:, 1:].tolist() == [[1, 0, 1], [1, 0, 0]], "of equal ones the first"
    found = weights_of(method, batch.with_columns(unsure=column), torch.full((2, 3), -2.0))
    torch.testing.assert_close(found.weights, of([[1, 0, 1], [1, 0, 0]]) / 3)
    assert found.logged == pytest.approx(2.0)
    unread = [group(answer("O", 1.0), answer("O", 0.0))]
    rollouts = prepared(method, unread)
    assert float(method.columns["unsure"](lambda b: pytest.fail("no demonstrations, no pass"), rollouts).abs().sum()) == 0


@pytest.mark.parametrize("seed", range(3))
def test_mifos_tokens_by_sorting_each_row(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    entropy, inside = torch.rand(5, 9, generator=generator), torch.rand(5, 9, generator=generator) < 0.6
    found = least_sure(entropy, inside, 0.4)
    for r in range(5):
        places = sorted((t for t in range(9) if inside[r, t]), key=lambda t: -float(entropy[r, t]))
        wanted = set(places[: max(round(0.4 * len(places)), 1)] if places else [])
        assert {t for t in range(9) if found[r, t]} == wanted


@pytest.mark.parametrize("seed", range(3))
def test_mifos_second_implementation(seed: int) -> None:
    """Token by token, with entropies at random."""
    method = load_method("mifo", num_iterations=2)
    for groups in (random_groups(seed, own=4), random_groups(seed, demonstration=True)):
        logp, batch = random_logps(method, groups, seed)
        entropy = rectangle(torch.rand(logp.shape, generator=torch.Generator().manual_seed(seed)), batch)
        batch = batch.with_columns(unsure=method.columns["unsure"](looked(batch, entropy), batch))
        found = weights_of(method, batch, logp)
        if bool((batch.source == int(Source.POLICY)).any()):
            loss, weights = gradient_of(relift_paper, batch, logp)
            torch.testing.assert_close(found.weights, weights, rtol=0, atol=1e-8)
            assert found.logged == pytest.approx(loss)
            continue
        expected = torch.zeros_like(logp)
        for r in range(len(batch)):
            n = int(batch.length[r]) - 1
            places = sorted(range(n), key=lambda t: -float(entropy[r, t + 1]))[: max(round(0.2 * n), 1)]
            expected[r, places] = 1.0
        torch.testing.assert_close(found.weights, expected / expected.sum(), rtol=0, atol=1e-8)


def test_mifo_on_all_tokens_without_freezing_is_relift() -> None:
    mifo, relift = load_method("mifo", entropy_share=1.0, freeze_share=0.0), load_method("relift", minibatches=1)
    groups = random_groups(2, demonstration=True)
    logp, batch = random_logps(relift, groups, 2)
    column = mifo.columns["unsure"](looked(batch, torch.rand(batch.tokens.shape)), batch)
    one, other = weights_of(mifo, batch.with_columns(unsure=column), logp), weights_of(relift, batch, logp)
    assert torch.equal(one.weights, other.weights) and mifo.updates == relift.updates
    assert mifo.grad_mask is not None and not mifo.grad_mask({**mifo.init(), "buffer": ["a"] * 128, "moved": {"w": 1.0}})("w")


def test_mifo_freezes_what_moved_most_in_the_last_rl_phase() -> None:
    """Of four parameters half; a phase ends with an imitation, of which only half of the importance is left in the next."""
    method = load_method("mifo", buffer_size=1, freeze_share=0.5, history=0.5)
    assert method.grad_mask is not None and method.movement is not None
    state = dict(method.init())
    assert method.movement(state), "the first phase begins at once"

    def after(state: dict[str, Any], groups: Sequence[Group], **moved: float) -> dict[str, Any]:
        observed = {"reward": 0.0, **{f"moved/{k}": v for k, v in moved.items()}}
        return dict(method.update(method.remember(state, groups), observed))

    state = after(state, [rolled("a", 1)], a=1.0, b=2.0, c=3.0, d=4.0)
    assert not method.movement(state) and not any(method.grad_mask(state)(n) for n in "abcd"), "RL freezes nothing"
    state = after(state, [rolled("a", 0)], a=4.0, b=3.0, c=2.0, d=1.0)
    assert [n for n in "abcd" if method.grad_mask(state)(n)] == ["a", "b"], "the distance over the phase, at its end"
    state = after(state, [rolled("a")], a=9.0, b=9.0, c=9.0, d=9.0)
    assert state["moved"] == {}, "another imitation at once would count it twice"
    assert method.movement(state) and state["past"] == {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}, "imitation is no part of it"
    state = after(state, [rolled("b", 0)], a=0.0, b=0.6, c=0.2, d=1.8)
    assert importance(state, 0.5) == pytest.approx({"a": 2.0, "b": 2.1, "c": 1.2, "d": 2.3})
    assert [n for n in "abcd" if method.grad_mask(state)(n)] == ["b", "d"]
    assert most_important({"b": 1.0, "a": 1.0, "c": 0.0}, 0.4) == {"a"}, "of equal ones the first by name"


# --- BREAD ------------------------------------------------------------------------------------------------------------------


def test_bisection_by_brute_force() -> None:
    """Where success rises along the demonstration, the search finds a place in the band if there is one on its way, and looks at
    few."""
    rng = random.Random(0)
    for _ in range(300):
        places = sorted(rng.sample(range(1, 60), rng.randint(0, 9)))
        truth = dict(zip(places, sorted(rng.choice((0.0, 0.125, 0.5, 1.0)) for _ in places), strict=True))
        known: dict[int, float] = {}
        while (asked := bisect(known, places, 0.25, 0.75)) is not None:
            assert asked not in known
            known[asked] = truth[asked]
        assert len(known) <= max(len(places), 1).bit_length()
        found, enough = min((p for p in known if known[p] >= 0.25), default=None), [p for p in places if truth[p] >= 0.25]
        assert (found is None) == (not enough)
        if found is not None:
            assert truth[found] <= 0.75 or found == enough[0], "too easy only where nothing harder works"


def played(method: Method, example: Example, solves: dict[int, Sequence[float]]) -> tuple[Group, list[tuple[int, int]]]:
    """All rounds of a group whose rollouts have these rewards by the length of what they start from; and the requests."""
    asked: list[tuple[int, int]] = []
    g = Group(example, ())
    while requests := method.plan.next(g, ready(method)):
        [request] = requests
        n = len(request.prefix)
        assert request.prefix == example.expert[0].response[:n]
        asked.append((request.n, n))
        new = tuple(answer("E" * n + "O" * 2, r) for r in solves[n])
        g = replace(g, trajectories=(*g.trajectories, *new))
    return g, asked


def test_bread_searches_only_where_nothing_is_solved() -> None:
    method, example = load_method("bread", num_generations=4), demonstrated("a", 20)
    g, asked = played(method, example, {0: (0, 0, 1, 0)})
    assert asked == [(4, 0)] and method.select(g, {}) == g


def test_bread_goes_on_from_the_shortest_beginning_in_the_band() -> None:
    """Twenty tokens in ten parts end at 2, 4, ..., 18. Looked at are 10 (too little), 16 (too much) and 12 (in the band)."""
    method, example = load_method("bread", num_generations=4), demonstrated("a", 20)
    zeros, ones = (0,) * 4, (1,) * 4
    g, asked = played(method, example, {0: zeros, 10: zeros, 14: ones, 12: (1, 0, 0, 0)})
    assert asked == [(4, 0), (4, 10), (4, 14), (4, 12)] and len(g.trajectories) == 16
    kept = method.select(g, {})
    assert kept is not None and [t.reward for t in kept.trajectories] == [1, 0, 0, 0]
    assert all(t.source.count(Source.EXPERT) == 12 for t in kept.trajectories)
    batch = prepared(method, [g])
    found = weights_of(method, batch, torch.full((4, 14), -1.0))
    alone = weights_of(
        load_method("grpo", beta=0.0), prepared(load_method("grpo", beta=0.0), [kept]), torch.full((4, 14), -1.0)
    )
    assert torch.equal(found.weights, alone.weights) and float(found.weights[:, :12].abs().max()) == 0
    a = 0.75 / (0.5 + 1e-6)
    assert found.weights[0, 12:].tolist() == pytest.approx([a / 8] * 2)


def test_bread_leaves_out_what_was_solved_too_rarely() -> None:
    method, example = load_method("bread", num_generations=4, lowest=0.5), demonstrated("a", 20)
    g, asked = played(method, example, {0: (0,) * 4, 10: (1, 0, 0, 0), 14: (1,) * 4, 12: (1, 1, 0, 0)})
    kept = method.select(g, {})
    assert (
        [n for _, n in asked] == [0, 10, 14, 12] and kept is not None and kept.trajectories[0].source.count(Source.EXPERT) == 12
    )


def test_bread_takes_more_than_enough_over_nothing_and_keeps_the_group_where_nothing_helps() -> None:
    method, example = load_method("bread", num_generations=2), demonstrated("a", 20)
    zeros, ones = (0, 0), (1, 1)
    easy, asked = played(method, example, {0: zeros, 10: ones, 4: zeros, 6: zeros, 8: ones})
    kept = method.select(easy, {})
    assert (
        [n for _, n in asked] == [0, 10, 4, 6, 8] and kept is not None and kept.trajectories[0].source.count(Source.EXPERT) == 8
    )
    hard, asked = played(method, example, {0: zeros, 10: zeros, 14: zeros, 16: zeros, 18: zeros})
    kept = method.select(hard, {})
    assert len(asked) == 5 and kept is not None and [t.source.count(Source.EXPERT) for t in kept.trajectories] == [0, 0]
    short, asked = played(method, demonstrated("b", 1), {0: zeros})
    assert asked == [(2, 0)] and method.select(short, {}) == short, "one token cannot be cut"


@pytest.mark.parametrize("seed", range(2))
def test_breads_second_implementation(seed: int) -> None:
    """GRPO on what the rollouts wrote themselves."""

    def paper(groups: list[list[Line]]) -> Tensor:
        total, n = torch.zeros((), dtype=torch.float64), sum(map(len, groups))
        for g in groups:
            rewards = [line.reward for line in g]
            for line in g:
                a = (line.reward - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6)
                ratios = [(x - o).exp() for x, o in zip(line.logp, line.old, strict=True)]
                total = total - sum(torch.minimum(a * r, a * r.clamp(0.8, 1.2)) for r in ratios) / len(ratios) / n
        return total

    agrees(load_method("bread", num_iterations=2), paper, random_groups(seed, own=4), seed)


# --- SRL --------------------------------------------------------------------------------------------------------------------


def spell(tokens: tuple[int, ...]) -> str:
    return "".join("</think>" if t == 0 else " " if t == 1 else chr(96 + t) for t in tokens)


def expert(*tokens: int) -> Example:
    source = (Source.PROMPT,) + (Source.EXPERT,) * len(tokens)
    return Example("train:a", "", (1,), (Trajectory((1, *tokens), source),))


def written(shown: int, *tokens: int) -> Trajectory:
    source = (Source.PROMPT,) + (Source.EXPERT,) * shown + (Source.POLICY,) * len(tokens)
    return Trajectory((1, *range(2, shown + 2), *tokens), source)


def test_srl_rewards_the_likeness_to_the_experts_next_step() -> None:
    """Six tokens b..g in three steps. After the first, the expert writes "de": "de" is 1, "dx" 2 * 1 / 4, "dex" 2 * 2 / 5."""
    method = load_method("srl", steps=3)
    example = expert(2, 3, 4, 5, 6, 7)
    assert method.plan.reward is not None

    def score(shown: int, *tokens: int) -> float | None:
        assert method.plan.reward is not None
        return method.plan.reward(Group(example, ()), written(shown, *tokens), spell)

    assert score(2, 24, 24, 0, 4, 5) == 1.0, "what comes before the end of the thought does not count"
    assert score(2, 0, 4, 24) == 0.5 and score(2, 0, 4, 5, 24) == 0.8 and score(2, 0, 1, 4, 5, 1) == 1.0
    assert score(0, 0, 2, 3) == 1.0 and score(4, 0, 6, 7) == 1.0 and score(4, 0, 4, 5) == 0.0
    assert score(2, 4, 5) == -1.0, "no end of the thought"
    direct = load_method("srl", steps=3, think_end="")
    assert direct.plan.reward is not None and direct.plan.reward(Group(example, ()), written(2, 4, 5), spell) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_srls_similarity_is_twice_the_matching_characters_over_all(seed: int) -> None:
    from crosstrain.methods.srl import similarity

    rng = random.Random(seed)
    one, other = ("".join(rng.choice("ab c") for _ in range(rng.randint(1, 400))) for _ in range(2))
    blocks = SequenceMatcher(None, one.strip(), other.strip(), autojunk=False).get_matching_blocks()
    assert similarity(one, other) == 2 * sum(b.size for b in blocks) / len(one.strip() + other.strip())
    assert similarity("ab" * 300, "ab" * 300 + "c") > 0.99, "long texts of few characters are not taken for junk"
    assert similarity("", " ") == 1.0


def test_srl_starts_from_every_step_equally_often_and_never_from_its_end() -> None:
    method, example = load_method("srl", steps=3, num_generations=5), expert(2, 3, 4, 5, 6, 7)
    lengths = []
    for step in range(900):
        [request] = method.plan.next(Group(example, ()), {"seed": 0, "step": step})
        assert request.n == 5 and request.prefix == (2, 3, 4, 5, 6, 7)[: len(request.prefix)]
        lengths.append(len(request.prefix))
    assert all(lengths.count(n) / 900 == pytest.approx(1 / 3, abs=0.05) for n in (0, 2, 4)) and set(lengths) == {0, 2, 4}
    assert method.plan.next(Group(example, (written(2, 0),)), {"seed": 0, "step": 0}) == ()


def test_srls_steps_may_end_with_a_token() -> None:
    method, example = load_method("srl", steps=0, step_end=4), expert(2, 4, 3, 5, 4)
    starts = {len(method.plan.next(Group(example, ()), {"seed": 0, "step": s})[0].prefix) for s in range(60)}
    assert starts == {0, 2}, "a last token that ends a step begins none"
    assert method.plan.reward is not None
    assert method.plan.reward(Group(example, ()), written(2, 0, 3, 5, 4), spell) == 1.0


def test_srl_needs_no_verifier_and_drops_groups_that_are_all_about_as_good() -> None:
    method = load_method("srl", min_reward_std=0.1)
    close = group(answer("O", 0.5), answer("O", 0.6), answer("O", 0.55))
    apart = group(answer("O", 0.5), answer("O", 0.9))
    assert method.select(close, {}) is None and method.select(apart, {}) == apart
    assert method.select(group(answer("O", 0.5), answer("O")), {}) is None, "one reward has no spread"
    equal = group(answer("O", 0.5), answer("O", 0.5))
    assert load_method("srl", min_reward_std=0.0).select(equal, {}) is None, "its spread has to be above 0"
    assert method.plan.max_draws == 10 and method.plan.needs_expert == "demonstration"


def test_srl_by_hand() -> None:
    """Rewards 0.9 and 0.5 are GRPO's: A of +-0.7071 on own tokens, what was shown has no weight."""
    method = load_method("srl")
    found = weights_of(method, prepared(method, [group(answer("EOO", 0.9), answer("EO", 0.5))]), torch.full((2, 3), -1.0))
    a = 0.2 / (math.sqrt(0.08) + 1e-6)
    torch.testing.assert_close(found.weights, of([[0, a / 4, a / 4], [0, -a / 2, 0]]), rtol=0, atol=1e-6)


# --- settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [
        ("replay", {"num_generations": 1}, "num_generations"),
        ("replay", {"replay_ratio": 0.0}, "replay_ratio"),
        ("replay", {"start_rate": 1.5}, "start_rate"),
        ("replay", {"rate_std": 0.0}, "rate_std"),
        ("replay", {"capacity": 0}, "capacity"),
        ("replay", {"gamma": -0.1}, "gamma"),
        ("solve_rate_selection", {"lowest": 0.8, "highest": 0.2}, "lowest"),
        ("solve_rate_selection", {"revisit": 1.1}, "revisit"),
        ("difficulty_curriculum", {"initial_target": 101.0}, "initial_target"),
        ("difficulty_curriculum", {"step_size": 0.0}, "step_size"),
        ("difficulty_curriculum", {"column": "level", "solved_above": 0.5}, "solved_above"),
        ("rollout_selection", {"keep": 65}, "keep"),
        ("bread", {"episodes": 1}, "episodes"),
        ("bread", {"lowest": 0.0}, "lowest"),
        ("srl", {"steps": 3, "step_end": 4}, "steps"),
        ("srl", {"steps": 0}, "steps"),
        ("srl", {"min_reward_std": -1.0}, "min_reward_std"),
        ("relift", {"buffer_size": 0}, "buffer_size"),
        ("relift", {"sft_coef": 0.0}, "sft_coef"),
        ("mifo", {"entropy_share": 0.0}, "entropy_share"),
        ("mifo", {"freeze_share": 1.0}, "freeze_share"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(name: str, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        load_method(name, **settings)


@pytest.mark.parametrize("name", ["relift", "mifo"])
def test_two_steps_of_imitation_never_follow_each_other(name: str) -> None:
    """However many prompts wait: a step of rollouts comes between."""
    method = load_method(name, num_generations=2, buffer_size=2)
    state, kinds = dict(method.init()), []
    for step in range(6):
        groups = [] if method.plan.streams(state) == {} else [rolled(f"{step}{i}", 0, 0) for i in range(4)]
        kinds.append("sft" if not groups else "rl")
        observed = {} if not groups else {"moved/w": 1.0}
        state = dict(method.update(method.remember(state, groups), observed))
    assert kinds == ["rl", "sft"] * 3


def test_mifo_remembers_an_importance_that_the_last_steps_did_not_move() -> None:
    assert importance({"past": {"a": 4.0, "b": 2.0}, "moved": {"b": 1.0}}, 0.5) == {"a": 2.0, "b": 2.0}
    assert importance({"past": {"a": 4.0}, "moved": {}}, 0.5) == {"a": 2.0}
