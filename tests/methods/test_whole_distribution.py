"""Methods that look at the whole next-token distribution, on a model: GEM, OTR, label smoothing; and NEFTune's noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.testing import gradient, made_up_batch, tiny_model
from crosstrain.types import Batch


def own_gradient(model: Any, batch: Batch, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """The gradient of the mean over trained tokens of `loss(logits [M, V], targets [M])`, from the model's own forward."""
    model.zero_grad(set_to_none=True)
    logits = model(batch.tokens).logits[:, :-1][batch.trained[:, 1:]]
    loss(logits, batch.tokens[:, 1:][batch.trained[:, 1:]]).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert max(float(g.abs().max()) for g in one.values()) > 1e-4
    for name, g in one.items():
        torch.testing.assert_close(g, other[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def gem_paper(beta: float, linear: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """arXiv:2408.16673 eq. 7, entry by entry of the vocabulary."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        rows = []
        for z, y in zip(logits, targets.tolist(), strict=True):
            q, logp = (z.detach() / beta).softmax(0), z.log_softmax(0)
            w = torch.ones_like(q) if linear else (0.01 * (z - z[y]).detach()).sigmoid()
            rows.append(-sum(q[v] * w[v] * (logp[y] - logp[v]) for v in range(len(z))))
        return torch.stack(rows)

    return loss


@pytest.mark.parametrize("h", ["linear", "logsigmoid"])
def test_gem_is_the_papers(h: str) -> None:
    method, model = load_method("gem", h=h, beta=0.6), tiny_model()
    batch = made_up_batch(method, model, examples=3)
    assert_same(gradient(method, model, batch), own_gradient(model, batch, gem_paper(0.6, h == "linear")))


def test_linear_gem_is_cross_entropy_at_a_temperature() -> None:
    method, model = load_method("gem", h="linear", beta=0.6), tiny_model()
    batch = made_up_batch(method, model)

    def at_temperature(logits: Tensor, targets: Tensor) -> Tensor:
        return 0.6 * F.cross_entropy(logits / 0.6, targets, reduction="none")

    assert_same(gradient(method, model, batch), own_gradient(model, batch, at_temperature))


def test_gem_by_hand() -> None:
    """Two tokens of probability 1/2 each, beta 1: q = 1/2, and -1/2 (log 1/2 - log 1/2) = 0; logits of ln 3 and 0 at beta 1: q is
    3/4 and 1/4, log pi(y) - log pi(other) = ln 3 for the likelier: -1/4 ln 3."""
    [channel] = load_method("gem", h="linear", beta=1.0).channels.values()
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    assert channel(logits, torch.tensor([0, 0])).tolist() == pytest.approx([0.0, -math.log(3) / 4])


def test_otr_is_the_expectation_of_rewarded_single_tokens() -> None:
    """Sampling 200,000 tokens at temperature 1.3 at one position: the mean of R -log pi and of its gradient."""
    [channel] = load_method("otr", beta=-0.2, temperature=1.3).channels.values()
    z = torch.tensor([[1.0, 0.2, -0.7, 0.4]], dtype=torch.float64, requires_grad=True)
    exact = channel(z, torch.tensor([1]))
    (of_exact,) = torch.autograd.grad(exact.sum(), z)
    q = (z.detach()[0] / 1.3).softmax(0)
    drawn = torch.multinomial(q, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    reward = torch.where(drawn == 1, 1.0, -0.2).double()
    sampled = (-reward * z[0].log_softmax(0)[drawn]).mean()
    (of_sampled,) = torch.autograd.grad(sampled, z)
    assert float(sampled) == pytest.approx(float(exact.detach()), abs=0.01)
    torch.testing.assert_close(of_sampled, of_exact, rtol=0, atol=0.01)


def test_otr_at_temperature_1_is_dft_times_a_constant() -> None:
    otr, dft, model = load_method("otr", beta=-0.1, temperature=1.0), load_method("dft"), tiny_model()
    batch = made_up_batch(dft, model)
    expected = {name: 1.1 * g for name, g in gradient(dft, model, batch).items()}
    assert_same(gradient(otr, model, batch), expected)


@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_label_smoothing_is_torchs(average: str) -> None:
    method, model = load_method("sft", label_smoothing=0.2, average=average), tiny_model()
    batch = made_up_batch(method, model)
    share = 1.0 / batch.trained.sum(dim=1, keepdim=True).double() if average == "sequences" else torch.ones(len(batch), 1)
    weight = share.expand(batch.tokens.shape)[batch.trained].double()
    n = len(batch) if average == "sequences" else len(weight)

    def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
        each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)
        return each * weight / n * len(each)

    # a sequence's own mean is a weight in the advantage's dtype, fp32
    assert_same(gradient(method, model, batch), own_gradient(model, batch, smoothed), 1e-7 if average == "sequences" else 1e-10)


def test_noise_is_uniform_within_its_bound_on_real_tokens_alone_and_keyed() -> None:
    method, model = load_method("sft", neftune_noise_alpha=5.0), tiny_model()
    batch = made_up_batch(method, model)
    assert method.embed is not None
    still = torch.zeros(*batch.tokens.shape, 24, dtype=torch.float64)
    noise = method.embed(still, batch)
    for r in range(len(batch)):
        n = int(batch.length[r])
        bound = 5.0 / math.sqrt(n * 24)
        assert 0.8 * bound < float(noise[r, :n].abs().max()) <= bound and not bool(noise[r, n:].any())
        assert float(noise[r, :n].mean()) == pytest.approx(0.0, abs=0.2 * bound), "as often up as down"
    assert torch.equal(method.embed(still, batch), noise)
    order = torch.arange(len(batch) - 1, -1, -1)
    assert torch.equal(method.embed(still[order], batch.rows(order)), noise[order])
    assert not torch.equal(method.embed(still, replace(batch, step=1)), noise)
    first = batch.rows(torch.tensor([0]))
    assert len({float(method.embed(still[:1], replace(first, step=s))[0, 0, 0]) for s in range(200)}) == 200
    plain = gradient(load_method("sft"), model, batch)
    assert any(not torch.allclose(g, plain[name]) for name, g in gradient(method, model, batch).items())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gem", {"beta": 0.0}, "beta: got 0.0; it must be positive"),
        ("gem", {"h": "log"}, "h: got 'log'; allowed: logsigmoid, linear"),
        ("otr", {"beta": 1.0}, "it must be below 1"),
        ("otr", {"temperature": 0.0}, "it must be positive"),
        ("sft", {"label_smoothing": 1.0}, r"label_smoothing: got 1.0; it must be in \[0, 1\)"),
        ("sft", {"neftune_noise_alpha": -5.0}, "neftune_noise_alpha: got -5.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method(name, **settings)
