"""The loop: how many optimizer steps, what a step costs, when it stops, and what it refuses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.objective.terms import by, nll
from crosstrain.rollout.sampler import Sampling
from crosstrain.testing import ScriptedSampler, made_up_examples, made_up_rewards, tiny_model
from crosstrain.training.batching import to_batch
from crosstrain.training.collect import Truncation
from crosstrain.training.columns import add_columns
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine
from crosstrain.training.gradient import NonFinite
from crosstrain.training.loop import Progress, StageSettings, Step, minibatches, stage_progress, train_stage
from crosstrain.training.optimizer import Optimizer
from crosstrain.training.probe import product_weights
from crosstrain.training.score import lay_out
from crosstrain.types import Batch, Example, Group, Method, Per, Source, Updates
from tensors import equal


class Rows:
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        return [self.examples[(position + i) % len(self.examples)] for i in range(n)], position + n


class Run:
    """A stage on a tiny fp32 model with made-up data, counting AdamW's steps."""

    def __init__(self, method: Method, **settings: Any) -> None:
        engine = {k: settings.pop(k) for k in list(settings) if k in Engine.__dataclass_fields__}
        self.method = method
        self.model = engine.pop("model", None) or tiny_model(dtype=torch.float32)
        self.engine = Engine(
            **{
                "model": self.model,
                "parameters": 10,
                "layout": "shared",
                "device": torch.device("cpu"),
                "streams": {"train": Rows(made_up_examples(method))},
                "sampler": ScriptedSampler(),
                "rewards": made_up_rewards,
                "reference": lambda: contextlib.nullcontext(tiny_model(seed=1, dtype=torch.float32)),
                **engine,
            }
        )
        self.settings = StageSettings(**{"batch_size": 6, "learning_rate": 1e-3, "max_steps": 2, **settings})
        self.optimizer = Optimizer(self.model, "fp32")
        self.progress = Progress(state=method.init())

    def steps(self) -> list[Step]:
        return list(train_stage(self.engine, self.method, self.settings, self.optimizer, self.progress))

    def adamw_steps(self) -> int:
        return int(next((v for k, v in self.optimizer.moments().items() if k.endswith("/step")), torch.zeros(())))


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model: Any, before: dict[str, Tensor]) -> bool:
    return equal(dict(model.named_parameters()), before)


# --- how many optimizer steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "per_batch"),
    [
        ({}, 1),
        ({"num_iterations": 2}, 2),
        ({"minibatches": 2}, 2),
        ({"num_iterations": 2, "minibatches": 3}, 6),
        ({"minibatches": 4}, 4),
    ],
)
def test_inner_updates_are_optimizer_steps(settings: dict[str, int], per_batch: int) -> None:
    """Six groups cut into four minibatches are four steps (2, 2, 1 and 1 groups), not three."""
    run = Run(load_method("grpo", num_generations=2, beta=0.0, **settings))
    assert len(run.steps()) == 2
    assert run.adamw_steps() == 2 * per_batch == run.progress.optimizer_steps
    assert (run.progress.step, run.progress.stage_step) == (2, 2)


def test_more_minibatches_than_groups_are_as_many_as_there_are_groups() -> None:
    run = Run(load_method("grpo", num_generations=2, beta=0.0, minibatches=16), max_steps=1)
    run.steps()
    assert run.adamw_steps() == 6


def collected_batch(method: Method) -> Batch:
    from crosstrain.testing import made_up_batch

    return made_up_batch(method, tiny_model(dtype=torch.float32))


def test_minibatches_cut_by_group_and_use_every_row_once_per_epoch() -> None:
    method = load_method("grpo", num_generations=4, num_iterations=2, minibatches=2)
    batch = collected_batch(method)
    parts = list(minibatches(batch, method, seed=0, step=0))
    assert len(parts) == 4
    for epoch in (parts[:2], parts[2:]):
        assert sorted(g for p in epoch for g in p.group.tolist()) == batch.group.tolist()
        assert not set(epoch[0].group.tolist()) & set(epoch[1].group.tolist())
    again = list(minibatches(batch, method, seed=0, step=0))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(parts, again, strict=True))
    other = list(minibatches(batch, method, seed=1, step=0))
    assert any(not torch.equal(a.group, b.group) for a, b in zip(parts, other, strict=True))


