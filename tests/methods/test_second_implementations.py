"""Objectives that no other file writes a second time: ReMax, UFT, Prefix-RFT, TRAPO, SRL, SRFT, the covariances, CPO and OTR, each
from its paper as loops over groups, sequences and tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import pytest
import torch
from test_distillation import assert_same
from test_hybrid_family import srft_weights
from test_token_weights import from_prefixes, replace_first
from test_whole_distribution import own_gradient
from torch import Tensor
from worked import Line, agrees, prepared, random_groups, weights_of

from crosstrain.methods import load_method
from crosstrain.testing import gradient, made_up_batch, tiny_model
from crosstrain.training.batching import to_batch
from crosstrain.types import Batch, Group, Method, Scores, Source

F64 = torch.float64


def zero() -> Tensor:
    return torch.zeros((), dtype=F64)


def clipped(x: Tensor, old: float, a: float, low: float = 0.2, high: float = 0.2) -> Tensor:
    """arXiv:1707.06347 eq. 7."""
    r = (x - old).exp()
    return -torch.minimum(a * r, a * r.clamp(1 - low, 1 + high))


@pytest.mark.parametrize("average", ["sequences", "tokens"])
@pytest.mark.parametrize("seed", range(3))
def test_remax(seed: int, average: str) -> None:
    """arXiv:2310.10505 eq. 4: the log-prob of a whole answer times its reward less the greedy answer's."""

    def paper(groups: list[list[Line]]) -> Tensor:
        total, n = zero(), 0
        for greedy, *sampled in groups:
            for line in sampled:
                total = total - (line.reward - greedy.reward) * sum(line.logp)
                n += 1 if average == "sequences" else len(line)
        return total / n

    groups = [replace_first(g) for g in random_groups(seed, own=4)]
    agrees(load_method("remax", num_generations=3, average=average), paper, groups, seed)


# --- prefixes ---------------------------------------------------------------------------------------------------------


def parts(batch: Batch, leaf: Tensor) -> Iterator[tuple[int, int, float, Tensor, float, bool]]:
    """Row, position, reward, log-prob, old log-prob and whether an expert wrote it, of every trained token."""
    old = batch.columns.get("old_logp")
    for r in range(len(batch)):
        for t in range(1, int(batch.length[r])):
            if bool(batch.trained[r, t]):
                x = leaf[r, t - 1]
                before = float(x.detach()) if old is None else float(old[r, t])
                yield r, t, float(batch.reward[r]), x, before, int(batch.source[r, t]) == int(Source.EXPERT)


