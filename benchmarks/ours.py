"""Our side: `python -m benchmarks.ours WORK PRECISION ROWS MODEL`, a worker."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import sampling_kernels, training_kernels
from benchmarks.products import inputs, sampling_products, training_products, weights_of
from benchmarks.settings import BATCH, BETA, GENERATIONS, LEARNING_RATE, NEW_TOKENS
from benchmarks.worker import Pace, serve
from crosstrain import assemble
from crosstrain.head import evaluation_mode
from crosstrain.memory import give_back
from crosstrain.methods import load_method
from crosstrain.models import load_model, resolve_device
from crosstrain.prefix import common_start
from crosstrain.rewards import RewardPool, load_reward
from crosstrain.rollout import Prompt, Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.training.engine import Engine
from crosstrain.training.loop import Progress, StageSettings, train_stage
from crosstrain.training.loop import Step as Done
from crosstrain.training.metrics import COMPUTED
from crosstrain.training.optimizer import Optimizer
from crosstrain.training.reference import known_reference
from crosstrain.training.score import choose_layout
from crosstrain.training.timing import clock
from crosstrain.types import Example, Method, Source, Trajectory

Step = Callable[[], Mapping[str, Any]]

Floor = Callable[[], Mapping[str, Any]]
"""Seconds of parts of the last step, run alone: its matrix products, and torch's other kernels."""


@dataclass(frozen=True)
class InOrder:
    """A stream whose examples come as they stand, again and again."""

    examples: tuple[Example, ...]

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        """`n` examples from `position` on, and the position after them."""
        size = len(self.examples)
        return [self.examples[i % size] for i in range(position, position + n)], position + n


def main() -> None:
    """Load what the work needs and do its steps when asked."""
    parser = argparse.ArgumentParser(prog="benchmarks.ours")
    parser.add_argument("work")
    parser.add_argument("precision")
    parser.add_argument("rows", type=Path)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    pace = Pace()
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    device = resolve_device(options.device)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    model, tokenizer = load_model(options.model, dtype=dtype, device=device)
    name, _, more = options.work.partition(":")
    with ExitStack() as stack:
        if name == "generate":
            size, _, way = more.partition(":")
            step, floor = generating(model, rows["prompts"][: int(size)], greedy=way == "greedy")
            more = 0.0
        else:
            step, floor, optimizer = training(name, model, tokenizer, options.precision, rows, device, stack)
            more = _gradients_and_moments(optimizer)
        give_back()
        serve(pace, step, floor, more_gb=more)


def _gradients_and_moments(optimizer: Optimizer) -> float:
    """What they take, in GiB: a step cannot be without them."""
    return 3 * sum(m.numel() * m.element_size() for m in optimizer.masters.values()) / 2**30


def training(
    name: str, model: Any, tokenizer: Any, precision: Any, rows: Mapping[str, Any], device: torch.device, stack: ExitStack
) -> tuple[Step, Floor, Optimizer]:
    """Steps of the real loop."""
    method: Method = {
        "sft": lambda: load_method("sft"),
        "documents": lambda: load_method("sft"),
        "dpo": lambda: load_method("dpo", beta=BETA),
        "grpo": lambda: load_method("grpo", num_generations=GENERATIONS, beta=0.0),
    }[name]()
    kind = {"grpo": "prompts"}.get(name, name)
    examples = tuple(EXAMPLES[name](i, row) for i, row in enumerate(rows[kind]))
    optimizer = Optimizer(model, precision)
    sampler = rewards = None
    if name == "grpo":
        sampler = TorchSampler(model, stop_token_ids=assemble.stop_tokens(model, tokenizer))
        reward = load_reward(f"{Path(__file__).parent / 'reward.py'}:last_number")
        pool = stack.enter_context(RewardPool([reward], [1.0]))

        def rewards(groups: Any) -> Any:
            return pool.score(groups, lambda t: tokenizer.decode(t, skip_special_tokens=True), score_expert=True)[0]

    engine = Engine(
        model=model,
        parameters=sum(p.numel() for p in model.parameters()),
        layout=choose_layout(model),
        device=device,
        streams={"train": InOrder(examples)},
        sampler=sampler,
        sampling=Sampling(max_completion_length=NEW_TOKENS),
        rewards=rewards,
        known_reference=known_reference(model, examples) if name == "dpo" else None,
    )
    optimizer.begin()
    settings = StageSettings(BATCH[name], LEARNING_RATE, max_steps=10**9)
    steps = train_stage(engine, method, settings, optimizer, Progress())
    last: list[Done] = []

    def step() -> Mapping[str, Any]:
        done = next(steps)
        last[:] = [done]
        groups = done.groups
        amount = {
            "sft": lambda: sum(len(t.tokens) for g in groups for t in g.trajectories),
            "documents": lambda: sum(len(t.tokens) - 1 for g in groups for t in g.trajectories),
            "dpo": lambda: sum(len(t.tokens) for g in groups for t in g.trajectories),
            "grpo": lambda: sum(len(g.trajectories) for g in groups),
        }[name]()
        wanted = ("loss", "rewards/margins", "reward", "completions/mean_length")
        return {"amount": amount, **{k: done.metrics[k] for k in wanted if k in done.metrics}}

    def floor() -> Mapping[str, Any]:
        [done] = last
        tokens, predictions = (int(done.metrics[COMPUTED + name]) for name in ("tokens", "predictions"))
        weights = weights_of(model)
        given = inputs(weights, tokens, predictions)
        texts = sum(len(g.trajectories) for g in done.groups)
        kernels = training_kernels(model, tokens, predictions, texts, next(iter(optimizer.masters.values())).dtype)
        found = {
            "products": _seconds(device, lambda: training_products(weights, given, tokens, predictions)),
            "kernels": _seconds(device, kernels),
        }
        if name == "grpo":
            completions = [len(t.response) for g in done.groups for t in g.trajectories]
            sampled = _sampling_floor(model, [g.example.prompt_tokens for g in done.groups], completions)
            found = {key: found[key] + sampled[key] for key in found}
        return found

    return step, floor, optimizer