def test_with_one_update_no_old_pass_is_made_and_with_two_it_is() -> None:
    for settings, old in (({}, False), ({"num_iterations": 2}, True)):
        method = load_method("grpo", num_generations=2, beta=0.0, **settings)
        run = Run(method)
        batch, cost = add_columns(run.engine, method, replace(collected_batch(method), columns={}), Cost())
        assert ("old_logp" in batch.columns) == old == (cost.processed_tokens > 0)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_second_epoch_sees_ratios_that_left_1(beta: float) -> None:
    """Clipped tokens are counted by the policy term's own gate: a KL term beside it still moves them."""
    method = load_method("grpo", num_generations=4, beta=beta, num_iterations=4, epsilon=0.01)
    (step,) = Run(method, learning_rate=1e-2, max_steps=1).steps()
    assert step.metrics["clip_ratio/region_mean"] > 0.1


# --- steps in which nothing is to be learned ------------------------------------------------------------------------


def all_equal(groups: list[Group]) -> list[Group]:
    return [replace(g, trajectories=tuple(replace(t, reward=1.0) for t in g.trajectories)) for g in groups]


def test_an_empty_step_moves_no_weight_and_is_counted() -> None:
    """DAPO on equal rewards keeps no group. Momentum from earlier steps must not move the weights either."""
    method = load_method("dapo", num_generations=2, minibatches=1, dynamic_sampling=2)
    run = Run(method, max_steps=1)
    run.steps()
    assert run.adamw_steps() == 1
    run.engine = replace(run.engine, rewards=all_equal)
    run.settings = replace(run.settings, max_steps=3)
    before, spent = weights(run.model), run.progress.cost
    steps = run.steps()
    assert unchanged(run.model, before) and run.adamw_steps() == 1
    assert [s.metrics["skipped_steps"] for s in steps] == [1.0, 2.0] and run.progress.skipped == 2
    assert all(s.metrics["frac_groups_dropped"] == 1.0 and "loss" not in s.metrics for s in steps)
    sampled = run.progress.cost.processed_tokens - spent.processed_tokens
    assert sampled > 0 and run.progress.cost.flops - spent.flops == 2 * 10 * sampled, "an empty step costs its sampling"


def test_a_step_whose_completions_are_all_masked_is_empty_too_and_costs_no_training() -> None:
    class Endless(ScriptedSampler):
        def sample(self, *args: Any, **kwargs: Any) -> Any:
            return [[replace(c, finished=False) for c in cs] for cs in super().sample(*args, **kwargs)]

    run = Run(load_method("rloo", num_generations=2), sampler=Endless(), truncation=Truncation("mask"), max_steps=1)
    before = weights(run.model)
    run.steps()
    assert unchanged(run.model, before) and run.progress.skipped == 1 and run.adamw_steps() == 0
    cost = run.progress.cost
    assert cost.flops == 2 * 10 * cost.processed_tokens, "no token went backward"


def test_equal_rewards_have_zero_gradient_but_are_not_an_empty_step() -> None:
    run = Run(load_method("grpo", num_generations=2, beta=0.0), rewards=all_equal, max_steps=1)
    before = weights(run.model)
    (step,) = run.steps()
    assert step.metrics["grad_norm"] == 0.0 and step.metrics["frac_reward_zero_std"] == 1.0
    assert unchanged(run.model, before) and run.progress.skipped == 0


# --- numbers that are none ------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_examples() -> None:
    nan = Method(
        terms=(replace(nll("demo", on=by(Source.EXPERT), per=Per(("own_tokens",))), value=lambda s, b, on: s.logp * math.nan),),
        plan=load_method("sft").plan,
    )
    run = Run(nan)
    before = weights(run.model)
    with pytest.raises(NonFinite, match=r"loss/demo is nan; examples: train:\d@0, train"):
        run.steps()
    assert unchanged(run.model, before)


def test_a_gradient_that_is_not_a_number_stops_the_run_before_the_weights_move() -> None:
    run = Run(load_method("sft"))
    name, parameter = next(iter(run.model.named_parameters()))
    parameter.register_hook(lambda g: g * math.inf)
    before = weights(run.model)
    with pytest.raises(NonFinite, match=r"gradient norm is (nan|inf); examples: train"):
        run.steps()
    assert unchanged(run.model, before), name


def test_what_a_term_reads_must_be_there_before_the_first_update() -> None:
    unknown = Method(terms=(replace(nll("demo", on=by(Source.EXPERT), per=Per(())), needs=frozenset({"mystery"})),))
    with pytest.raises(UserError, match="mystery, which nothing provides"):
        Run(unknown).steps()
    with pytest.raises(UserError, match="reference model"):
        Run(load_method("dpo"), reference=None).steps()


