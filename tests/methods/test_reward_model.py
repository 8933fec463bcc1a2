"""Bradley-Terry reward models: numbers by hand, the formula again, TRL's own loss, and an order that is learned."""

from __future__ import annotations

import collections
import math
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from bandit import PROMPTS, Bandit, learn, model_for
from valued import Outcome, outcome
from worked import answer, group, prepared

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.methods.reward_model import read_at_the_end
from crosstrain.testing import check_method, gradient, made_up_value_head, tiny_model
from crosstrain.training.batching import to_batch
from crosstrain.training.score import score
from crosstrain.types import Example, Group, Method, Source, Trajectory
from crosstrain.value_head import reader

F64 = torch.float64


def on_values(method: Method, values: list[list[float]], *rewards: float) -> Outcome:
    """The method on pairs of answers of three and two tokens with the given labels."""
    pairs = zip(rewards[::2], rewards[1::2], strict=True)
    groups = [group(answer("EEE", a), answer("EE", b), name=str(i)) for i, (a, b) in enumerate(pairs)]
    batch = prepared(method, groups)
    given = torch.tensor(values, dtype=F64)
    return outcome(method, batch, -torch.ones_like(given), given)


def test_by_hand() -> None:
    """r_w = 2, r_l = 1, read at the last tokens: loss log(1 + e^-1), gradient +- sigmoid(-1), and no token has a weight."""
    found = on_values(load_method("reward_model"), [[9.0, 9.0, 2.0], [9.0, 1.0, 9.0]], 1.0, 0.0)
    s = 1 / (1 + math.e)
    assert found.loss == found.logged["preference"] == pytest.approx(math.log1p(math.exp(-1)))
    torch.testing.assert_close(found.value_weights, torch.tensor([[0, 0, s], [0, -s, 0]], dtype=F64))
    assert not bool(found.weights.any())


@pytest.mark.parametrize("labels", [(1.5, 0.0), (2.0, 0.5)])
def test_margin_and_centring_by_hand(labels: tuple[float, float]) -> None:
    """Labels 1.5 and 0, or 2 and 0.5, are a margin of 1/2; c = 0.01 adds 0.01 (2 + 1)^2, and 0.06 to both gradients."""
    found = on_values(load_method("reward_model", center_rewards_coefficient=0.01), [[0, 0, 2.0], [0, 1.0, 0]], *labels)
    s = 1 / (1 + math.exp(0.5))
    assert found.loss == pytest.approx(math.log1p(math.exp(-0.5)) + 0.09)
    torch.testing.assert_close(found.value_weights, torch.tensor([[0, 0, s - 0.06], [0, -s - 0.06, 0]], dtype=F64))


