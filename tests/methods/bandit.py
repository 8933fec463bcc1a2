"""A task a tiny model can learn in seconds: for every prompt, one answer is right.

The chance of success is read off the model's own softmax, so that what a test asserts has no sampling noise. An answer of one
token is found by sampling soon; one of four tokens, with a chance of about 12^-4, is not.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from crosstrain.rollout.sampler import Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.testing import tiny_model
from crosstrain.training.engine import Engine
from crosstrain.training.loop import Progress, StageSettings, train_stage
from crosstrain.training.optimizer import Optimizer
from crosstrain.types import Example, Group, Method, Source, Trajectory
from crosstrain.value_head import make_value_head

VOCABULARY = 12
END = 2
PROMPTS = ((3, 7), (5, 4, 9), (8, 8), (10, 6, 3))
LONG = ((6, 3, 11, 8), (9, 9, 5, 3))

Answers = tuple[tuple[int, ...], ...]


def probability(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """The model's probability of an answer to a prompt."""
    with torch.no_grad():
        logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return float(sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(answer)).exp())


@dataclass(frozen=True)
class Bandit:
    """The right answer to each of the first prompts, and a wrong one."""

    right: Answers
    wrong: Answers

    @staticmethod
    def reachable(model: Any) -> Bandit:
        """One token: right is what the model finds fifth most likely, wrong what it likes best."""
        with torch.no_grad():
            orders = [model(torch.tensor([p])).logits[0, -1].argsort(descending=True).tolist() for p in PROMPTS]
        return Bandit(tuple((o[4],) for o in orders), tuple((o[0],) for o in orders))

    @staticmethod
    def out_of_reach() -> Bandit:
        """Four tokens, all of which must be right."""
        return Bandit(LONG, tuple(answer[::-1] for answer in LONG))

    @staticmethod
    def ending() -> Bandit:
        """The same three tokens, after which the answer has to end: what goes on from a part of it can be right."""
        return Bandit(tuple((*answer[:3], END) for answer in LONG), tuple(answer[::-1] for answer in LONG))

    def success(self, model: Any) -> list[float]:
        """The probability of the right answer, for each prompt."""
        return [probability(model, p, a) for p, a in zip(PROMPTS, self.right, strict=False)]

    def examples(self, needs: str | None) -> list[Example]:
        """One example per prompt, with the demonstration or pair that a method needs."""
        made = []
        for i, (prompt, right, wrong) in enumerate(zip(PROMPTS, self.right, self.wrong, strict=False)):
            chosen, rejected = (
                self._answer(prompt, a, r if needs == "pair" else None) for a, r in ((right, 1.0), (wrong, 0.0))
            )
            expert = {"demonstration": (chosen,), "pair": (chosen, rejected)}.get(needs or "", ())
            made.append(Example(f"train:{i}", "", prompt, expert))
        return made

    @staticmethod
    def _answer(prompt: tuple[int, ...], answer: tuple[int, ...], reward: float | None) -> Trajectory:
        source = (Source.PROMPT,) * len(prompt) + (Source.EXPERT,) * len(answer)
        return Trajectory(prompt + answer, source, reward=reward)

    def rewards(self, groups: list[Group]) -> list[Group]:
        """1 for the right answer, else 0."""

        def one(g: Group, t: Trajectory) -> Trajectory:
            right = self.right[PROMPTS.index(g.example.prompt_tokens)]
            return replace(t, reward=float(t.response == right)) if t.reward is None else t

        return [replace(g, trajectories=tuple(one(g, t) for t in g.trajectories)) for g in groups]


class _Cycle:
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        return [self.examples[(position + i) % len(self.examples)] for i in range(n)], position + n


def model_for(seed: int = 0) -> Any:
    """A tiny model that likes all answers about equally well."""
    return tiny_model(seed, torch.float32, vocab_size=VOCABULARY)


def learn(
    method: Method, model: Any, bandit: Bandit, *, steps: int, seed: int = 1, until: float = 1.0
) -> list[dict[str, float]]:
    """Train `model` in place for `steps` steps on all prompts; the steps' metrics.

    until: a chance of every right answer that ends it sooner, once it is exceeded at two looks in a row, five steps apart.
    """
    frozen = copy.deepcopy(model)
    head = make_value_head(model) if "value" in method.needs else None
    engine = Engine(
        model=model,
        parameters=1,
        layout="shared",
        device=torch.device("cpu"),
        streams={name: _Cycle(bandit.examples(method.plan.brings(name))) for name in method.plan.streams(method.init())},
        sampler=TorchSampler(model, stop_token_ids=(END,)),
        sampling=Sampling(max_completion_length=len(bandit.right[0])),
        rewards=bandit.rewards,
        decode=lambda tokens: "".join(chr(97 + t) for t in tokens),
        seed=seed,
        reference=lambda: nullcontext(frozen),
        value_head=head,
        base=lambda: dict(frozen.named_parameters()),
        frozen_embeddings=frozen.get_input_embeddings().requires_grad_(False),
    )
    settings = StageSettings(batch_size=len(bandit.right), learning_rate=5e-3, max_steps=steps)
    progress = Progress(state=method.init())
    made: list[dict[str, float]] = []
    held = 0
    for step in train_stage(engine, method, settings, Optimizer(model, "fp32", head), progress):
        made.append(dict(step.metrics))
        if len(made) % 5 == 0 and until < 1:
            held = held + 1 if min(bandit.success(model)) > until else 0
            if held == 2:
                break
    return made