# --- budgets, schedule, cost ----------------------------------------------------------------------------------------


def test_a_stage_ends_by_steps_or_by_budget_whichever_comes_first() -> None:
    budget = {"max_steps": None, "budget_unit": "demonstrations", "budget_amount": 20.0}
    by_budget = Run(load_method("sft"), **budget)
    assert len(by_budget.steps()) == 4 and by_budget.progress.cost.demonstrations == 24
    by_steps = Run(load_method("sft"), **{**budget, "max_steps": 3})
    assert len(by_steps.steps()) == 3


def test_a_stage_counts_only_its_own_spending() -> None:
    run = Run(load_method("sft"), max_steps=None, budget_unit="demonstrations", budget_amount=12.0)
    run.progress.cost = run.progress.stage_cost = Cost(demonstrations=1000)
    assert len(run.steps()) == 2


@pytest.mark.parametrize(
    ("name", "unit"), [("sft", "generated_tokens"), ("grpo", "demonstrations"), ("dpo", "generated_tokens")]
)
def test_a_budget_that_the_method_never_spends_is_refused(name: str, unit: str) -> None:
    """It would never end."""
    with pytest.raises(UserError, match=f"a stage of {name} spends no {unit}"):
        Run(load_method(name), max_steps=None, budget_unit=unit, budget_amount=10.0).steps()


def test_the_learning_rate_follows_the_share_of_the_budget() -> None:
    """24 demonstrations in steps of 6: shares 0, 1/4, 1/2, 3/4."""
    settings = {"max_steps": None, "budget_unit": "demonstrations", "budget_amount": 24.0, "learning_rate": 1e-3}
    rates = [s.metrics["learning_rate"] for s in Run(load_method("sft"), lr_scheduler_type="linear", **settings).steps()]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    warm = [s.metrics["learning_rate"] for s in Run(load_method("sft"), warmup_steps=2, **settings).steps()]
    assert warm == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])


def test_progress_is_the_larger_of_both_shares() -> None:
    settings = StageSettings(1, 0.1, max_steps=4, budget_unit="flops", budget_amount=100.0)
    assert stage_progress(settings, Progress(stage_step=1, cost=Cost(flops=50.0))) == 0.5
    assert stage_progress(settings, Progress(stage_step=3, cost=Cost(flops=50.0))) == 0.75
    assert stage_progress(StageSettings(1, 0.1), Progress(stage_step=9)) == 0.0


def tokens_of(groups: list[Group]) -> int:
    """Prompts once per group, responses each."""
    return sum(len(g.example.prompt_tokens) + sum(len(t.response) for t in g.trajectories) for g in groups)


@pytest.mark.parametrize(
    ("make", "passes_forward", "passes_backward"),
    [
        (lambda: load_method("sft"), 0, 1),
        (lambda: load_method("dpo"), 1, 1),
        (lambda: load_method("rloo", num_generations=3), 0, 1),
        (lambda: load_method("grpo", num_generations=3), 1, 1),
        (lambda: load_method("grpo", num_generations=3, beta=0.0, num_iterations=3), 1, 3),
        (lambda: load_method("grpo", num_generations=3, num_iterations=2, minibatches=2), 2, 2),
    ],
    ids=["sft", "dpo", "rloo", "grpo", "old", "old and reference"],
)
def test_what_a_step_costs(make: Callable[[], Method], passes_forward: int, passes_backward: int) -> None:
    """Sampling 2 N, old and reference passes 2 N, updates 6 N per token; N = 10 here."""
    run = Run(make(), max_steps=1)
    (step,) = run.steps()
    trained = tokens_of(step.groups)
    own = [t for g in step.groups for t in g.by(Source.POLICY)]
    generated = sum(len(t.response) for t in own)
    sampled = generated + sum(len(g.example.prompt_tokens) for g in step.groups) if own else 0
    cost = run.progress.cost
    assert cost.generated_tokens == generated
    assert cost.processed_tokens == sampled + (passes_forward + passes_backward) * trained
    assert cost.flops == 2 * 10 * (sampled + passes_forward * trained) + 6 * 10 * passes_backward * trained
    expert = sum(len(g.by(Source.EXPERT)) for g in step.groups)
    assert cost.demonstrations == expert
    assert step.metrics["cost/processed_tokens"] == cost.processed_tokens


