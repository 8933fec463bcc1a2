"""Named settings of preference methods, and ORPO with the prompt's likelihood in it."""

from __future__ import annotations

import math
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from bandit import Bandit, learn, model_for
from torch import Tensor
from worked import Line, answer, gradient_of, group, prepared, random_groups, random_logps, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.methods.simpo import answers
from crosstrain.testing import gradient, tiny_model
from crosstrain.training.batching import to_batch, with_advantage
from crosstrain.training.metrics import Meter
from crosstrain.types import Batch, Example, Group, Source, Trajectory

LN2 = math.log(2)


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "core", "settings"),
    [
        ("cdpo", {"beta": 0.3, "label_smoothing": 0.2}, "dpo", {"beta": 0.3, "label_smoothing": 0.2}),
        ("cdpo", {}, "dpo", {"beta": 0.1, "label_smoothing": 0.1}),
        ("ipo_mean", {"tau": 0.4}, "ipo", {"tau": 0.4, "average": True}),
    ],
)
def test_a_named_setting_is_its_core(name: str, given: dict[str, Any], core: str, settings: dict[str, Any]) -> None:
    named, plain = load_method(name, **given), load_method(core, **settings)
    groups = random_groups(1, pair=True)
    logp, batch = random_logps(plain, groups, 1)
    one, other = weights_of(named, batch, logp), weights_of(plain, batch, logp)
    assert torch.equal(one.weights, other.weights) and one.loss == other.loss
    assert (named.name, named.reference, named.plan.needs_expert) == (name, plain.reference, "pair")
    assert all(named.settings[key] == value for key, value in given.items())


def test_cdpo_stops_where_its_share_of_labels_would_be_wrong() -> None:
    """e = 1/4, beta 1: the gradient is 0 at sigmoid(D) = 3/4, that is D = ln 3, and pulls back beyond; at D = 0 it is 1/2 - 1/4."""
    method = load_method("cdpo", beta=1.0, label_smoothing=0.25)
    pair = [group(answer("E", 1.0), answer("E", 0.0))]
    for margin, weight in ((0.0, 0.25), (math.log(3), 0.0), (math.log(9), 0.1 - 0.25)):
        logp = of([[-1.0 + margin], [-1.0]])
        found = weights_of(method, prepared(method, pair, ref_logp=of([[-1.0], [-1.0]])), logp).weights
        torch.testing.assert_close(found, of([[weight], [-weight]]))


def test_what_is_no_setting_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match=r"must be positive \(0 is `dpo`\)"):
        load_method("cdpo", label_smoothing=0.0)
    with pytest.raises(UserError, match="must be in"):
        load_method("cdpo", label_smoothing=0.5)
    with pytest.raises(UserError, match="must be positive"):
        load_method("ipo_mean", tau=0.0)


@pytest.mark.parametrize(
    ("name", "settings"), [("cdpo", {}), ("ipo_mean", {}), ("orpo", {"beta": 1.0, "prompt_nll": True})], ids=str
)
def test_preferences_turn_the_order_of_two_answers(name: str, settings: dict[str, Any]) -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    flipped = Bandit(bandit.wrong, bandit.right)
    assert max(bandit.success(model)) < min(flipped.success(model))
    metrics = learn(load_method(name, **settings), model, bandit, steps=40)
    assert min(bandit.success(model)) > 2 * max(flipped.success(model))
    assert metrics[-1]["rewards/accuracies"] == 1.0 and metrics[-1]["loss"] < metrics[0]["loss"]


# --- ORPO with the prompt -------------------------------------------------------------------------------------------


def pair_of(i: int, prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...], **settings: Any) -> Group:
    """A row's pair as the method with `settings` starts with it."""

    def one(said: tuple[int, ...], reward: float) -> Trajectory:
        source = (Source.PROMPT,) * len(prompt) + (Source.EXPERT,) * len(said)
        return Trajectory(prompt + said, source, reward=reward)

    example = Example(f"train:{i}", "", prompt, (one(chosen, 1.0), one(rejected, 0.0)))
    return Group(example, load_method("orpo", **settings).plan.start(example, {}))


