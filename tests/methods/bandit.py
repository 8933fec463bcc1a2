"""A task a tiny model can learn in seconds: for every prompt, one first token is right.

The chance of success is read off the model's own softmax, so that what a test asserts has no sampling noise.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crosstrain.rollout.sampler import Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.testing import tiny_model
from crosstrain.training.loop import Engine, Progress, StageSettings, train_stage
from crosstrain.training.optimizer import Optimizer
from crosstrain.types import Example, Group, Method, Source, Trajectory

VOCABULARY = 12
END = 2
PROMPTS = ((3, 7), (5, 4, 9), (8, 8), (10, 6, 3))


def first_token_probabilities(model: Any) -> Tensor:
    """[prompts, vocabulary]: the model's distribution of the first token of an answer."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([p])).logits[0, -1].softmax(-1) for p in PROMPTS])


@dataclass(frozen=True)
class Bandit:
    """Prompts, the right first token of each, and a wrong one."""

    right: tuple[int, ...]
    wrong: tuple[int, ...]

    @staticmethod
    def reachable(model: Any) -> Bandit:
        """Right is what the model finds fifth most likely, wrong what it likes best: sampling does find it."""
        order = first_token_probabilities(model).argsort(dim=1, descending=True)
        return Bandit(tuple(order[:, 4].tolist()), tuple(order[:, 0].tolist()))

    @staticmethod
    def out_of_reach(model: Any) -> Bandit:
        """Right is what the model finds least likely of all."""
        order = first_token_probabilities(model).argsort(dim=1, descending=True)
        return Bandit(tuple(order[:, -1].tolist()), tuple(order[:, 0].tolist()))

    def success(self, model: Any) -> list[float]:
        """The probability of the right first token, for each prompt."""
        return [float(p[r]) for p, r in zip(first_token_probabilities(model), self.right, strict=True)]

    def examples(self, needs: str | None) -> list[Example]:
        """One example per prompt, with the demonstration or pair that a method needs."""
        made = []
        for i, (prompt, right, wrong) in enumerate(zip(PROMPTS, self.right, self.wrong, strict=True)):
            chosen, rejected = (
                self._answer(prompt, t, r if needs == "pair" else None) for t, r in ((right, 1.0), (wrong, 0.0))
            )
            expert = {"demonstration": (chosen,), "pair": (chosen, rejected)}.get(needs or "", ())
            made.append(Example(f"train:{i}", "", prompt, expert))
        return made

    @staticmethod
    def _answer(prompt: tuple[int, ...], token: int, reward: float | None) -> Trajectory:
        source = (Source.PROMPT,) * len(prompt) + (Source.EXPERT,)
        return Trajectory((*prompt, token), source, reward=reward)

    def rewards(self, groups: list[Group]) -> list[Group]:
        """1 for an answer whose first token is right, else 0."""

        def one(g: Group, t: Trajectory) -> Trajectory:
            right = self.right[PROMPTS.index(g.example.prompt_tokens)]
            return replace(t, reward=float(t.response[0] == right)) if t.reward is None else t

        return [replace(g, trajectories=tuple(one(g, t) for t in g.trajectories)) for g in groups]


class _Cycle:
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        return [self.examples[(position + i) % len(self.examples)] for i in range(n)], position + n


def model_for(sharpness: float = 1.5) -> Any:
    """A tiny model that likes some answers better than others, the more so the larger `sharpness`."""
    model = tiny_model(0, torch.float32, vocab_size=VOCABULARY)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharpness)
    return model


def learn(method: Method, model: Any, bandit: Bandit, *, steps: int, learning_rate: float = 1e-2) -> list[dict[str, float]]:
    """Train `model` in place for `steps` steps on all prompts, one token per answer; the steps' metrics."""
    frozen = copy.deepcopy(model)
    engine = Engine(
        model=model,
        parameters=1,
        layout="shared",
        device=torch.device("cpu"),
        streams={"train": _Cycle(bandit.examples(method.plan.needs_expert))},
        sampler=TorchSampler(model, stop_token_ids=(END,)),
        sampling=Sampling(max_completion_length=1),
        rewards=bandit.rewards,
        seed=1,
        reference=lambda: nullcontext(frozen),
    )
    settings = StageSettings(batch_size=len(PROMPTS), learning_rate=learning_rate, max_steps=steps)
    progress = Progress(state=method.init())
    return [dict(s.metrics) for s in train_stage(engine, method, settings, Optimizer(model, "fp32"), progress)]
