"""Token cleaning and IFT: which tokens of a demonstration are trained on, and what the policy reads in its place."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from bandit import PROMPTS, Bandit, learn, model_for
from torch import Tensor
from worked import Line, answer, gradient_of, group, prepared, random_groups, random_logps, weights_of

from crosstrain.errors import UserError
from crosstrain.explain import GivenBatch, explain
from crosstrain.methods import load_method
from crosstrain.methods.ift import GREEDY, discounted
from crosstrain.methods.token_cleaning import KEPT, highest
from crosstrain.objective.reduce import count
from crosstrain.testing import check_method, gradient, made_up_batch, tiny_model
from crosstrain.training.score import score
from crosstrain.types import Batch, Look, Method, Scores, Source

DEMONSTRATIONS = [group(answer("EEE"), name="long"), group(answer("E"), name="short")]
LOGP = torch.tensor([[-1.0, -2.0, -4.0], [-1.0, 0, 0]], dtype=torch.float64)


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def looking(logp: Tensor, batch: Batch) -> Look:
    """A look at the current policy that finds `logp` [B, T - 1]."""
    found = Scores(torch.nn.functional.pad(logp, (1, 0)))

    def look(other: Batch, **asked: Any) -> Scores:
        assert other is batch
        assert not asked, "the policy as it is"
        return found

    return look


def cleaned(method: Method, groups: list[Any], logp: Tensor, ref: Tensor) -> Batch:
    batch = prepared(method, groups, ref_logp=ref)
    return batch.with_columns(**{KEPT: method.columns[KEPT](looking(logp, batch), batch)})


# --- token cleaning ---------------------------------------------------------------------------------------------------

GAINS = of([[0.5, 0.1, 0.3], [0.2, 0, 0]])
"""How much likelier the policy finds each token than the base does."""


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [[1, 0, 1], [0, 0, 0]]),  # int(0.6 * 4) = 2 of the step's
        ({"share": 0.75}, [[1, 0, 1], [1, 0, 0]]),
        ({"share": 0.1}, [[1, 0, 0], [0, 0, 0]]),  # at least one
        ({"share": 1.0}, [[1, 1, 1], [1, 0, 0]]),
        ({"share": 0.7, "scope": "sequence"}, [[1, 0, 1], [1, 0, 0]]),
    ],
)
def test_token_cleaning_by_hand(settings: dict[str, Any], kept: list[list[float]]) -> None:
    method = load_method("token_cleaning", **settings)
    found = weights_of(method, cleaned(method, DEMONSTRATIONS, LOGP, LOGP - GAINS), LOGP)
    total = sum(map(sum, kept))
    torch.testing.assert_close(found.weights, of(kept) / total)
    assert found.logged == pytest.approx(float((-LOGP * of(kept)).sum()) / total)


def test_where_nothing_was_gained_yet_all_tokens_are_trained_on() -> None:
    method, sft = load_method("token_cleaning"), load_method("sft")
    one = weights_of(method, cleaned(method, DEMONSTRATIONS, LOGP, LOGP), LOGP)
    torch.testing.assert_close(one.weights, weights_of(sft, prepared(sft, DEMONSTRATIONS), LOGP).weights)


def test_keeping_every_token_is_sft() -> None:
    method, sft = load_method("token_cleaning", share=1.0), load_method("sft")
    groups = random_groups(3, demonstration=True)
    logp, batch = random_logps(load_method("iw_sft"), groups, 3)
    ours = cleaned(method, groups, logp, batch.columns["ref_logp"][:, 1:])
    torch.testing.assert_close(weights_of(method, ours, logp).weights, weights_of(sft, batch, logp).weights)


def paper(share: float, each: bool) -> Any:
    """arXiv:2502.01968: tokens ranked by the base's loss less the reference model's, the top share kept, the mean of their loss."""

    def top(tokens: list[tuple[float, Tensor]]) -> list[Tensor]:
        ranked = sorted(tokens, key=lambda token: token[0], reverse=True)
        return [x for _, x in ranked[: max(int(share * len(ranked)), 1)]]

    def loss(groups: list[list[Line]]) -> Tensor:
        rows = [[(-r - float(-x.detach()), x) for x, r in zip(line.logp, line.ref, strict=True)] for g in groups for line in g]
        kept = [x for row in rows for x in top(row)] if each else top([token for row in rows for token in row])
        return -sum(kept) / len(kept)  # type: ignore[return-value]

    return loss


@pytest.mark.parametrize("scope", ["step", "sequence"])
@pytest.mark.parametrize("seed", range(3))
def test_a_second_implementation_of_token_cleaning(scope: str, seed: int) -> None:
    method, groups = load_method("token_cleaning", scope=scope, share=0.5), random_groups(seed, demonstration=True, n=6)
    logp, near = random_logps(load_method("iw_sft"), groups, seed)
    batch = cleaned(method, groups, logp, near.columns["ref_logp"][:, 1:])
    ours = weights_of(method, batch, logp)
    loss, weights = gradient_of(paper(0.5, scope == "sequence"), batch, logp)
    torch.testing.assert_close(ours.weights, weights, rtol=0, atol=1e-10)
    assert ours.logged == pytest.approx(loss, rel=1e-10)


def test_highest_looks_at_nothing_outside() -> None:
    generator = torch.Generator().manual_seed(0)
    score, on = torch.randn(4, 6, generator=generator), torch.rand(4, 6, generator=generator) > 0.4
    on[2] = False
    for each in (False, True):
        chosen = highest(score, on, 0.5, each_row=each)
        assert torch.equal(chosen, highest(torch.where(on, score, torch.full_like(score, math.nan)), on, 0.5, each_row=each))
        assert not bool((chosen & ~on).any())
    assert not bool(highest(score, torch.zeros_like(on), 0.5, each_row=False).any())


def test_what_is_kept_is_counted_once_for_the_whole_step() -> None:
    method = load_method("token_cleaning")
    batch = cleaned(method, DEMONSTRATIONS, LOGP, LOGP - GAINS)
    assert count(method.terms, batch, groups=2) == {"demo": 2.0}


@pytest.mark.parametrize("settings", [{"scope": "sequence"}, {"share": 0.3}], ids=str)
def test_token_cleaning_keeps_the_contract(settings: dict[str, Any]) -> None:
    check_method(load_method("token_cleaning", **settings))


def test_token_cleaning_learns_what_it_keeps() -> None:
    """All eight tokens at the first step, then the six that gained most: these are learned, and the others are not."""
    model, bandit = model_for(), Bandit.out_of_reach()
    metrics = learn(load_method("token_cleaning", share=0.75), model, bandit, steps=60)
    known = sorted(p for prompt, a in zip(PROMPTS, bandit.right, strict=False) for p in token_probabilities(model, prompt, a))
    assert len(known) == 8
    assert known[2] > 0.9 > known[1]
    assert metrics[-1]["loss"] < 0.1 < metrics[0]["loss"]
    assert metrics[-1]["mean_token_accuracy"] == 1.0


def token_probabilities(model: Any, prompt: tuple[int, ...], given: tuple[int, ...]) -> list[float]:
    with torch.no_grad():
        p = model(torch.tensor([prompt + given])).logits[0].softmax(-1)
    return [float(p[len(prompt) + i - 1, token]) for i, token in enumerate(given)]


# --- IFT --------------------------------------------------------------------------------------------------------------


def test_ift_by_hand() -> None:
    """gamma 1/2 and losses 1, 2, 4: c = 3, 4, 4, so the loss is (3 + 8 + 16) / 11; a single token's is its own."""
    method = load_method("ift", mix=0.0, gamma=0.5)
    found = weights_of(method, prepared(method, DEMONSTRATIONS), LOGP)
    loss = 27 / 11
    assert found.logged == pytest.approx((loss + 1) / 2)
    # c_k + sum over t <= k of (1/2)^(k - t) (l_t - loss), over sum c and both demonstrations
    first = 3 + (1 - loss)
    second = 4 + (1 - loss) / 2 + (2 - loss)
    third = 4 + (1 - loss) / 4 + (2 - loss) / 2 + (4 - loss)
    torch.testing.assert_close(found.weights, of([[first / 22, second / 22, third / 22], [0.5, 0, 0]]))