def numbers(groups: list[Group], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    shape = to_batch(groups).tokens[:, 1:].shape
    generator = torch.Generator().manual_seed(seed)
    logp = -4 * torch.rand(shape, generator=generator, dtype=F64)
    made = {n: logp + 0.5 * torch.randn(shape, generator=generator, dtype=F64) for n in ("old_logp", "ref_logp")}
    return logp, made


def assert_same_weights(method: Method, batch: Batch, logp: Tensor, loss_of: object) -> None:
    leaf = logp.clone().requires_grad_()
    loss = loss_of(leaf)  # type: ignore[operator]
    (found,) = torch.autograd.grad(loss, leaf)
    ours = weights_of(method, batch, logp)
    torch.testing.assert_close(ours.weights, -found, rtol=0, atol=1e-10)
    assert ours.logged == pytest.approx(float(loss.detach()), rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_uft(seed: int) -> None:
    """arXiv:2505.16984 eq. 4: GRPO's clipped loss and a KL (k3) on what was explored, likelihood on the hint."""
    method, groups = load_method("uft", hint_coef=0.1, beta=0.2, num_iterations=2), from_prefixes(seed)
    logp, columns = numbers(groups, seed)
    batch = prepared(method, groups, **columns)

    def loss(leaf: Tensor) -> Tensor:
        explored, hints = [], []
        for r, t, reward, x, old, expert in parts(batch, leaf):
            rewards = [float(v) for v in batch.reward[batch.group == batch.group[r]]]
            a = (reward - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6)
            away = float(batch.columns["ref_logp"][r, t]) - x
            if expert:
                hints.append(-x)
            else:
                explored.append(clipped(x, old, a) + 0.2 * (away.exp() - away - 1))
        return sum(explored, zero()) / len(explored) + 0.1 * sum(hints, zero()) / len(hints)

    assert_same_weights(method, batch, logp, loss)


@pytest.mark.parametrize("seed", range(3))
def test_prefix_rft(seed: int) -> None:
    """arXiv:2507.01679: one clipped objective on the whole of a hybrid answer, of whose prefix the least sure tokens are kept; what
    goes on from a prefix is alone in its group, the prefix is credited against the plain answers."""
    method = load_method("prefix_rft", entropy_share=0.4, max_completion_length=9)
    groups = from_prefixes(seed)
    logp, columns = numbers(groups, seed)
    entropy = torch.rand(logp.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    batch = prepared(method, groups, old_logp=columns["old_logp"], taught=torch.zeros_like(logp))
    seen = Scores(torch.nn.functional.pad(logp, (1, 0)), {"entropy": torch.nn.functional.pad(entropy, (1, 0))})
    column = method.columns["taught"](lambda b: seen, batch)  # type: ignore[arg-type]
    batch = prepared(method, groups, old_logp=columns["old_logp"], taught=column[:, 1:])
    places = [(r, t) for r, t, *_, expert in parts(batch, logp) if expert]
    kept = set(sorted(places, key=lambda at: -float(entropy[at[0], at[1] - 1]))[: len(places) - int(0.6 * len(places))])
    assert 0 < len(kept) < len(places)

    def loss(leaf: Tensor) -> Tensor:
        total = zero()
        for r, t, reward, x, old, expert in parts(batch, leaf):
            plain = [i for i in torch.nonzero(batch.group == batch.group[r]).flatten().tolist() if not hinted(batch, i)]
            centred = reward - statistics.fmean(float(batch.reward[i]) for i in plain)
            a = (centred if (r, t) in kept else 0.0) if expert else reward if hinted(batch, r) else centred
            total = total + clipped(x, old, a)
        return total / (9 * len(batch))

    assert_same_weights(method, batch, logp, loss)


def hinted(batch: Batch, row: int) -> bool:
    return bool((batch.source[row] == int(Source.EXPERT)).any())


@pytest.mark.parametrize("seed", range(3))
def test_trapo(seed: int) -> None:
    """arXiv:2512.17636: centred rewards and plain ratios on own tokens; on one prefix of each length TrSFT, whose gradient is that
    of log pi where p is at least 0.1, and that of 10 p below."""
    method, groups = load_method("trapo", num_iterations=2), from_prefixes(seed)
    logp, columns = numbers(groups, seed)
    batch = prepared(method, groups, old_logp=columns["old_logp"])
    batch = batch.with_columns(taught=method.columns["taught"](lambda b: pytest.fail("nothing has to be scored"), batch))
    length = [int((row == int(Source.EXPERT)).sum()) for row in batch.source]
    last = {(int(g), n): r for r, (g, n) in enumerate(zip(batch.group, length, strict=True)) if n}
    assert any(float(x.exp()) < 0.1 for r, _, _, x, _, e in parts(batch, logp) if e and r in last.values())

    def loss(leaf: Tensor) -> Tensor:
        total, n = zero(), 0
        for r, _, reward, x, old, expert in parts(batch, leaf):
            n += 1
            if not expert:
                mean = float(batch.reward[batch.group == batch.group[r]].mean())
                total = total - (reward - mean) * (x - old).exp()
            elif r in last.values():
                total = total - (x if float(x.detach()) >= math.log(0.1) else 10 * x.exp())
        return total / n

    leaf = logp.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(weights_of(method, batch, logp).weights, -found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_srl(seed: int) -> None:
    """arXiv:2510.25992: GRPO's loss on what the rollouts wrote, a mean over each one's own tokens; what was shown is in no term."""
    method, groups = load_method("srl", num_iterations=2), from_prefixes(seed)
    logp, columns = numbers(groups, seed)
    batch = prepared(method, groups, old_logp=columns["old_logp"])

    def loss(leaf: Tensor) -> Tensor:
        rows: dict[int, list[Tensor]] = {}
        for r, _, reward, x, old, expert in parts(batch, leaf):
            rewards = [float(v) for v in batch.reward[batch.group == batch.group[r]]]
            a = (reward - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6)
            rows.setdefault(r, []).extend([] if expert else [clipped(x, old, a)])
        return sum((sum(own, zero()) / len(own) for own in rows.values()), zero()) / len(rows)

    assert_same_weights(method, batch, logp, loss)


# --- SRFT, covariances, CPO ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_srft(seed: int) -> None:
    """arXiv:2506.19767 eq. 6 to 10 as a loss, each part over its own tokens, H the mean entropy of a sequence."""
    groups = random_groups(seed, own=4, demonstration=True)
    logp, _ = numbers(groups, seed)
    entropy = 2 * torch.rand(logp.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    batch, leaf = to_batch(groups), logp.clone().requires_grad_()
    demo, credited, right, wrong = [], [], [], []
    for r in range(len(batch)):
        n = int(batch.length[r]) - 1
        h = float(entropy[r, :n].mean())
        rewards = [float(x) for x in batch.reward[batch.group == batch.group[r]]]
        a = (float(batch.reward[r]) - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6)
        for t in range(n):
            x = leaf[r, t]
            if hinted(batch, r):
                demo.append(-0.5 * math.exp(-h) * x)
                credited.append(-a * x.exp())
            elif float(batch.reward[r]) > 0:
                right.append(-0.1 * math.exp(h) * x)
            else:
                wrong.append(x)
    loss = sum((sum(part, zero()) / len(part) for part in (demo, credited, right, wrong)), zero())
    (found,) = torch.autograd.grad(loss, leaf)
    assert load_method("srft").settings["sft_coef"] == 0.5
    torch.testing.assert_close(srft_weights(logp, entropy, groups), -found, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_covariances(seed: int, name: str) -> None:
    """arXiv:2505.22617 eq. 9 to 12, the choice of tokens too: for KL-Cov the largest covariances; for Clip-Cov those in a band that
    has at most as many as may be drawn, so that chance has no part."""
    share = 0.25
    method = load_method(name, **({"ratio": share, "beta": 0.7} if name == "kl_cov" else {"ratio": 0.9, "lowest": 0.3}))
    groups = [g for g in random_groups(seed, own=4, n=5) if len({t.reward for t in g.trajectories}) > 1]
    logp, columns = numbers(groups, seed)
    blank = prepared(method, groups, old_logp=columns["old_logp"], covariant=torch.zeros_like(logp))
    seen = Scores(torch.nn.functional.pad(logp, (1, 0)))
    column = method.columns["covariant"](lambda b: seen, blank)  # type: ignore[arg-type]
    batch = blank.with_columns(covariant=column)
    places = [(r, t) for r, t, *_ in parts(batch, logp)]
    a = {at: float(batch.advantage[at]) for at in places}
    x = {at: float(batch.columns["old_logp"][at]) for at in places}  # of the policy that sampled
    mean_a, mean_x = statistics.fmean(a.values()), statistics.fmean(x.values())
    covariance = {at: (a[at] - mean_a) * (x[at] - mean_x) for at in places}
    if name == "kl_cov":
        held = set(sorted(places, key=lambda at: -covariance[at])[: int(share * len(places))])
    else:
        held = {at for at in places if 0.3 < covariance[at] < 5.0}
    assert 0 < len(held) < len(places)

    def loss(leaf: Tensor) -> Tensor:
        total = zero()
        for r, t, _, now, old, _ in parts(batch, leaf):
            gain = a[r, t] * (now - old).exp()
            if name == "clip_cov":  # the clip is open to twice the old probability
                gain = torch.minimum(gain, a[r, t] * (now - old).exp().clamp(0.0, 2.0))
            if (r, t) in held:
                gain = gain - 0.7 * (now - old).abs() if name == "kl_cov" else gain.detach()
            total = total - gain
        return total / len(places)

    leaf = logp.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(weights_of(method, batch, logp).weights, -found, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_cpo(seed: int) -> None:
    """arXiv:2401.08417 eq. 5, both parts: the likelihood is a mean over all tokens of better answers."""

    def paper(groups: list[list[Line]]) -> Tensor:
        preference, likelihood, tokens = zero(), zero(), 0
        for g in groups:
            better, worse = sorted(g, key=lambda line: -line.reward)
            preference = preference - torch.sigmoid(0.2 * (sum(better.logp) - sum(worse.logp))).log()
            likelihood, tokens = likelihood - sum(better.logp), tokens + len(better)
        return preference / len(groups) + 0.7 * likelihood / tokens

    agrees(load_method("cpo", beta=0.2, nll_coef=0.7), paper, random_groups(seed, pair=True), seed)


# --- OTR ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "temperature"), [(-0.1, 1.3), (0.3, 0.7)])
def test_otr(beta: float, temperature: float) -> None:
    """arXiv:2509.26313: one token a drawn at a temperature and rewarded 1 if it is the demonstration's, else beta; -R log pi(a),
    here the mean over every token that could be drawn, one after another."""
    method, model = load_method("otr", beta=beta, temperature=temperature), tiny_model()
    batch = made_up_batch(method, model, examples=3)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        rows = []
        for z, y in zip(logits, targets.tolist(), strict=True):
            chance, logp = (z.detach() / temperature).softmax(0), z.log_softmax(0)
            rows.append(-sum(chance[v] * (1.0 if v == y else beta) * logp[v] for v in range(len(z))))
        return torch.stack(rows)

    assert_same(gradient(method, model, batch), own_gradient(model, batch, loss))
