"""Divergences by sampling agree with exact sums over the vocabulary, and are never compared across different prompts."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crosstrain.errors import UserError
from crosstrain.evaluate.divergence import (
    BaseAnswers,
    base_of,
    check_base_model,
    check_same_prompts,
    compared,
    entropy,
    rescored,
    reverse_kl,
)
from crosstrain.rollout.sampler import Prompt, Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.testing import tiny_model

BASE = tiny_model(0, torch.float32)
MOVED = tiny_model(0, torch.float32)
with torch.no_grad():
    for parameter in MOVED.parameters():
        parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
PROMPTS = ((5, 6, 7), (9, 10, 11, 12))


def sampled(model: torch.nn.Module, n: int, length: int, temperature: float = 1.0) -> BaseAnswers:
    prompts = [Prompt(p, n, f"q:{i}") for i, p in enumerate(PROMPTS)]
    drawn = TorchSampler(model, stop_token_ids=(2,)).sample(prompts, Sampling(temperature, 1.0, 0, length), seed=0, step=0)
    return BaseAnswers(
        temperature,
        ("q:0", "q:1"),
        PROMPTS,
        tuple(tuple(c.tokens for c in group) for group in drawn),
        tuple(tuple(c.logp for c in group) for group in drawn),
    )


@torch.no_grad()
def next_token(model: torch.nn.Module, prompt: tuple[int, ...], temperature: float) -> torch.Tensor:
    return torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].double() / temperature, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_token_replies_give_the_exact_divergences_within_sampling_error(temperature: float) -> None:
    n = 3000
    base = rescored(BASE, sampled(BASE, n, 1, temperature), layout="shared")
    own = sampled(MOVED, n, 1, temperature)
    found = {"forward": compared(MOVED, own, base, layout="shared")[1], "reverse": reverse_kl(BASE, own, layout="shared")}
    for i, prompt in enumerate(PROMPTS):
        b, m = next_token(BASE, prompt, temperature), next_token(MOVED, prompt, temperature)
        for name, p, q in (("forward", b, m), ("reverse", m, b)):
            exact = float((p.exp() * (p - q)).sum())
            spread = float((p.exp() * (p - q - exact) ** 2).sum()) ** 0.5
            assert exact > 5 * spread / math.sqrt(n), "the test would not see a divergence of 0"
            assert found[name][i] == pytest.approx(exact, abs=4 * spread / math.sqrt(n))
        exact_entropy = -float((m.exp() * m).sum())
        assert entropy(own)[i] == pytest.approx(exact_entropy, rel=0.1)


def test_of_long_replies_the_divergence_is_the_mean_of_whole_sequence_gaps() -> None:
    base = sampled(BASE, 5, 6)
    own, forward = compared(MOVED, sampled(MOVED, 3, 6), base, layout="shared")
    for mine, sampler in zip(own.logps, sampled(MOVED, 3, 6).logps, strict=True):
        assert [x for row in mine for x in row] == pytest.approx([x for row in sampler for x in row], abs=1e-4)
    for i, prompt in enumerate(PROMPTS):
        gaps = []
        for tokens in base.completions[i]:
            gap = 0.0
            for t, token in enumerate(tokens):
                so_far = (*prompt, *tokens[:t])
                gap += float(next_token(BASE, so_far, 1.0)[token] - next_token(MOVED, so_far, 1.0)[token])
            gaps.append(gap)
        assert forward[i] == pytest.approx(statistics.fmean(gaps), abs=1e-3)


def test_a_model_does_not_diverge_from_itself() -> None:
    base = rescored(BASE, sampled(BASE, 4, 6), layout="shared")
    assert compared(BASE, base, base, layout="shared") == (base, [0.0, 0.0])
    assert reverse_kl(BASE, base, layout="shared") == [0.0, 0.0]


def test_entropy_is_per_token_of_all_replies_to_a_prompt() -> None:
    own = BaseAnswers(1.0, ("a",), ((1,),), (((5,), (6, 7, 8)),), (((-4.0,), (-1.0, -2.0, -1.0)),))
    assert entropy(own) == [2.0]


def test_answers_survive_writing_and_reading(tmp_path: Path) -> None:
    answers = sampled(BASE, 3, 5)
    answers.write(tmp_path / "new" / "base.json")
    assert BaseAnswers.read(tmp_path / "new" / "base.json") == answers
    (tmp_path / "broken.json").write_text('{"ids": ')
    for name in ("broken.json", "missing.json"):
        with pytest.raises(UserError, match=f"{name}.*evaluate the base model again"):
            BaseAnswers.read(tmp_path / name)


def test_answers_to_other_prompts_are_refused() -> None:
    base = sampled(BASE, 2, 2)
    check_same_prompts(base, base)
    for changed in ({"prompts": (PROMPTS[0], (1,))}, {"ids": ("q:0", "q:7")}, {"temperature": 0.5}):
        with pytest.raises(UserError, match=next(iter(changed))):
            check_same_prompts(base, replace(base, **changed))


def test_with_adapters_the_base_is_the_model_without_them() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        tiny_model(0, torch.float32), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.eval()
    own = sampled(BASE, 2, 4)
    check_base_model(adapted, None)
    with base_of(adapted, None) as base:
        without = reverse_kl(base, own, layout="shared")
    assert without == pytest.approx(reverse_kl(BASE, own, layout="shared"), abs=1e-4)
    assert reverse_kl(adapted, own, layout="shared") != pytest.approx(without, abs=1e-2)
    with pytest.raises(UserError, match="pass base_model"):
        check_base_model(BASE, None)