# --- what must not matter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "grpo", "luffy", "hpt", "dpo"])
def test_micro_batch_size_and_layout_change_no_weight_beyond_rounding(name: str) -> None:
    found = []
    for tokens, layout in ((8, "plain"), (64, "shared"), (4096, "shared")):
        reference = tiny_model(seed=1)
        exact = {"model": tiny_model(), "reference": lambda reference=reference: contextlib.nullcontext(reference)}
        run = Run(load_method(name), micro_batch_tokens=tokens, layout=layout, max_steps=2, **exact)
        run.steps()
        found.append(weights(run.model))
    for other in found[1:]:
        for parameter, value in found[0].items():
            torch.testing.assert_close(value, other[parameter], rtol=0, atol=1e-9, msg=lambda m, p=parameter: f"{p}: {m}")


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_seed_another() -> None:
    def final(seed: int) -> dict[str, Tensor]:
        run = Run(load_method("grpo", num_generations=2, minibatches=2), seed=seed)
        run.steps()
        return weights(run.model)

    one, again, other = final(0), final(0), final(1)
    torch.testing.assert_close(again, one, rtol=0, atol=0)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_state_is_updated_from_each_steps_metrics() -> None:
    seen: list[float] = []

    def update(state: Any, metrics: Any) -> dict[str, int]:
        seen.append(metrics["loss"])
        return {"steps": state["steps"] + 1}

    run = Run(replace(load_method("sft"), init=lambda: {"steps": 0}, update=update), max_steps=3)
    losses = [s.metrics["loss"] for s in run.steps()]
    assert run.progress.state == {"steps": 3} and seen == losses


def test_frozen_parameters_stand_still() -> None:
    method = replace(load_method("sft"), grad_mask=lambda state: lambda name: "layers.0" in name)
    run = Run(method)
    before = weights(run.model)
    run.steps()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any("layers.0" in name for name in moved)


def test_own_completions_are_trained_at_the_temperature_they_are_sampled_at() -> None:
    """The ratio pi / pi_old and the sampler's log-probs belong to one distribution; imitation stays at temperature 1."""
    entropies = {}
    for name in ("sft", "rloo"):
        for temperature in (1.0, 4.0):
            run = Run(load_method(name), sampling=Sampling(temperature=temperature), max_steps=1)
            entropies[name, temperature] = run.steps()[0].metrics["entropy"]
    assert entropies["sft", 1.0] == entropies["sft", 4.0]
    assert entropies["rloo", 4.0] > entropies["rloo", 1.0] + 0.05


def test_gradients_are_clipped_and_the_norm_before_it_is_logged() -> None:
    (step,) = Run(load_method("sft"), max_grad_norm=1e-3, max_steps=1).steps()
    assert step.metrics["grad_clipped"] == 1.0 and step.metrics["grad_norm"] > 1e-3
    (step,) = Run(load_method("sft"), max_grad_norm=0.0, max_steps=1).steps()
    assert step.metrics["grad_clipped"] == 0.0


# --- what is logged beside the objective ----------------------------------------------------------------------------


def test_the_parts_of_a_steps_time_are_logged_and_fit_into_it() -> None:
    run = Run(load_method("grpo", num_generations=2, num_iterations=2))
    for step in run.steps():
        parts = {name: value for name, value in step.metrics.items() if name.startswith("time/")}
        assert parts.keys() == {f"time/{part}" for part in ("sampling", "reward", "batch", "backward", "optimizer")}
        assert all(value > 0 for value in parts.values())
        assert sum(parts.values()) < step.metrics["step_time"]
    assert run.progress.tally.backward_seconds > 0
    imitating = Run(load_method("sft"), max_steps=1).steps()[0].metrics
    assert imitating["time/sampling"] == imitating["time/reward"] == 0.0 < imitating["time/backward"]


def test_the_tally_counts_forward_and_backward_of_every_update() -> None:
    once, twice = (Run(load_method("grpo", num_generations=2, beta=0.0, num_iterations=n), max_steps=1) for n in (1, 2))
    (step,), _ = once.steps(), twice.steps()
    lines = lay_out(to_batch(step.groups), "shared")
    body, head = product_weights(once.model)
    assert once.progress.tally.backward_flops == 6 * (body * lines.tokens.numel() + head * len(lines.target))
    assert len(lines.target) < lines.tokens.numel(), "the head sees predictions only"
    assert twice.progress.tally.backward_flops == 2 * once.progress.tally.backward_flops