def test_demonstrations_of_one_prompt_count_as_those_of_two() -> None:
    method = load_method("ift", mix=0.0, gamma=0.5)
    one, two = (weights_of(method, prepared(method, g), LOGP) for g in ([group(answer("EEE"), answer("E"))], DEMONSTRATIONS))
    torch.testing.assert_close(one.weights, two.weights)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_an_own_answer_beside_a_demonstration_gets_nothing(gamma: float) -> None:
    """Its row has no loss to share out. The demonstration of one token has weight 1."""
    method = load_method("ift", mix=0.0, gamma=gamma)
    found = weights_of(method, prepared(method, [group(answer("E"), answer("OO"))]), LOGP[:, :2])
    torch.testing.assert_close(found.weights, of([[1, 0], [0, 0]]))


def test_a_demonstration_that_is_sure_already_has_no_weight() -> None:
    """Losses of 0 are weights of 0, whose sum nothing can be divided by; the other demonstration has its own."""
    method = load_method("ift", mix=0.0)
    found = weights_of(method, prepared(method, DEMONSTRATIONS), of([[0, 0, 0], [-1, 0, 0]]))
    assert found.logged == pytest.approx(1 / 2)
    torch.testing.assert_close(found.weights, of([[0, 0, 0], [0.5, 0, 0]]))


