"""One point of the scaling benchmark: seconds and memory of a training step, or of sampling, on a random model."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_model import Size, save_random_model
from crosstrain.memory import give_back
from crosstrain.methods import load_method
from crosstrain.models import load_weights
from crosstrain.rollout import Prompt, Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.training.batching import distinct_tokens, to_batch, with_advantage
from crosstrain.training.collect import Collected, Usage
from crosstrain.training.engine import Engine
from crosstrain.training.gradient import accumulate, denominators
from crosstrain.training.optimizer import Optimizer
from crosstrain.training.record import held_memory_gb, peak_memory_gb, reset_peak_memory
from crosstrain.training.score import choose_layout
from crosstrain.training.timing import clock
from crosstrain.types import Batch, Example, Group, Source, Trajectory

REPEATS = 3

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Load:
    """What is asked of a model: groups of so many answers of so many tokens each, to prompts of so many tokens."""

    groups: int
    group_size: int
    prompt: int
    completion: int
    size: Size

    @property
    def tokens(self) -> int:
        """Tokens of a step, with the prompt of each group counted once.

        >>> Load(groups=2, group_size=4, prompt=10, completion=5, size=Size(64, 1, 512)).tokens
        60
        """
        return self.groups * (self.prompt + self.group_size * self.completion)


@dataclass(frozen=True)
class Measured:
    """Median seconds of a piece of work, the most memory that it took beyond what was held before, in MB, and its tokens."""

    seconds: float
    memory_mb: float
    tokens: int


class Models:
    """Random models by size, loaded as a run loads them; the last one is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last: tuple[Size, Any] | None = None

    def get(self, size: Size) -> Any:
        """The model of this size, in fp32."""
        if self._last is None or self._last[0] != size:
            self._last = None
            place = self.folder / f"{size.hidden}-{size.layers}-{size.vocabulary}"
            self._last = (size, load_weights(str(save_random_model(place, size))))
        return self._last[1]


def training_step(models: Models, load: Load) -> Measured:
    """Forward and backward of a step by the loop's own `accumulate`, with dr_grpo, which compares with no other model."""
    model, method = models.get(load.size), load_method("dr_grpo", num_generations=max(load.group_size, 2))
    engine = Engine(
        model=model,
        parameters=sum(p.numel() for p in model.parameters()),
        layout=choose_layout(model),
        device=CPU,
        streams={},
    )
    groups = _groups(load)
    batch: Batch = to_batch(groups)
    batch = with_advantage(batch, torch.ones(len(batch)))
    counts = denominators(method, batch, Collected(groups, groups, {}, Usage()))
    optimizer = Optimizer(model, "fp32")
    model.train()

    def work() -> None:
        optimizer.zero_grad()
        accumulate(engine, method, batch, counts, optimizer)

    found = _measure(work, distinct_tokens(batch), optimizer.zero_grad)
    optimizer.zero_grad()
    model.eval()
    return found


def sampling(models: Models, load: Load) -> Measured:
    """Sampling of full-length completions: there is no stop token."""
    sampler = TorchSampler(models.get(load.size), stop_token_ids=())
    prompts = [Prompt(g.example.prompt_tokens, load.group_size, g.example.id) for g in _groups(load)]
    asked = Sampling(max_completion_length=load.completion)
    tokens = load.groups * load.group_size * load.completion
    return _measure(lambda: sampler.sample(prompts, asked, seed=0, step=0), tokens, lambda: None)


def _groups(load: Load) -> list[Group]:
    """Random prompts with random answers, the same for every machine."""
    rng = random.Random(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(load.size.vocabulary) for _ in range(n))

    groups = []
    source = (Source.PROMPT,) * load.prompt + (Source.POLICY,) * load.completion
    for i in range(load.groups):
        example = Example(f"scaling:{i}", "", tokens(load.prompt))
        rows = [
            Trajectory(example.prompt_tokens + tokens(load.completion), source, reward=float(k % 2))
            for k in range(load.group_size)
        ]
        groups.append(Group(example, tuple(rows)))
    return groups


def _measure(work: Callable[[], object], tokens: int, tidy: Callable[[], None]) -> Measured:
    """The median of REPEATS runs after a warm-up, which memory is read from."""
    tidy()
    give_back()
    held = held_memory_gb()
    reset_peak_memory()
    work()
    memory = (peak_memory_gb() - held) * 1024
    seconds = []
    for _ in range(REPEATS):
        started = clock(CPU)
        work()
        seconds.append(clock(CPU) - started)
    return Measured(statistics.median(seconds), memory, tokens)
