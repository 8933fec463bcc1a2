"""What a step takes, from a part of the first one: the numbers are those of the real step, and nothing is left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from crosstrain.methods import load_method
from crosstrain.testing import ScriptedSampler, made_up_examples, made_up_rewards, tiny_model
from crosstrain.training import first_step
from crosstrain.training.batching import distinct_tokens
from crosstrain.training.engine import Engine
from crosstrain.training.first_step import FirstStep, measure_first_step
from crosstrain.training.gradient import micro_batches
from crosstrain.training.loop import Progress, StageSettings, draw, make_batch, train_stage
from crosstrain.training.optimizer import Optimizer
from crosstrain.types import Batch, Example, Group, Method
from tensors import equal

BATCH_SIZE = 6


class Rows:
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        return [self.examples[(position + i) % len(self.examples)] for i in range(n)], position + n


def engine_for(method: Method, **more: Any) -> Engine:
    settings: dict[str, Any] = {
        "model": tiny_model(dtype=torch.float32),
        "parameters": 10,
        "layout": "shared",
        "device": torch.device("cpu"),
        "streams": {"train": Rows(made_up_examples(method, n=BATCH_SIZE))},  # so that every batch is the same
        "sampler": ScriptedSampler(),
        "rewards": made_up_rewards,
        "reference": lambda: contextlib.nullcontext(tiny_model(seed=1, dtype=torch.float32)),
        **more,
    }
    return Engine(**settings)


def measured(engine: Engine, method: Method) -> FirstStep:
    return measure_first_step(engine, method, Optimizer(engine.model, "fp32"), BATCH_SIZE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: load_method("sft"),
        lambda: load_method("dpo"),
        lambda: load_method("rloo", num_generations=3),
        lambda: load_method("grpo", num_generations=3, num_iterations=2, minibatches=2),
        lambda: load_method("dapo", num_generations=3),
        lambda: load_method("luffy", num_generations=3),
        lambda: load_method("hpt", num_generations=3),
        lambda: replace(load_method("grpo", num_generations=3), probes=("grad_norm/rl",)),
    ],
    ids=["sft", "dpo", "rloo", "grpo", "dapo", "luffy", "hpt", "probed"],
)
def test_a_step_is_expected_to_cost_what_the_first_one_costs(make: Callable[[], Method]) -> None:
    method = make()
    found = measured(engine_for(method), method).cost
    engine, progress = engine_for(method), Progress(state=method.init())
    settings = StageSettings(batch_size=BATCH_SIZE, learning_rate=1e-3, max_steps=1)
    list(train_stage(engine, method, settings, Optimizer(engine.model, "fp32"), progress))
    assert replace(found, seconds=0.0) == replace(progress.cost, seconds=0.0)
    assert found.seconds > 0


def test_probes_are_expected_as_often_as_they_are_measured() -> None:
    """One step of four measures, the first among them: a pass more in it is a quarter of one in the mean."""
    grpo = load_method("grpo", num_generations=3)
    probed = replace(grpo, probes=("grad_norm/rl",), probing=lambda state: True)
    never, always, rarely = (measured(engine_for(m), m).cost.flops for m in (grpo, probed, replace(probed, probe_share=0.25)))
    assert rarely - never == pytest.approx((always - never) / 4) and always > never


def test_lengths_are_averaged_over_several_batches_where_nothing_is_sampled() -> None:
    """The second half of the data is looked at too, so that a first batch of short rows misleads nobody."""
    method = load_method("sft")
    examples = made_up_examples(method, n=24)
    examples.sort(key=lambda e: len(e.expert[0].tokens))
    engine = engine_for(method, streams={"train": Rows(examples)})
    total = sum(len(e.expert[0].tokens) for e in examples)
    short = sum(len(e.expert[0].tokens) for e in examples[:BATCH_SIZE])
    cost = measured(engine, method).cost
    assert short < cost.processed_tokens == round(total * BATCH_SIZE / len(examples))
    assert cost.demonstrations == BATCH_SIZE


def drawing(embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Embeddings as they are, after a draw from torch's random numbers."""
    return embeddings + 0 * torch.randn_like(embeddings)


@pytest.mark.parametrize("tokens", [8, 4096])
def test_nothing_is_left_behind(tokens: int) -> None:
    method = replace(load_method("grpo", num_generations=3), embed=drawing)
    engine = engine_for(method, micro_batch_tokens=tokens)
    optimizer = Optimizer(engine.model, "mixed")
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    random = torch.get_rng_state()
    measure_first_step(engine, method, optimizer, BATCH_SIZE)
    assert torch.equal(torch.get_rng_state(), random)
    assert not engine.model.training
    assert equal(dict(engine.model.named_parameters()), before)
    assert all(x.grad is None for x in (*engine.model.parameters(), *optimizer.masters.values()))
    assert optimizer.moments() == {}


@pytest.mark.parametrize(("tokens", "split"), [(30, False), (4, True)])
def test_a_micro_batch_is_scaled_by_tokens(monkeypatch: pytest.MonkeyPatch, tokens: int, split: bool) -> None:
    """Every look at the clock is a second later: one for sampling and the batch, one for the largest micro-batch."""
    now = iter(range(100))
    monkeypatch.setattr(first_step, "clock", lambda device: float(next(now)))
    monkeypatch.setattr(first_step, "optimizer_seconds", lambda precision, device: 0.0)
    method = load_method("rloo", num_generations=3)
    engine = engine_for(method, micro_batch_tokens=tokens)
    collected = draw(engine, method, BATCH_SIZE, Progress())
    batch, _ = make_batch(engine, method, collected, 0, Progress().cost)
    sizes = [distinct_tokens(batch.rows(i)) for i in micro_batches(engine, method, batch, tokens)]
    assert len(sizes) > 2
    assert (sum(sizes) > distinct_tokens(batch)) == split  # a prompt is computed for every part of its group
    assert measured(engine, method).cost.seconds == pytest.approx(1.0 + sum(sizes) / max(sizes))


def test_memory_is_the_highest_part_with_the_moments_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling peaks at 3 GB, an update at 5; gradients on what is held make 1 GB and a few kB, and there are two moments."""
    peaks = iter([3.0, 5.0])
    monkeypatch.setattr(first_step, "held_memory_gb", lambda device: 1.0)
    monkeypatch.setattr(first_step, "peak_memory_gb", lambda device: next(peaks))
    method = load_method("rloo", num_generations=3)
    engine = engine_for(method)
    one = sum(p.numel() * 4 for p in engine.model.parameters()) / 2**30
    assert measured(engine, method).memory_gb == pytest.approx(5.0 + 2 * one, rel=1e-12)


def test_a_first_batch_that_teaches_nothing_costs_its_sampling() -> None:
    def unscored(groups: list[Group]) -> list[Group]:
        return groups

    method = load_method("rloo", num_generations=3)
    cost = measured(engine_for(method, rewards=unscored), method).cost
    assert cost.generated_tokens > 0 and cost.flops == 2 * 10 * cost.processed_tokens
