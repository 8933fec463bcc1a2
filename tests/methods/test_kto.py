"""KTO and APO-zero for single answers: good ones up, bad ones down, against a reference point from mismatched answers."""

from __future__ import annotations

import collections
import math
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bandit import PROMPTS, Bandit, learn, model_for, probability
from torch import Tensor
from worked import Line, Paper, answer, gradient_of, group, prepared, random_logps, weights_of

from crosstrain.errors import UserError
from crosstrain.explain import GivenBatch, explain
from crosstrain.methods import load_method
from crosstrain.methods.describe import record
from crosstrain.methods.kto import mismatched, reference_point
from crosstrain.testing import gradient, tiny_model
from crosstrain.training.batching import to_batch, with_advantage
from crosstrain.training.columns import no_grad_scores
from crosstrain.training.engine import Engine
from crosstrain.types import Batch, Example, Group, Method, Scores, Source, Trajectory

LN3 = math.log(3)


def of(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- by hand --------------------------------------------------------------------------------------------------------


def two(method: Method, point: float) -> Batch:
    """A good answer of two tokens that moved by 2 ln 3 from its reference, and a bad one of one token that moved by ln 3."""
    groups = [group(answer("EE", 1.0), name="a"), group(answer("E", 0.0), name="b")]
    batch = prepared(method, groups, ref_logp=of([[-2, -2], [-2, 0]]))
    return batch.with_columns(reference_point=of([point, point]))


LOGP = of([[LN3 - 2, LN3 - 2], [LN3 - 2, 0]])


def test_kto_by_hand() -> None:
    """z0 = ln 3, beta 1. Good: d - z0 = ln 3, sigmoid 3/4, loss 1/4, weight 3/16 on both tokens. Bad: z0 - d = 0, sigmoid 1/2, loss
    1/2, weight -1/4. A mean over the two answers; weights 1 and 4 of them."""
    method = load_method("kto", beta=1.0)
    found = weights_of(method, two(method, LN3), LOGP)
    assert found.loss == pytest.approx((1 / 4 + 1 / 2) / 2)
    torch.testing.assert_close(found.weights, of([[3 / 32, 3 / 32], [-1 / 8, 0]]))
    method = load_method("kto", beta=1.0, undesirable_weight=4.0)
    found = weights_of(method, two(method, LN3), LOGP)
    assert found.loss == pytest.approx((1 / 4 + 4 / 2) / 2)
    torch.testing.assert_close(found.weights, of([[3 / 32, 3 / 32], [-1 / 2, 0]]))


def test_apo_zero_by_hand() -> None:
    """Without a point: good sigmoid(2 ln 3) = 9/10, loss 1/10, weight 9/100; bad loss sigmoid(ln 3) = 3/4, weight -3/16."""
    method = load_method("apo_zero_unpaired", beta=1.0)
    found = weights_of(method, two(method, 77.0), LOGP)
    assert found.loss == pytest.approx((1 / 10 + 3 / 4) / 2)
    torch.testing.assert_close(found.weights, of([[9 / 200, 9 / 200], [-3 / 32, 0]]))


def test_answers_to_one_prompt_count_as_those_to_two() -> None:
    method = load_method("apo_zero_unpaired", beta=1.0)
    together = prepared(method, [group(answer("EE", 1.0), answer("E", 0.0))], ref_logp=of([[-2, -2], [-2, 0]]))
    torch.testing.assert_close(weights_of(method, together, LOGP).weights, weights_of(method, two(method, 0.0), LOGP).weights)


def test_the_point_is_asked_for_by_kto_alone() -> None:
    assert load_method("kto").needs == {"ref_logp", "reference_point"}
    assert load_method("apo_zero_unpaired").needs == {"ref_logp"}


def test_with_a_point_of_0_kto_is_apo_zero() -> None:
    one, other = load_method("kto", beta=0.7), load_method("apo_zero_unpaired", beta=0.7)
    torch.testing.assert_close(weights_of(one, two(one, 0.0), LOGP).weights, weights_of(other, two(other, 0.0), LOGP).weights)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_weights_are_the_closed_form(beta: float) -> None:
    """+-w beta s (1 - s) / N on every token: alike within an answer, largest where d = z0, and small far from it on either side."""
    method = load_method("kto", beta=beta, desirable_weight=1.5)
    for point in (0.0, 1.0, 40.0):
        found = weights_of(method, two(method, point), LOGP).weights
        for r, (d, w) in enumerate(((2 * LN3, 1.5), (LN3, -1.0))):
            s = 1 / (1 + math.exp(-beta * (d - point)))
            assert float(found[r, 0]) == pytest.approx(w * beta * s * (1 - s) / 2, rel=1e-10, abs=1e-14)


# --- a second implementation ----------------------------------------------------------------------------------------


def paper(beta: float, good: float, bad: float, point: float) -> Paper:
    """arXiv:2402.01306 eq. 8: lambda_y - v(x, y), averaged over answers."""

    def loss(groups: list[list[Line]]) -> Tensor:
        losses = []
        for line in (line for g in groups for line in g):
            d = sum(x - r for x, r in zip(line.logp, line.ref, strict=True))
            w, gain = (good, d - point) if line.reward == 1 else (bad, point - d)
            losses.append(w - w / (1 + torch.exp(-beta * gain)))
        return sum(losses) / len(losses)

    return loss


@pytest.mark.parametrize("seed", range(4))
def test_second_implementation(seed: int) -> None:
    method = load_method("kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)
    words = ("EEE", "E", "EEEEE", "EE", "EEEE")
    groups = [group(answer(w, float((i + seed) % 2)), name=str(i)) for i, w in enumerate(words)]
    logp, batch = random_logps(method, groups, seed)
    point = 0.4 * seed
    batch = batch.with_columns(reference_point=torch.full_like(batch.reward, point))
    ours = weights_of(method, batch, logp)
    loss, weights = gradient_of(paper(0.3, 1.3, 0.6, point), batch, logp)
    torch.testing.assert_close(ours.weights, weights, rtol=0, atol=1e-10)
    assert ours.logged == pytest.approx(loss)


# --- the reference point --------------------------------------------------------------------------------------------


def row(i: int, prompt: tuple[int, ...], said: tuple[int, ...], label: float = 1.0) -> Group:
    source = (Source.PROMPT,) * len(prompt) + (Source.EXPERT,) * len(said)
    return Group(Example(f"train:{i}", "", prompt), (Trajectory(prompt + said, source, reward=label),))


ROWS = [
    row(0, (5, 9), (7, 8, 13), 1.0),
    row(1, (4,), (30, 2), 0.0),
    row(2, (6, 6, 3), (17,), 1.0),
    row(3, (4,), (12, 21, 40, 2), 0.0),
]


def batch_of(rows: list[Group]) -> Batch:
    method = load_method("kto")
    batch = to_batch(rows)
    batch = replace(batch, reward=batch.reward.double())
    return with_advantage(batch, method.advantage(batch))


def looking(model: Any, reference: Any, tokens: int = 10**6) -> Callable[..., Scores]:
    def look(batch: Batch, *, of: str = "current") -> Scores:
        used = reference if of == "reference" else model
        engine = Engine(used, 1, "shared", torch.device("cpu"), {}, micro_batch_tokens=tokens)
        return no_grad_scores(engine, load_method("kto"), batch)

    return look


def test_an_answer_never_meets_its_own_prompt() -> None:
    """Rows 1 and 3 share a prompt: 3 skips 1, and 0, the first, takes from the last."""
    found = mismatched(to_batch(ROWS))
    assert [row[:n] for row, n in zip(found.tokens.tolist(), found.length.tolist(), strict=True)] == [
        [5, 9, 12, 21, 40, 2],
        [4, 7, 8, 13],
        [6, 6, 3, 30, 2],
        [4, 17],
    ]
    assert found.trained.sum(dim=1).tolist() == [4, 3, 2, 1] and found.prompt_length.tolist() == [2, 1, 3, 1]


def test_the_point_is_the_mean_over_mismatched_answers_written_out() -> None:
    """Straight from the logits, row by row, of two models."""
    model, reference = tiny_model(0), tiny_model(3)

    def d(prompt: tuple[int, ...], said: tuple[int, ...]) -> float:
        total = 0.0
        for net, sign in ((model, 1), (reference, -1)):
            with torch.no_grad():
                logp = net(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
            total += sign * sum(float(logp[len(prompt) + i - 1, t]) for i, t in enumerate(said))
        return total

    mean = (d((5, 9), (12, 21, 40, 2)) + d((4,), (7, 8, 13)) + d((6, 6, 3), (30, 2)) + d((4,), (17,))) / 4
    found, flipped = (reference_point(look, batch_of(ROWS)) for look in (looking(model, reference), looking(reference, model)))
    assert mean != 0 and sorted([float(found[0]), float(flipped[0])]) == pytest.approx([0.0, abs(mean)], abs=1e-9)
    assert len(set(found.tolist())) == 1


def test_no_order_of_rows_and_no_cut_changes_the_point() -> None:
    model, reference = tiny_model(0), tiny_model(3)
    expected = max(
        float(reference_point(looking(*pair), batch_of(ROWS))[0]) for pair in ((model, reference), (reference, model))
    )
    pair = (model, reference) if float(reference_point(looking(model, reference), batch_of(ROWS))[0]) else (reference, model)
    assert expected > 0
    for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
        for tokens in (1, 11):
            found = reference_point(looking(*pair, tokens), batch_of([ROWS[i] for i in order]))
            assert float(found[0]) == pytest.approx(expected, abs=1e-12)


def test_a_step_of_one_prompt_has_no_point() -> None:
    with pytest.raises(UserError, match=r"all 2 rows of a step have the same prompt, first train:1; .*raise batch_size"):
        reference_point(looking(tiny_model(0), tiny_model(3)), batch_of([ROWS[1], ROWS[3]]))


# --- an outside implementation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_the_loss_is_trls(name: str) -> None:
    """`KTOTrainer._compute_loss` itself, on a stand-in for the trainer, and rows shifted by one: with four prompts, our pairing."""
    from trl import KTOTrainer

    model, reference = tiny_model(0), tiny_model(3)
    if float(reference_point(looking(model, reference), batch_of(ROWS))[0]) == 0:
        model, reference = reference, model
    rows = [*ROWS[:3], row(3, (8, 8), (12, 21, 40, 2), 0.0)]
    method = load_method(name, beta=0.4, desirable_weight=1.3, undesirable_weight=0.8)
    batch = batch_of(rows)
    look = looking(model, reference)
    batch = batch.with_columns(ref_logp=look(batch, of="reference").logp)
    for column, build in method.columns.items():
        batch = batch.with_columns(**{column: build(look, batch)})
    assert name != "kto" or float(batch.columns["reference_point"][0]) > 0.01

    def runs(net: Any) -> Any:
        def forward(input_ids: Tensor, labels: Tensor, **rest: Any) -> Any:
            logp = net(input_ids).logits.log_softmax(-1)
            wanted = labels[:, 1:] != -100
            picked = logp[:, :-1].gather(2, input_ids[:, 1:, None])[..., 0]
            nothing = torch.zeros_like(picked)
            return types.SimpleNamespace(log_probs=picked * wanted, entropy=nothing, mean_logits=nothing)

        return forward

    other = mismatched(batch)
    inputs = {"label": batch.reward > 0}
    for prefix, b in (("", batch), ("KL_", other)):
        inputs |= {
            f"{prefix}input_ids": b.tokens,
            f"{prefix}attention_mask": (torch.arange(b.tokens.shape[1]) < b.length[:, None]).long(),
            f"{prefix}completion_mask": b.trained.long(),
        }
    current = runs(model)
    trainer = types.SimpleNamespace(
        model=model,
        ref_model=runs(reference),
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
        accelerator=types.SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        calculate_KL=name == "kto",
        loss_type=name,
        beta=0.4,
        desirable_weight=1.3,
        undesirable_weight=0.8,
        _metrics={"eval": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = types.MethodType(KTOTrainer._compute_kl_logps, trainer)
    ours = gradient(method, model, batch)
    model.zero_grad(set_to_none=True)
    loss = KTOTrainer._compute_loss(trainer, current, inputs, False)
    loss.backward()
    assert max(float(g.abs().max()) for g in ours.values()) > 1e-4
    for key, p in model.named_parameters():
        torch.testing.assert_close(ours[key], p.grad, rtol=0, atol=1e-9, msg=lambda m, n=key: f"{n}: {m}")


# --- what it teaches, and what it refuses ---------------------------------------------------------------------------


class Labelled(Bandit):
    """Every prompt once with its right answer, called good, and once with the wrong one, called bad."""

    def examples(self, needs: str | None) -> list[Example]:
        assert needs == "label"
        given = [(p, a, label) for i, p in enumerate(PROMPTS) for a, label in ((self.right[i], 1.0), (self.wrong[i], 0.0))]
        return [Example(f"train:{i}", "", p, (self._answer(p, a, label),)) for i, (p, a, label) in enumerate(given)]


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_labels_turn_the_order_of_two_answers(name: str) -> None:
    model = model_for()
    found = Bandit.reachable(model)
    bandit = Labelled(found.right * 2, found.wrong * 2)  # as many answers as there are rows, which is what a step draws
    before = [probability(model, p, a) for p, a in zip(PROMPTS, found.wrong, strict=True)]
    metrics = learn(load_method(name), model, bandit, steps=40)
    after = [probability(model, p, a) for p, a in zip(PROMPTS, found.wrong, strict=True)]
    right = [probability(model, p, a) for p, a in zip(PROMPTS, found.right, strict=True)]
    assert max(found.success(model_for())) < min(before) and min(right) > 2 * max(after)
    assert metrics[0]["loss"] == pytest.approx(0.5, abs=1e-5) and metrics[-1]["loss"] < metrics[0]["loss"]


@pytest.mark.parametrize("key", ["beta", "desirable_weight", "undesirable_weight"])
def test_settings_that_make_no_sense_are_refused(key: str) -> None:
    for name in ("kto", "apo_zero_unpaired"):
        with pytest.raises(UserError, match=f"{key}: got 0.0; it must be positive"):
            load_method(name, **{key: 0.0})


def test_what_kto_asks_of_a_run() -> None:
    assert record("kto")["needs"] == ["labels", "reference model"] and record("kto")["data"] == "offline"


def test_explain_says_that_it_cannot_see_answers_to_other_prompts() -> None:
    """Also where these would be as long as the batch's own; without the point it can."""
    one = {"source": ["prompt", "expert"], "logp": [0, -1.0], "ref_logp": [0, -1.0]}
    given = GivenBatch(groups=[{"trajectories": [{**one, "reward": 1.0}]}, {"trajectories": [{**one, "reward": 0.0}]}])
    with pytest.raises(UserError, match="method kto scores sequences that are not in the batch"):
        explain(load_method("kto"), given)
    found = explain(load_method("apo_zero_unpaired", beta=1.0), given)
    assert [g["trajectories"][0]["weights"] for g in found["groups"]] == [[0.0, 0.125], [0.0, -0.125]]
