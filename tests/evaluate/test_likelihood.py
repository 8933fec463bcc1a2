"""Log-probs of given texts equal those of plain forward passes, whatever is shared between them."""

from __future__ import annotations

import math
import random
from typing import Any, Literal

import pytest
import torch

from crosstrain.errors import UserError
from crosstrain.evaluate import likelihood
from crosstrain.evaluate.likelihood import answer_logps, completion_logps, text_logps
from crosstrain.testing import VOCABULARY, tiny_model

MODEL = tiny_model()
Layout = Literal["shared", "plain"]


def some_tokens(rng: random.Random, n: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCABULARY) for _ in range(n))


@torch.no_grad()
def plain(prompt: tuple[int, ...], answer: tuple[int, ...], temperature: float = 1.0, model: Any = MODEL) -> list[float]:
    """The log-probs of `answer`, by a forward pass over this one sequence alone."""
    ids = torch.tensor([[*prompt, *answer]])
    logp = torch.log_softmax(model(ids).logits[0].double() / temperature, dim=-1)
    return [float(logp[len(prompt) + t - 1, token]) for t, token in enumerate(answer)]


@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_answers_that_share_a_header_score_as_if_alone(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "LINE", 40)  # several lines, so that questions are packed and split
    rng = random.Random(0)
    header = some_tokens(rng, 9)
    prompts = [header + some_tokens(rng, rng.randint(1, 6)) for _ in range(12)]
    answers = [some_tokens(rng, rng.randint(1, 4)) for _ in prompts]
    found = answer_logps(MODEL, prompts, answers, layout=layout)
    for prompt, answer, logps in zip(prompts, answers, found, strict=True):
        assert logps == pytest.approx(plain(prompt, answer), abs=1e-5)


@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_completions_score_as_if_alone_and_repeats_are_computed_once(
    layout: Layout, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    prompts = [some_tokens(rng, n) for n in (3, 5, 5)]
    completions = [[some_tokens(rng, rng.randint(1, 5)) for _ in range(3)] for _ in prompts]
    completions[1][2] = completions[1][0]
    scored: list[int] = []
    real = likelihood.trajectory_logps

    def counting(model: Any, trajectories: Any, **settings: Any) -> Any:
        scored.append(len(trajectories))
        return real(model, trajectories, **settings)

    monkeypatch.setattr(likelihood, "trajectory_logps", counting)
    found = completion_logps(MODEL, prompts, completions, temperature=temperature, layout=layout)
    assert scored == [8]
    for prompt, group, logps in zip(prompts, completions, found, strict=True):
        for completion, values in zip(group, logps, strict=True):
            assert values == pytest.approx(plain(prompt, completion, temperature), abs=1e-5)


def test_a_text_counts_every_token_but_its_first() -> None:
    rng = random.Random(2)
    texts = [some_tokens(rng, n) for n in (7, 2, 11)]
    for text, logps in zip(texts, text_logps(MODEL, texts, layout="shared"), strict=True):
        assert logps == pytest.approx(plain(text[:1], text[1:]), abs=1e-5)


def test_broken_weights_are_an_error_and_no_number() -> None:
    broken = tiny_model()
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        text_logps(broken, [(1, 2, 3)], layout="plain")