def test_the_policys_words_are_asked_for_where_they_are_mixed_in() -> None:
    assert load_method("ift").needs == {GREEDY} and not load_method("ift", mix=0.0).needs


def test_without_discount_ift_is_sft_by_sequences() -> None:
    method, sft = load_method("ift", mix=0.0, gamma=0.0), load_method("sft", average="sequences")
    groups = random_groups(2, demonstration=True)
    logp, batch = random_logps(sft, groups, 2)
    torch.testing.assert_close(weights_of(method, batch, logp).weights, weights_of(sft, batch, logp).weights)


def ift_paper(gamma: float) -> Any:
    """The authors' code, by loops: weights from later losses, scaled to a mean of 1, with gradient; a mean over tokens and rows."""

    def loss(groups: list[list[Line]]) -> Tensor:
        rows = []
        for line in (line for g in groups for line in g):
            losses, n = [-x for x in line.logp], len(line)
            follows = [sum(gamma ** (s - t) * losses[s] for s in range(t, n)) / n for t in range(n)]
            weights = [n * c / sum(follows) for c in follows]
            rows.append(sum(w * x for w, x in zip(weights, losses, strict=True)) / n)
        return sum(rows) / len(rows)  # type: ignore[return-value]

    return loss


@pytest.mark.parametrize("gamma", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_a_second_implementation_of_ift(gamma: float, seed: int) -> None:
    method, groups = load_method("ift", mix=0.0, gamma=gamma), random_groups(seed, demonstration=True, n=5)
    logp, batch = random_logps(method, groups, seed)
    ours = weights_of(method, batch, logp)
    loss, weights = gradient_of(ift_paper(gamma), batch, logp)
    torch.testing.assert_close(ours.weights, weights, rtol=0, atol=1e-10)
    assert ours.logged == pytest.approx(loss, rel=1e-10)


def test_published_weight_of_a_token() -> None:
    """[c_k + sum over t <= k of gamma^(k - t) (l_t - loss)] / (sum c N)."""
    gamma, method = 0.7, load_method("ift", mix=0.0, gamma=0.7)
    groups = random_groups(4, demonstration=True)
    logp, batch = random_logps(method, groups, 4)
    on = batch.trained[:, 1:]
    losses = torch.where(on, -logp, 0.0)
    c = torch.where(on, discounted(losses, gamma), 0.0)
    total = c.sum(dim=1, keepdim=True)
    away = torch.where(on, losses - (c * losses).sum(dim=1, keepdim=True) / total, 0.0)
    expected = torch.where(on, (c + discounted(away.flip(1), gamma).flip(1)) / total / len(batch), 0.0)
    torch.testing.assert_close(weights_of(method, batch, logp).weights, expected, rtol=0, atol=1e-10)


def authors_loss(model: Any, table: Any, batch: Batch, mix: float, gamma: float) -> Tensor:
    """Two passes of the model as the authors' trainer makes them, row by row."""
    rows = []
    for r in range(len(batch)):
        n, own = int(batch.length[r]), batch.trained[r, : int(batch.length[r])]
        ids = batch.tokens[r, :n][None]
        read = table(ids)
        with torch.no_grad():
            greedy = model(inputs_embeds=read).logits.argmax(-1)
        said = torch.where(own[None], torch.cat([ids[:, :1], greedy[:, :-1]], dim=1), ids)
        logits = model(inputs_embeds=(1 - mix) * read + mix * table(said)).logits
        losses = -logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        losses = torch.where(own[1:], losses, torch.zeros_like(losses))
        length = losses.shape[0]
        c = torch.stack([sum(gamma ** (s - t) * losses[s] for s in range(t, length)) for t in range(length)])  # type: ignore[arg-type]
        c = torch.where(own[1:], c, torch.zeros_like(c))
        rows.append((c * losses).sum() / c.sum())
    return torch.stack(rows).mean()


@pytest.mark.parametrize("mix", [0.2, 1.0])
def test_the_gradient_on_a_model_is_that_of_the_authors_two_passes(mix: float) -> None:
    method, model = load_method("ift", mix=mix), tiny_model()
    batch = made_up_batch(method, model)
    table = copy.deepcopy(model.get_input_embeddings()).requires_grad_(False)
    model.zero_grad(set_to_none=True)
    authors_loss(model, table, batch, mix, 0.95).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    found = gradient(method, model, batch)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-8)


