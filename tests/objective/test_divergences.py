"""Divergences of two distributions: numbers by hand, their gradients, their limits, and TRL's."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crosstrain.objective.divergences import at_the_target, forward_kl, generalised_jsd, on_top_k, reverse_kl
from crosstrain.types import Divergence

NONE = torch.zeros(1, dtype=torch.long)


def logits(*rows: tuple[float, ...]) -> Tensor:
    """Logits of given probabilities, shifted, since softmax forgets a shift."""
    return torch.tensor(rows, dtype=torch.float64).log() + 0.7


def random_logits(seed: int, rows: int = 5, size: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    own, other = (2 * torch.randn(rows, size, generator=generator, dtype=torch.float64) for _ in range(2))
    return own.requires_grad_(), other.requires_grad_(), torch.randint(size, (rows,), generator=generator)


def of_logits(f: Callable[[Tensor, Tensor, Tensor], Tensor], own: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(f(own, other, targets).sum(), own)
    return gradient


def test_by_hand() -> None:
    """pi = (1/2, 1/2), q = (3/4, 1/4). KL(q || pi) = 3/4 ln 3/2 + 1/4 ln 1/2; KL(pi || q) = 1/2 ln 2/3 + 1/2 ln 2; with beta 1/4,
    m = (9/16, 7/16): 1/4 (3/4 ln 4/3 + 1/4 ln 4/7) + 3/4 (1/2 ln 8/9 + 1/2 ln 8/7)."""
    own, other = logits((0.5, 0.5)), logits((0.75, 0.25))
    ln = math.log
    expected = {
        forward_kl: 0.75 * ln(1.5) + 0.25 * ln(0.5),
        reverse_kl: 0.5 * ln(2 / 3) + 0.5 * ln(2),
        generalised_jsd(0.25): 0.25 * (0.75 * ln(4 / 3) + 0.25 * ln(4 / 7)) + 0.75 * (0.5 * ln(8 / 9) + 0.5 * ln(8 / 7)),
        at_the_target: (ln(0.5) - ln(0.75)) * ln(0.5),
    }
    for divergence, value in expected.items():
        assert float(divergence(own, other, NONE)) == pytest.approx(value)


def test_the_top_two_of_three_by_hand() -> None:
    """pi = (1/2, 1/4, 1/4 - e), q = (1/4, 1/4, 1/2): renormalised (2/3, 1/3) and (1/2, 1/2); with the rest (1/2, 1/4, 1/4) and
    (1/4, 1/4, 1/2)."""
    own, other = logits((0.5, 0.2501, 0.2499)), logits((0.25, 0.25, 0.5))
    ln = math.log
    assert float(on_top_k(1.0, 2, False)(own, other, NONE)) == pytest.approx(2 / 3 * ln(4 / 3) + 1 / 3 * ln(2 / 3), abs=1e-3)
    assert float(on_top_k(1.0, 2, True)(own, other, NONE)) == pytest.approx(0.5 * ln(2) + 0.25 * ln(0.5), abs=1e-3)


def test_the_one_most_likely_token_by_hand() -> None:
    """pi = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): with the rest (1/2, 1/2) and (1/4, 3/4); scaled, both are 1."""
    own, other = logits((0.5, 0.25, 0.25)), logits((0.25, 0.25, 0.5))
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(on_top_k(1.0, 1, True)(own, other, NONE)) == pytest.approx(expected)
    assert float(on_top_k(1.0, 1, False)(own, other, NONE)) == pytest.approx(0.0, abs=1e-12)


def test_gradients_are_the_published_ones_and_the_other_has_none() -> None:
    """Forward: pi - q. Reverse: pi (log pi - log q - KL)."""
    own, other, targets = random_logits(0)
    p, q = own.softmax(-1).detach(), other.softmax(-1).detach()
    torch.testing.assert_close(of_logits(forward_kl, own, other, targets), p - q)
    d = p.log() - q.log()
    torch.testing.assert_close(of_logits(reverse_kl, own, other, targets), p * (d - (p * d).sum(-1, keepdim=True)))
    for f in (forward_kl, reverse_kl, generalised_jsd(0.3), on_top_k(0.3, 4, True), at_the_target):
        found = torch.autograd.grad(f(own, other, targets).sum(), [own, other], allow_unused=True)
        assert found[0] is not None and found[1] is None


def test_one_sampled_token_has_the_gradient_of_the_reverse_kl_in_expectation() -> None:
    """Over every token with its probability: sum_y pi(y) sg(log pi(y) - log q(y)) grad log pi(y) = grad KL(pi || q)."""
    own, other, _ = random_logits(1, rows=1)
    n = own.shape[1]
    p = own.softmax(-1).detach()[0]

    def expected(z: Tensor, o: Tensor, y: Tensor) -> Tensor:
        return (p * at_the_target(z.expand(n, n), o.expand(n, n), torch.arange(n))).sum()

    torch.testing.assert_close(of_logits(expected, own, other, NONE), of_logits(reverse_kl, own, other, NONE))


@pytest.mark.parametrize(("beta", "limit"), [(1e-6, forward_kl), (1 - 1e-6, reverse_kl)])
def test_the_ends_are_limits_of_what_lies_between(beta: float, limit: Divergence) -> None:
    own, other, targets = random_logits(2)
    near = generalised_jsd(beta)(own, other, targets) / (beta * (1 - beta))
    torch.testing.assert_close(near, limit(own, other, targets), rtol=1e-4, atol=1e-6)


def test_half_way_is_symmetric_and_what_is_equal_is_at_0() -> None:
    own, other, targets = random_logits(3)
    torch.testing.assert_close(generalised_jsd(0.5)(own, other, targets), generalised_jsd(0.5)(other, own, targets))
    for f in (forward_kl, reverse_kl, generalised_jsd(0.4), on_top_k(0.4, 3, False)):
        assert float(f(own, own, targets).detach().abs().max()) < 1e-12
        assert float(of_logits(f, own, own.detach(), targets).abs().max()) < 1e-12


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_all_tokens_are_the_most_likely_ones(beta: float, tail: bool) -> None:
    own, other, targets = random_logits(4)
    whole, some = generalised_jsd(beta), on_top_k(beta, 50, tail)
    torch.testing.assert_close(some(own, other, targets), whole(own, other, targets), rtol=0, atol=1e-5 if tail else 1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_is_trls_generalized_jsd(beta: float, temperature: float) -> None:
    """`GKDTrainer.generalized_jsd_loss` on the same logits, value and gradient."""
    from trl.experimental.gkd import GKDTrainer

    own, other, targets = random_logits(5)
    theirs = GKDTrainer.generalized_jsd_loss(own, other.detach(), beta=beta, temperature=temperature, reduction="sum")
    ours = generalised_jsd(beta)(own / temperature, other / temperature, targets).sum()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-10)
    for one, two in zip(*(torch.autograd.grad(x, [own]) for x in (ours, theirs)), strict=True):
        assert float(one.abs().max()) > 1e-3
        torch.testing.assert_close(one, two, rtol=0, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_sdfts_are_trls(alpha: float) -> None:
    """TRL's losses of self-distillation on the same logits: over the vocabulary, over the top 4, and of the answer's own token."""
    from trl.experimental.sdft import loss_utils

    own, other, targets = random_logits(6)
    theirs: list[tuple[Divergence, Tensor]] = [
        (
            generalised_jsd(alpha),
            loss_utils.compute_full_logit_self_distillation_loss(own, other.detach(), distillation_alpha=alpha),
        )
    ]
    for tail in (False, True):
        loss = loss_utils.compute_topk_self_distillation_loss(
            own, other.detach(), distillation_topk=4, distillation_alpha=alpha, distillation_add_tail=tail
        )
        theirs.append((on_top_k(alpha, 4, tail), loss))
    if alpha == 1:
        sampled = loss_utils.compute_sampled_token_self_distillation_loss(
            own[None], other.detach()[None], targets[None], distillation_alpha=1.0
        )
        theirs.append((at_the_target, sampled[0]))
    for divergence, loss in theirs:
        ours = divergence(own, other, targets)
        torch.testing.assert_close(ours, loss, rtol=0, atol=1e-8)
        (one,), (two,) = (torch.autograd.grad(x.sum(), [own], retain_graph=True) for x in (ours, loss))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-8)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_what_is_not_between_0_and_1_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="it must be from 0"):
        generalised_jsd(beta)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        on_top_k(0.5, 0, False)