def _sampling_floor(model: Any, prompts: Sequence[tuple[int, ...]], completions: Sequence[int]) -> Mapping[str, float]:
    device = next(model.parameters()).device
    start = common_start(min(prompts), max(prompts))
    rest = [len(p) - start for p in prompts]
    weights = weights_of(model)
    given = inputs(weights, max(start + sum(rest), len(completions)))
    kernels = sampling_kernels(model, rest, completions)
    return {
        "products": _seconds(device, lambda: sampling_products(weights, given, len(prompts), start + sum(rest), completions)),
        "kernels": _seconds(device, kernels),
    }


def _seconds(device: torch.device, run: Callable[[], None]) -> float:
    started = clock(device)
    run()
    return clock(device) - started


def _supervised(i: int, row: Mapping[str, Any]) -> Example:
    prompt = tuple(row["prompt"])
    return Example(f"train:{i}", "", prompt, (_trajectory(prompt, row["completion"]),))


def _document(i: int, row: Mapping[str, Any]) -> Example:
    first, *rest = row["tokens"]
    return Example(f"train:{i}", "", (first,), (_trajectory((first,), rest),))


def _pair(i: int, row: Mapping[str, Any]) -> Example:
    prompt = tuple(row["prompt"])
    return Example(
        f"train:{i}", "", prompt, (_trajectory(prompt, row["chosen"], 1.0), _trajectory(prompt, row["rejected"], 0.0))
    )


def _question(i: int, row: Mapping[str, Any]) -> Example:
    return Example(f"train:{i}", row["text"], tuple(row["prompt"]), columns={"answer": row["answer"]})


def _trajectory(prompt: tuple[int, ...], answer: list[int], reward: float | None = None) -> Trajectory:
    source = (Source.PROMPT,) * len(prompt) + (Source.EXPERT,) * len(answer)
    return Trajectory((*prompt, *answer), source, reward=reward)


EXAMPLES = {"sft": _supervised, "documents": _document, "dpo": _pair, "grpo": _question}


def generating(model: Any, prompts: list[Any], *, greedy: bool) -> tuple[Step, Floor]:
    """One completion of each prompt; sampled ones all have the full length, since nothing ends them."""
    sampler = TorchSampler(model, stop_token_ids=())
    assert sampler.path == "cached"  # found by trying, which brings the weights into memory
    asked = [Prompt(tuple(p["prompt"]), 1, str(i)) for i, p in enumerate(prompts)]
    sampling = Sampling(temperature=0.0 if greedy else 1.0, max_completion_length=NEW_TOKENS)
    turn = iter(range(10**9))

    def step() -> Mapping[str, Any]:
        with evaluation_mode(model):
            found = sampler.sample(asked, sampling, seed=0, step=next(turn))
        tokens = [list(c.tokens) for cs in found for c in cs]
        return {"amount": sum(map(len, tokens)), **({"tokens": tokens} if greedy else {})}

    def floor() -> Mapping[str, Any]:
        return _sampling_floor(model, [p.tokens for p in asked], [NEW_TOKENS] * len(asked))

    return step, floor


if __name__ == "__main__":
    main()
