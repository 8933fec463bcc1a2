"""Reference log-probs of a whole dataset: the values, and when the kept ones are taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosstrain import testing
from crosstrain.errors import UserError
from crosstrain.training import reference
from crosstrain.training.batching import to_batch
from crosstrain.training.reference import cache_name, known_reference, reference_column
from crosstrain.training.score import score
from crosstrain.types import Example, Group, Source, Trajectory
from tensors import equal


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CROSSTRAIN_CACHE", str(tmp_path))
    return tmp_path / "reference"


def pair(i: int) -> Example:
    prompt = (1, 2 + i)
    source = (Source.PROMPT,) * 2 + (Source.EXPERT,) * 2
    answers = tuple(Trajectory((*prompt, 5, k), source, reward=float(k == 6)) for k in (6, 7))
    return Example(f"train:{i}", "", prompt, answers)


def test_a_batch_in_any_order_gets_the_scores_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SLICE", 3)
    model, examples = testing.tiny_model(), [pair(i) for i in range(4)]
    known = known_reference(model, examples)
    batch = to_batch([Group(examples[i], examples[i].expert) for i in (2, 0, 3)])
    with torch.no_grad():
        expected = score(model, batch).logp
    assert expected.abs().sum() > 0
    torch.testing.assert_close(reference_column(batch, known), expected.float(), rtol=0, atol=1e-5)


def test_a_second_run_reads_what_the_first_computed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = testing.tiny_model(), [pair(i) for i in range(4)]
    first = known_reference(model, examples)
    assert len(list(cache.iterdir())) == 1

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(reference, "trajectory_logps", refuse)
    again = known_reference(model, examples)
    assert equal(first, again)
    with pytest.raises(AssertionError, match="computed again"):
        known_reference(model, examples[:3])
    theta = model.config.rope_parameters["rope_theta"]
    model.config.rope_parameters["rope_theta"] = theta + 1
    with pytest.raises(AssertionError, match="computed again"):
        known_reference(model, examples)
    model.config.rope_parameters["rope_theta"] = theta
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(AssertionError, match="computed again"):
        known_reference(model, examples)
    assert len(list(cache.iterdir())) == 1


def test_a_row_that_is_not_of_the_data_is_an_error() -> None:
    known = known_reference(testing.tiny_model(), [pair(0)])
    with pytest.raises(UserError, match="train:1: the method changed what its row brings"):
        reference_column(to_batch([Group(pair(1), pair(1).expert)]), known)


def test_an_adapter_that_counts_more_or_is_off_has_a_name_of_its_own() -> None:
    """Its scaling is no weight, and switching it off changes none."""
    from peft import LoraConfig, get_peft_model

    def named(alpha: int) -> tuple[str, str]:
        torch.manual_seed(0)
        model = get_peft_model(testing.tiny_model(), LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"]))
        with model.disable_adapter():
            off = cache_name(model, [], "shared", 64)
        return cache_name(model, [], "shared", 64), off

    assert len({*named(4), named(32)[0]}) == 3
    assert named(4) == named(4)