WITH: dict[str, Any] = {"prompt_nll": True, "beta": 0.5}


def test_orpo_with_the_prompt_by_hand() -> None:
    """Three prompt tokens, of which two can be predicted, at -2 ln 2 and -ln 2; two chosen ones at -2 ln 2, one rejected at -ln 2.
    The likelihood is the mean over four, 7/4 ln 2, and its weight 1/4. The odds see answers alone: probabilities 1/4 and 1/2, odds
    1/3 and 1, loss ln 4, weights (3/4) / (3/4) / 2 and -(3/4) / (1/2), each halved by beta."""
    method = load_method("orpo", **WITH)
    pair = [pair_of(0, (1, 5, 6), (7, 8), (9,), **WITH)]
    logp = -LN2 * of([[2, 1, 2, 2], [0, 0, 1, 0]])
    found = weights_of(method, prepared(method, pair), logp)
    assert found.loss == pytest.approx(7 / 4 * LN2 + 0.5 * math.log(4))
    torch.testing.assert_close(found.weights, of([[1 / 4, 1 / 4, 1 / 4 + 1 / 4, 1 / 4 + 1 / 4], [0, 0, -3 / 4, 0]]))


def test_the_prompt_of_the_better_answer_alone_is_imitated() -> None:
    for settings, tagged in ((WITH, [0, 1, 1, 1]), ({}, [0, 0, 0, 1])):
        chosen, rejected = pair_of(0, (1, 5, 6), (7,), (9,), **settings).trajectories
        assert [int(s) for s in chosen.source] == tagged and [int(s) for s in rejected.source] == [0, 0, 0, 1]
    batch = to_batch([pair_of(0, (1, 5, 6), (7,), (9, 2), **WITH), pair_of(1, (4,), (7, 2), (9,), **WITH)])
    assert answers(batch).int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]
    assert batch.prompt_length.tolist() == [1, 1, 1, 1]


def test_the_better_answer_is_the_one_of_greater_reward_wherever_it_stands() -> None:
    """An answer without a reward is never it."""
    for rewards in ((0.0, 1.0), (None, 0.0)):
        said = tuple(Trajectory((1, 5, 7), (Source.PROMPT, Source.PROMPT, Source.EXPERT), reward) for reward in rewards)
        first, second = load_method("orpo", **WITH).plan.start(Example("train:0", "", (1, 5), said), {})
        assert [int(s) for s in first.source] == [0, 0, 1] and [int(s) for s in second.source] == [0, 1, 1]


def test_without_the_prompt_an_answer_may_begin_before_the_other() -> None:
    """Means -2 ln 2 and -ln 2, as in ORPO by hand: odds 1/3 and 1. The rejected answer's first token is somebody else's."""
    method = load_method("orpo", beta=0.5)
    logp = -LN2 * of([[2, 2], [0, 1]])
    found = weights_of(method, prepared(method, [group(answer("EE", 1.0), answer("PE", 0.0))]), logp)
    torch.testing.assert_close(found.weights, of([[1 / 2 + 1 / 4, 1 / 2 + 1 / 4], [0, -3 / 4]]))


def test_with_a_prompt_of_one_token_there_is_nothing_more_to_predict() -> None:
    groups = [pair_of(i, (1,), (7,) * (i + 1), (9,) * (3 - i), **WITH) for i in range(3)]
    plain, whole = load_method("orpo", beta=0.5), load_method("orpo", **WITH)
    logp, batch = random_logps(plain, groups, 0)
    assert torch.equal(weights_of(whole, batch, logp).weights, weights_of(plain, batch, logp).weights)