@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_sampler_is_compared_with_the_weights_that_it_sampled_from(minibatches: int) -> None:
    """Over all own tokens, however many updates there are and however far they move the weights."""
    settings = {"learning_rate": 0.3, "max_steps": 1}
    (one,) = Run(load_method("grpo", num_generations=2), **settings).steps()
    (more,) = Run(load_method("grpo", num_generations=2, num_iterations=2, minibatches=minibatches), **settings).steps()
    name = "sampling/sampling_logp_difference/max"
    assert more.metrics[name] == pytest.approx(one.metrics[name], rel=1e-5)


def test_without_old_log_probs_only_the_first_update_compares() -> None:
    rloo, settings = load_method("rloo", num_generations=2), {"learning_rate": 0.3, "max_steps": 1}
    one, more = Run(rloo, **settings), Run(replace(rloo, updates=Updates(epochs=2)), **settings)
    (first,), (both,) = one.steps(), more.steps()
    for name in ("mean", "max"):
        key = f"sampling/sampling_logp_difference/{name}"
        assert both.metrics[key] == first.metrics[key]
    assert one.progress.tally.sampling("float32") == more.progress.tally.sampling("float32")
    assert one.progress.tally.compared == 1


# --- probes ---------------------------------------------------------------------------------------------------------


def test_probes_measure_each_terms_gradient_and_change_nothing_else() -> None:
    grpo = load_method("grpo", num_generations=3, beta=0.04)
    seen: list[dict[str, float]] = []

    def update(state: Any, metrics: Any) -> Any:
        seen.append({k: v for k, v in metrics.items() if k.startswith("grad_norm/")})
        return state

    probed = Run(replace(grpo, probes=("grad_norm/rl", "grad_norm/kl"), update=update))
    plain, rl, kl = Run(grpo), *(Run(replace(grpo, terms=(t,))) for t in grpo.terms)
    ended = [run.steps() for run in (probed, plain, rl, kl)]
    assert unchanged(probed.model, weights(plain.model))
    assert len(seen) == 2
    assert seen[0]["grad_norm/rl"] == pytest.approx(ended[2][0].metrics["grad_norm"], rel=1e-5)
    assert seen[0]["grad_norm/kl"] == pytest.approx(ended[3][0].metrics["grad_norm"], rel=1e-5)
    spent = [run.progress.cost.processed_tokens for run in (plain, probed)]
    assert spent[1] > spent[0], "two more passes forward and backward cost nothing"


def test_probes_draw_the_random_numbers_of_their_step_and_use_none_up() -> None:
    """Dropout and noise are drawn from torch's generator: a step that measures has those of one that does not."""

    def noise(embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        return embeddings + 0.1 * torch.randn_like(embeddings)

    plain = replace(load_method("grpo", num_generations=3, beta=0.0), embed=noise)
    runs = [Run(plain), Run(replace(plain, probes=("grad_norm/rl",)))]
    [none, [first, *_]] = [run.steps() for run in runs]
    assert unchanged(runs[1].model, weights(runs[0].model))
    assert first.metrics["grad_norm/rl"] == pytest.approx(none[0].metrics["grad_norm"], rel=1e-6)


def test_a_step_that_measures_no_probes_makes_and_counts_no_pass_for_them() -> None:
    """The state counts steps; the second of two measures. Until then it is as without probes, and costs as much."""
    grpo = replace(
        load_method("grpo", num_generations=3), init=lambda: {"step": 0}, update=lambda s, m: {"step": s["step"] + 1}
    )
    plain, every, second = (
        Run(method)
        for method in (
            grpo,
            replace(grpo, probes=("grad_norm/rl",)),
            replace(grpo, probes=("grad_norm/rl",), probing=lambda state: state["step"] == 1),
        )
    )
    lines = [[step.metrics for step in run.steps()] for run in (plain, every, second)]
    assert [["grad_norm/rl" in line for line in some] for some in lines] == [[False] * 2, [True] * 2, [False, True]]
    none, both, one = ([line["cost/processed_tokens"] for line in some] for some in lines)
    assert none[0] == one[0] < both[0] and one[1] - one[0] == both[1] - both[0]
    assert unchanged(second.model, weights(plain.model))


def test_an_unknown_probe_is_refused() -> None:
    with pytest.raises(UserError, match="unknown probe 'grad_norm/lr'; did you mean 'grad_norm/rl'"):
        Run(replace(load_method("rloo"), probes=("grad_norm/lr",))).steps()