def test_second_implementation_over_several_pairs() -> None:
    """The mean over pairs, found by label and not by order."""
    method = load_method("reward_model", center_rewards_coefficient=0.1)
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = on_values(method, values.tolist(), 1.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    leaf = values.clone().requires_grad_()
    last = [leaf[r, 2 - r % 2] for r in range(6)]
    pairs = [(last[0], last[1]), (last[3], last[2]), (last[4], last[5])]
    loss = sum(-torch.log(torch.sigmoid(w - l)) + 0.1 * (w + l) ** 2 for w, l in pairs) / 3  # noqa: E741
    (of_values,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(found.value_weights, -of_values, rtol=0, atol=1e-12)
    assert found.loss == pytest.approx(float(loss.detach()))


def pair(prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...], **columns: Any) -> Example:
    def one(tokens: tuple[int, ...], reward: float) -> Trajectory:
        source = (Source.PROMPT,) * len(prompt) + (Source.EXPERT,) * len(tokens)
        return Trajectory(prompt + tokens, source, reward=reward)

    return Example("train:0", "", prompt, (one(chosen, 1.0), one(rejected, 0.0)), columns=columns, where="rows.jsonl:1")


EXAMPLES = [pair((5, 9, 11), (7, 8, 13, 21), (30, 2)), pair((5, 9), (17, 17, 40), (12,), margin=0.25)]


def test_the_reward_is_the_value_after_the_last_token() -> None:
    """A token is added to read it at; whatever it is, the value is what the head makes of the last token's hidden state."""
    model = tiny_model()
    head = made_up_value_head(model)
    groups = [Group(e, read_at_the_end(e, {})) for e in EXAMPLES]
    batch = to_batch(groups)
    assert batch.trained.sum(dim=1).tolist() == [1] * 4 and batch.reward.tolist() == [1.0, 0.0, 1.25, 0.0]
    assert [int(n) for n in batch.length] == [8, 6, 6, 4]
    for layout in ("shared", "plain"):
        found = score(model, batch, layout=layout, value_head=reader(head)).channels["value"]  # type: ignore[arg-type]
        rewards = found[batch.trained].tolist()
        for r, t in zip(rewards, (t for e in EXAMPLES for t in e.expert), strict=True):
            hidden = model.model(torch.tensor([t.tokens])).last_hidden_state[0, -1]
            assert r == pytest.approx(float(head(hidden).detach()), abs=1e-12)
    other = replace(batch, tokens=torch.where(batch.trained, 3, batch.tokens))
    again = score(model, other, layout="shared", value_head=reader(head)).channels["value"]
    torch.testing.assert_close(again[batch.trained], torch.tensor(rewards, dtype=F64))


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_it_is_trls(coefficient: float) -> None:
    """`RewardTrainer.compute_loss` on transformers' own classifier with the same weights, margins among them."""
    from transformers import LlamaForSequenceClassification
    from trl import RewardTrainer

    model = tiny_model()
    head = made_up_value_head(model)
    config = model.config
    config.num_labels = 1
    classifier = LlamaForSequenceClassification(config).to(F64).eval()
    classifier.model = model.model
    classifier.score.weight = torch.nn.Parameter(head.weight.detach().clone())
    rows = [e.expert[0].tokens for e in EXAMPLES] + [e.expert[1].tokens for e in EXAMPLES]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[*r, *[0] * (width - len(r))] for r in rows]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
        "margin": torch.tensor([0.0, 0.25], dtype=F64),
    }
    trainer: Any = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(center_rewards_coefficient=coefficient or None),
        accelerator=types.SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": collections.defaultdict(list)},
    )
    method = load_method("reward_model", center_rewards_coefficient=coefficient)
    batch = to_batch([Group(e, method.plan.start(e, {})) for e in EXAMPLES])
    ours = gradient(method, model, batch)
    model.zero_grad(set_to_none=True)
    RewardTrainer.compute_loss(trainer, classifier, inputs).backward()
    assert float(ours["value_head.weight"].abs().max()) > 1e-3
    torch.testing.assert_close(ours["value_head.weight"], classifier.score.weight.grad, rtol=0, atol=1e-9)
    for name, p in classifier.model.named_parameters():
        torch.testing.assert_close(ours[f"model.{name}"], p.grad, rtol=0, atol=1e-9)


def test_centring_keeps_the_contract() -> None:
    check_method(load_method("reward_model", center_rewards_coefficient=0.01))


def test_it_learns_the_order_and_starts_at_chance() -> None:
    model = model_for()
    metrics = learn(load_method("reward_model"), model, Bandit.reachable(model), steps=30)
    assert metrics[0]["loss"] == pytest.approx(math.log(2)) and metrics[0]["rewards/margins"] == 0.0
    assert metrics[-1]["rewards/accuracies"] == 1.0 and metrics[-1]["rewards/margins"] > 1.0
    assert "entropy" not in metrics[0] and "logps/chosen" not in metrics[0], "nothing is said of words that it does not read"
    assert metrics[0]["cost/demonstrations"] == 2 * len(PROMPTS)


@pytest.mark.parametrize("margin", [-1.0, "much", True, math.nan])
def test_a_margin_that_is_none_is_an_error(margin: Any) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:1: margin must be a number of 0 or more"):
        read_at_the_end(pair((5,), (6,), (7,), margin=margin), {})