def test_the_policys_words_stand_only_where_the_demonstration_does() -> None:
    method, model = load_method("ift", mix=0.25), tiny_model()
    assert method.inputs is not None
    batch = made_up_batch(method, model)
    table = model.get_input_embeddings()
    read, plain = method.inputs(table, batch), table(batch.tokens)
    own = batch.written_by(Source.EXPERT)
    assert torch.equal(read[~own], plain[~own])
    said = batch.columns[GREEDY][own].long()
    torch.testing.assert_close(read[own], 0.75 * plain[own] + 0.25 * table(said))
    right = score(model, batch, layout="plain", watch=True).channels["correct"][own].bool()
    assert torch.equal(said == batch.tokens[own], right)
    assert bool((~right).any())
    without = replace(batch, columns={k: c for k, c in batch.columns.items() if k != GREEDY})
    assert torch.equal(method.inputs(table, without), plain)


@pytest.mark.parametrize("settings", [{"mix": 0.0}, {"gamma": 0.0}, {"mix": 1.0, "gamma": 1.0}], ids=str)
def test_ift_keeps_the_contract(settings: dict[str, Any]) -> None:
    check_method(load_method("ift", **settings))


def test_ift_imitates() -> None:
    """With a head of its own: where the head is the table, what is read at last is not what was trained on."""
    model, bandit = model_for(), Bandit.out_of_reach()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    before = model.get_input_embeddings().weight.detach().clone()
    assert max(bandit.success(model)) < 1e-3
    metrics = learn(load_method("ift"), model, bandit, steps=80)
    assert min(bandit.success(model)) > 0.7
    assert metrics[-1]["loss"] < 0.3 * metrics[0]["loss"]
    assert torch.equal(model.get_input_embeddings().weight, before), "the inputs are made without it"


def test_explain_says_what_it_cannot_show() -> None:
    batch = GivenBatch(groups=[{"trajectories": [{"source": ["prompt", "expert"], "logp": [0, -1.0]}]}])  # type: ignore[list-item]
    with pytest.raises(UserError, match="looks at the whole next-token distribution"):
        explain(load_method("ift"), batch)
    assert explain(load_method("ift", mix=0.0), batch)["loss"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("token_cleaning", {"share": 0.0}, "share: got 0.0"),
        ("token_cleaning", {"scope": "global"}, "scope: got 'global'; allowed: step, sequence"),
        ("ift", {"mix": 1.5}, "both must be from 0 to 1"),
        ("ift", {"gamma": -0.1}, "both must be from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method(name, **settings)