@pytest.mark.parametrize("seed", range(3))
def test_second_implementation(seed: int) -> None:
    """arXiv:2403.07691 eq. 6 and 7, the likelihood as in the authors' code with a mean over each sequence."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, 5, (1,), generator=generator).item() for _ in range(3)]
    lengths = torch.randint(1, 5, (3, 2), generator=generator).tolist()
    groups = [
        pair_of(i, (1,) * n, (7,) * w, (9,) * u, **WITH) for i, (n, (w, u)) in enumerate(zip(prompts, lengths, strict=True))
    ]
    method = load_method("orpo", **WITH)
    logp, batch = random_logps(method, groups, seed)

    def paper(lines: list[list[Line]]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for (chosen, rejected), n in zip(lines, prompts, strict=True):
            said = chosen.logp[n - 1 :]
            p, q = (sum(said) / len(said)).exp(), (sum(rejected.logp) / len(rejected)).exp()
            ratio = (p / (1 - p)) / (q / (1 - q))
            total = total - sum(chosen.logp) / len(chosen) - 0.5 * torch.sigmoid(ratio.log()).log()
        return total / len(lines)

    ours = weights_of(method, batch, logp)
    loss, weights = gradient_of(paper, batch, logp)
    torch.testing.assert_close(ours.weights, weights, rtol=0, atol=1e-10)
    assert ours.logged == pytest.approx(loss)


def test_the_whole_loss_is_trls() -> None:
    """`ORPOTrainer.get_batch_loss_metrics` itself on a stand-in for the trainer: its likelihood has the prompt in it. Chosen rows
    of one length, because it takes a mean over all tokens; its odds are in fp32."""
    from trl.experimental.orpo import ORPOTrainer

    rows = [((5, 9, 11), (7, 8, 13, 21), (30, 2)), ((6, 3, 4), (17, 17, 40, 2), (12,))]
    groups = [pair_of(i, *row, **WITH) for i, row in enumerate(rows)]
    method, model = load_method("orpo", **WITH), tiny_model()
    batch = to_batch(groups)
    batch = with_advantage(batch, method.advantage(batch))
    inputs = {}
    for prefix, which in (("chosen", 0), ("rejected", 1)):
        part: Batch = batch.rows(torch.tensor([which, which + 2]))
        real = torch.arange(part.tokens.shape[1]) < part.length[:, None]
        inputs |= {
            f"{prefix}_input_ids": part.tokens,
            f"{prefix}_attention_mask": real.long(),
            f"{prefix}_labels": torch.where(answers(batch)[[which, which + 2]], part.tokens, -100),
        }
    trainer = types.SimpleNamespace(
        is_encoder_decoder=False,
        padding_value=0,
        beta=0.5,
        aux_loss_enabled=False,
        accelerator=types.SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x),
        concatenated_inputs=ORPOTrainer.concatenated_inputs,
        get_batch_logps=ORPOTrainer.get_batch_logps,
    )
    for name in ("concatenated_forward", "odds_ratio_loss"):
        setattr(trainer, name, types.MethodType(getattr(ORPOTrainer, name), trainer))
    ours = gradient(method, model, batch)
    model.zero_grad(set_to_none=True)
    ORPOTrainer.get_batch_loss_metrics(trainer, model, inputs)[0].backward()
    assert max(float(g.abs().max()) for g in ours.values()) > 1e-4
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_rewards_of_pairs_are_those_of_their_answers() -> None:
    """The prompt, of which only the better row has log-probs, is no part of a comparison."""
    method = load_method("orpo", **WITH)
    batch = to_batch([pair_of(0, (1, 5, 6), (7, 8), (9,), **WITH)])
    meter = Meter()
    logp = torch.tensor([[0, -9.0, -9.0, -1.0, -2.0], [0, 0, 0, -4.0, 0]])
    meter.add_pairs(batch, logp, [term.on(batch) for term in method.terms], beta=0.5)
    found = meter.metrics()
    assert (found["logps/chosen"], found["logps/rejected"], found["rewards/accuracies"]) == (-3.0, -4.0, 1.0)
    assert found["rewards/margins"] == pytest.approx(0.5)


def test_a_row_keeps_its_answers() -> None:
    """What is imitated is a matter of tags: no token moves, and a reward stays where it was."""
    group = pair_of(0, (1, 5, 6), (7, 8), (9,), **WITH)
    plain = group.example.expert
    assert [(t.tokens, t.reward) for t in group.trajectories] == [(t.tokens, t.reward) for t in plain]
    assert group.trajectories[1] == plain[1] and group.trajectories[0] != plain[0]
    assert replace(group.trajectories[0], source=plain[0].source) == plain[0]
