"""CHORD, SuperRL, RL-PLUS, UFT and Prefix-RFT: where the demonstration enters, and with what weight."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor
from worked import Line, Paper, agrees, answer, group, prepared, random_groups, random_logps, selected, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.objective.reduce import count, term_loss
from crosstrain.types import Example, Group, Scores, Source, Trajectory

LN2 = math.log(2)
A = 0.5 / (math.sqrt(0.5) + 1e-6)
"""Rewards 1 and 0: the advantages are +-0.7071."""


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- CHORD ------------------------------------------------------------------------------------------------------------

MIXED = [group(answer("EE", 1.0), answer("O", 1.0), answer("O", 0.0))]
HALVES = -LN2 * of([[1, 2], [1, 0], [1, 0]])
"""The demonstration's tokens have probabilities 1/2 and 1/4, the rollouts' 1/2."""


def test_chord_mu_by_hand() -> None:
    """At first mu is 0.9: 0.1 +-A / 2 own tokens; 0.9 / 2 demonstration tokens, -log pi of 3/2 ln 2 on average."""
    method = load_method("chord_mu")
    found = weights_of(method, prepared(method, MIXED), HALVES)
    assert found.logged == pytest.approx(0.1 * 0 + 0.9 * 1.5 * LN2)
    torch.testing.assert_close(found.weights, of([[0.45, 0.45], [0.1 * A / 2, 0], [-0.1 * A / 2, 0]]))


def test_chord_phi_by_hand() -> None:
    """p (1 - p) is 1/4 and 3/16, at mu 0.1 over two tokens."""
    method = load_method("chord_phi")
    found = weights_of(method, prepared(method, MIXED), HALVES)
    assert found.logged == pytest.approx(0.1 * (1 / 4 + 2 * 3 / 16) * LN2 / 2)
    torch.testing.assert_close(found.weights, of([[0.0125, 0.009375], [0.9 * A / 2, 0], [-0.9 * A / 2, 0]]))


def test_chords_coefficients_follow_the_step() -> None:
    rl, demo = load_method("chord_mu", mu=0.8, mu_valley=0.2, mu_warmup_steps=2, mu_decay_steps=4).terms
    assert [demo.coefficient(s) for s in (0, 1, 2, 4, 9)] == pytest.approx([0.0, 0.4, 0.8, 0.5, 0.2])
    assert all(rl.coefficient(s) == pytest.approx(1 - demo.coefficient(s)) for s in range(9))


def test_chord_takes_rollouts_from_one_stream_and_demonstrations_from_another() -> None:
    method = load_method("chord_mu")
    assert method.plan.streams({}) == pytest.approx({"rl": 1 / 3, "demos": 2 / 3})
    assert (method.plan.brings("rl"), method.plan.brings("demos")) == (None, "demonstration")
    own, demo = answer("O", 1.0), answer("E", 1.0)
    there = Group(Example("a", "", (1,), (demo,)), (demo,), "demos")
    here = Group(Example("b", "", (1,), (demo,)), (demo,), "rl")
    assert method.plan.next(there, {}) == () and [r.n for r in method.plan.next(here, {})] == [8]
    answered = Group(here.example, (demo, own), "rl")
    assert method.plan.next(answered, {}) == ()
    assert method.select(there, {}) == there and method.select(answered, {}).trajectories == (own,)  # type: ignore[union-attr]
    one = load_method("chord_mu", rollouts_from="train", demonstrations_from="train")
    assert one.plan.streams({}) == {"train": 1.0}
    both = Group(here.example, (demo, own), "train")
    assert one.select(both, {}) == both


def own_and_demonstrations(groups: list[list[Line]]) -> tuple[list[tuple[Tensor, float, float]], list[Tensor]]:
    """Of own tokens log-prob, old log-prob and GRPO's advantage over the rollouts; of demonstrations the log-probs."""
    own, demo = [], []
    for g in groups:
        rewards = [line.reward for line in g if not line.expert]
        for line in g:
            if line.expert:
                demo += line.logp
                continue
            a = (line.reward - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6)
            own += [(x, o, a) for x, o in zip(line.logp, line.old, strict=True)]
    return own, demo


def clipped(x: Tensor, old: float, a: float) -> Tensor:
    r = (x - old).exp()
    return -torch.minimum(a * r, a * r.clamp(0.8, 1.2))


def chord_paper(mu: float, phi: bool) -> Paper:
    """arXiv:2508.11408 eq. 5 and 7, both parts averaged over their own tokens."""

    def loss(groups: list[list[Line]]) -> Tensor:
        own, demo = own_and_demonstrations(groups)
        p = [x.detach().exp() for x in demo]
        sft = sum(-(q * (1 - q) if phi else 1) * x for q, x in zip(p, demo, strict=True)) / len(demo)
        return (1 - mu) * sum(clipped(*token) for token in own) / len(own) + mu * sft

    return loss


# --- SuperRL and its missing baseline ----------------------------------------------------------------------------------

FAILED = group(answer("EE", 1.0), answer("O", 0.0), answer("O", 0.0), name="failed")
SOLVED = group(answer("EE", 1.0), answer("O", 1.0), answer("O", 1.0), name="solved")
PARTLY = group(answer("EE", 1.0), answer("O", 1.0), answer("O", 0.0), name="partly")


@pytest.mark.parametrize(("trigger", "imitated"), [("rewards", 1), ("advantages", 2)])
def test_superrl_imitates_where_the_signal_is_dead(trigger: str, imitated: int) -> None:
    kept = selected(load_method("superrl", trigger=trigger), [FAILED, SOLVED, PARTLY])
    assert [bool(g.by(Source.EXPERT)) for g in kept] == [True, imitated == 2, False]


def test_superrl_by_hand() -> None:
    """A failed group's demonstration: 1/2 per token; a mixed one's rollouts: +-A / 2 per token; both halved, for two groups."""
    method = load_method("superrl")
    found = weights_of(method, prepared(method, [FAILED, PARTLY]), -LN2 * of([[1, 2], [1, 0], [1, 0]]))
    assert found.logged == pytest.approx((1.5 * LN2 + 0) / 2)
    torch.testing.assert_close(found.weights, of([[1 / 4, 1 / 4], [A / 4, 0], [-A / 4, 0]]))


def test_superrl_averages_a_prompts_demonstrations_over_their_tokens() -> None:
    """Two tokens and one: 1/3 each."""
    method, own = load_method("superrl"), FAILED.by(Source.POLICY)
    found = weights_of(method, prepared(method, [group(answer("EE", 1.0), answer("E", 1.0), *own)]), torch.full((2, 2), -1.0))
    torch.testing.assert_close(found.weights, of([[1 / 3, 1 / 3], [1 / 3, 0]]))


def superrl_paper(groups: list[list[Line]]) -> Tensor:
    """arXiv:2506.01096: per instance one of the two losses; each a mean over the tokens of its group."""
    losses = []
    for g in groups:
        own, demo = own_and_demonstrations([g])
        losses.append(-sum(demo) / len(demo) if demo else sum(clipped(*token) for token in own) / len(own))
    return sum(losses) / len(losses)


def test_dropping_dead_prompts_by_hand() -> None:
    """Two of three groups are dropped, and the sequences of the third alone are counted: +-A / 2, where GRPO has +-A / 6."""
    rollouts = [group(*g.by(Source.POLICY), name=g.example.id) for g in (FAILED, SOLVED, PARTLY)]
    method, grpo = load_method("drop_dead"), load_method("grpo", beta=0.0)
    found = weights_of(method, prepared(method, rollouts), torch.full((2, 1), -1.0))
    torch.testing.assert_close(found.weights, of([[A / 2], [-A / 2]]))
    other = weights_of(grpo, prepared(grpo, rollouts), torch.full((6, 1), -1.0))
    torch.testing.assert_close(other.weights[-2:] * 3, found.weights)


# --- RL-PLUS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("baseline", "demo", "own"), [("group", 2 / 3, -1 / 3), ("rollouts", 1, 0)])
def test_rl_plus_by_hand(baseline: str, demo: float, own: float) -> None:
    """Rollouts of 0 and 0, demonstration 1: A is 2/3, -1/3 and -1/3, or 1, 0 and 0. p = old = 3/4 and 1/3: den = 13/16 and 1/2,
    (1 - p)^0.5 = 1/2 and sqrt(2/3). Four tokens."""
    method = load_method("rl_plus", baseline=baseline)
    groups = [group(answer("EE", 1.0), answer("O", 0.0), answer("O", 0.0))]
    found = weights_of(method, prepared(method, groups), of([[0.75, 1 / 3], [0.5, 1], [0.5, 1]]).log())
    one, two = demo * 0.5 * 0.75 / (13 / 16), demo * math.sqrt(2 / 3) / 3 / 0.5
    assert found.logged == pytest.approx(-(one + two + 2 * own) / 4)
    torch.testing.assert_close(found.weights, of([[one / 4, two / 4], [own / 4, 0], [own / 4, 0]]))


def rl_plus_paper(baseline: str) -> Paper:
    """arXiv:2508.00222 eq. 5 to 8 with a uniform density of 1, over all tokens, the baseline as in the authors' two estimators."""

    def loss(groups: list[list[Line]]) -> Tensor:
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for g in groups:
            mean = statistics.fmean(line.reward for line in g if baseline == "group" or not line.expert)
            for line in g:
                for x, o in zip(line.logp, line.old, strict=True):
                    old, p = math.exp(o), x.exp()
                    ratio = (1 - p.detach()).sqrt() * 2 * p / (old + 0.5 * (old + 1)) if line.expert else p / old
                    total, tokens = total - (line.reward - mean) * ratio, tokens + 1
        return total / tokens

    return loss


@pytest.mark.parametrize("seed", range(4))
def test_second_implementations(seed: int) -> None:
    groups = random_groups(seed, own=4, demonstration=True)
    agrees(load_method("chord_mu", mu=0.3, num_iterations=2), chord_paper(0.3, phi=False), groups, seed)
    agrees(load_method("chord_phi", mu=0.3, num_iterations=2), chord_paper(0.3, phi=True), groups, seed)
    agrees(load_method("superrl", num_iterations=2), superrl_paper, groups, seed)
    agrees(load_method("superrl", trigger="advantages", num_iterations=2), superrl_paper, groups, seed)
    for baseline in ("group", "rollouts"):
        agrees(load_method("rl_plus", baseline=baseline, num_iterations=2), rl_plus_paper(baseline), groups, seed)


# --- prefixes ---------------------------------------------------------------------------------------------------------


def demonstrated(n: int, name: str = "a") -> Group:
    """A group without trajectories, whose example brings a demonstration of `n` tokens."""
    source = (Source.PROMPT,) + (Source.EXPERT,) * n
    return Group(Example(f"train:{name}", "", (1,), (Trajectory(tuple(range(1, n + 2)), source),)), ())


def test_uft_by_hand() -> None:
    """Two rollouts from a hint of two tokens: +-A over the three own tokens, 0.1 over the four tokens of hints, and the KL of
    pi = 2 ref, whose weight is -(1 - 1/2), on own tokens."""
    method = load_method("uft", hint_coef=0.1, beta=0.2)
    groups = [group(answer("EEOO", 1.0), answer("EEO", 0.0))]
    logp = torch.full((2, 4), -1.0, dtype=torch.float64)
    found = weights_of(method, prepared(method, groups, ref_logp=logp - LN2), logp)
    own, k3 = 0.1 / 4, 0.2 * 0.5 / 3
    expected = of([[own, own, A / 3 - k3, A / 3 - k3], [own, own, -A / 3 - k3, 0]])
    torch.testing.assert_close(found.weights, expected)
    assert found.logged == pytest.approx((-2 * A + A) / 3 + 0.1 + 0.2 * (LN2 - 1 / 2))


def test_uft_has_the_terms_that_count() -> None:
    for settings, terms in (({}, ["rl", "hint", "kl"]), ({"hint_coef": 0.0}, ["rl", "kl"]), ({"beta": 0.0}, ["rl", "hint"])):
        assert [t.name for t in load_method("uft", **settings).terms] == terms


def test_ufts_hints_are_binomial_parts_of_the_demonstration_and_end() -> None:
    method = load_method("uft", hint_steps=100)
    plan, state = method.plan, dict(method.init())
    lengths = []
    for i in range(400):
        [request] = plan.next(demonstrated(10, str(i)), state)
        assert request.n == 4 and request.prefix == tuple(range(2, 12))[: len(request.prefix)]
        lengths.append(len(request.prefix))
    assert set(lengths) <= {0, 2, 4, 6, 8, 9}, "fifths, and never the last token"
    assert statistics.fmean(lengths) == pytest.approx(10 * 0.95 - 0.95**5, abs=0.2)
    assert plan.next(demonstrated(10, "7"), state) == plan.next(demonstrated(10, "7"), state)
    for _ in range(100):
        state = dict(method.update(state, {}))
    assert [len(plan.next(demonstrated(10, str(i)), state)[0].prefix) for i in range(20)] == [0] * 20
    answered = group(answer("EO", 1.0))
    assert plan.next(answered, state) == () and plan.start(answered.example, state) == ()


def test_prefix_rft_by_hand() -> None:
    """Plain rollouts 1 and 0: mean 1/2. The third goes on from two tokens and is right: its own token has A = 1, its prefix 1/2, on
    the one token of the two that is taught. Divided by three sequences times 10."""
    method = load_method("prefix_rft", max_completion_length=10)
    groups = [group(answer("O", 1.0), answer("O", 0.0), answer("EEO", 1.0))]
    logp = torch.full((3, 3), -1.0, dtype=torch.float64)
    taught = of([[0, 0, 0], [0, 0, 0], [0, 1, 0]])
    found = weights_of(method, prepared(method, groups, taught=taught), logp)
    torch.testing.assert_close(found.weights, of([[0.5, 0, 0], [-0.5, 0, 0], [0, 0.5, 1]]) / 30)
    assert found.logged == pytest.approx((-0.5 + 0.5 - 0.5 - 1) / 30)


def test_prefix_rft_asks_for_plain_rollouts_and_one_prefix() -> None:
    method = load_method("prefix_rft", decay_steps=100)
    early, late = dict(method.init()), {"step": 100}
    lengths: dict[str, list[int]] = {"early": [], "late": []}
    for i in range(200):
        for name, state in (("early", early), ("late", late)):
            plain, *rest = method.plan.next(demonstrated(20, str(i)), state)
            assert plain.prefix == () and plain.n + sum(r.n for r in rest) == 8
            lengths[name].append(len(rest[0].prefix) if rest else 0)
    assert set(lengths["early"]) == {19}
    late_ones = lengths["late"]
    assert min(late_ones) == 1 and max(late_ones) == 18 and statistics.fmean(late_ones) == pytest.approx(10, abs=1.5)
    assert [r.n for r in method.plan.next(demonstrated(1), early)] == [8], "nothing of an answer of one token can be given away"
    assert [len(r.prefix) for r in method.plan.next(demonstrated(2), late)] == [0, 1], "of any other at least one token is"


def test_prefix_rft_shows_between_its_bounds() -> None:
    """After the decay, from a quarter to three quarters of 100 tokens: 25 to 75, about 50 on average."""
    method = load_method("prefix_rft", longest=0.75, shortest=0.25, decay_steps=1)
    requests = [method.plan.next(demonstrated(100, str(i)), {"step": 1}) for i in range(200)]
    lengths = [len(prefixed.prefix) for _, prefixed in requests]
    assert 25 <= min(lengths) < 30 and 70 < max(lengths) <= 75 and statistics.fmean(lengths) == pytest.approx(50, abs=4)


def test_prefix_rft_teaches_the_tokens_it_is_least_sure_of() -> None:
    from crosstrain.types import Scores

    method = load_method("prefix_rft", entropy_share=0.5)
    batch = prepared(method, [group(answer("O", 1.0), answer("EEEEO", 1.0))], taught=torch.zeros(2, 5))
    entropy = of([[9, 9, 9, 9, 9, 9], [9, 1, 4, 3, 2, 9]])
    column = method.columns["taught"](lambda b: Scores(entropy, {"entropy": entropy}), batch)
    assert column.tolist() == [[0] * 6, [0, 0, 1, 1, 0, 0]]
    third = load_method("prefix_rft", entropy_share=0.3).columns["taught"](
        lambda b: Scores(entropy, {"entropy": entropy}), batch
    )
    assert third.tolist() == [[0] * 6, [0, 0, 1, 1, 0, 0]], "int(0.7 * 4) = 2 of the four are left out, as the authors count"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("chord_mu", {"mu": 1.5}, "mu: got 1.5; it must be from 0 to 1"),
        ("chord_phi", {"demonstration_share": 1.0}, "demonstration_share: got 1.0"),
        ("superrl", {"trigger": "loss"}, "trigger: got 'loss'; allowed: rewards, advantages"),
        ("rl_plus", {"power": 0.0}, "power=0.0; it must be positive"),
        ("hpt_soft", {"num_generations": 4}, "the table of coefficients is for 7"),
        ("rl_plus", {"baseline": "code"}, "baseline: got 'code'; allowed: group, rollouts"),
        ("superrl", {"trigger": "advantages", "num_generations": 1}, "num_generations: got 1; a prompt with a single"),
        ("drop_dead", {"num_generations": 1}, "num_generations: got 1; the rewards of a single completion are all equal"),
        ("prefix_rft", {"max_completion_length": 0}, "max_completion_length: got 0; it must be at least 1"),
        ("srft", {"sft_coef": -0.5}, "both must be 0 or positive"),
        ("uft", {"lowest": 0.9, "highest": 0.1}, "lowest not above highest"),
        ("uft", {"hint_coef": -1.0}, "both must be 0 or positive"),
        ("prefix_rft", {"num_generations": 1}, "it must be at least 2"),
        ("prefix_rft", {"entropy_share": 0.0}, r"it must be in \(0, 1\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method(name, **settings)


def test_published_weight_of_a_token() -> None:
    """(1 - mu) gate r A / N_own and mu / N_demo."""
    method = load_method("chord_mu", mu=0.4, num_iterations=2)
    logp, batch = random_logps(method, random_groups(5, own=3, demonstration=True), 5)
    live = batch.trained[:, 1:]
    expert = (batch.source[:, 1:] == int(Source.EXPERT)) & live
    ratio, a = (logp - batch.columns["old_logp"][:, 1:]).exp(), batch.advantage[:, 1:]
    closed = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
    own = torch.where(closed, 0.0, ratio * a) * 0.6 / int((live & ~expert).sum())
    expected = torch.where(expert, 0.4 / int(expert.sum()), torch.where(live, own, 0.0))
    torch.testing.assert_close(weights_of(method, batch, logp).weights, expected, rtol=0, atol=1e-12)


# --- HPT's soft form, SRFT -----------------------------------------------------------------------------------------------


def seven(solved: int) -> Group:
    return group(answer("EE", 1.0), *(answer("O", float(i < solved)) for i in range(7)), name=str(solved))


TABLE = [(0, 0, 1), (1, 1 / 8, 1 / 2), (2, 1 / 4, 1 / 4), (3, 1 / 2, 1 / 8), (4, 1, 0), (7, 1, 0)]


@pytest.mark.parametrize(("solved", "own", "demo"), TABLE)
def test_hpt_soft_by_hand(solved: int, own: float, demo: float) -> None:
    """One group: b / 2 on each of the demonstration's tokens, a (R - solved / 7) / 7 on each rollout's."""
    method = load_method("hpt_soft")
    found = weights_of(method, prepared(method, [seven(solved)]), torch.full((8, 2), -1.0))
    expected = [[demo / 2, demo / 2]] + [[own * (float(i < solved) - solved / 7) / 7, 0] for i in range(7)]
    torch.testing.assert_close(found.weights, of(expected))
    assert found.logged == pytest.approx(demo)  # -log pi is 1; what rollouts add is 0, for their advantages do


def hpt_soft_paper(groups: list[list[Line]]) -> Tensor:
    """arXiv:2509.04419 with the second table of coefficients in its code, which counts the demonstration among the solved; each
    group counts once."""
    table = {1: (0, 1), 2: (0.125, 0.5), 3: (0.25, 0.25), 4: (0.5, 0.125)}
    losses = []
    for g in groups:
        own = [line for line in g if not line.expert]
        [demo] = [line for line in g if line.expert]
        a, b = table.get(sum(line.reward > 0 for line in own) + 1, (1, 0))
        mean, tokens = statistics.fmean(line.reward for line in own), sum(map(len, own))
        rl = sum(-(line.reward - mean) * x for line in own for x in line.logp) / tokens
        losses.append(a * rl - b * sum(demo.logp) / len(demo))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(3))
def test_hpt_softs_second_implementation(seed: int) -> None:
    agrees(load_method("hpt_soft"), hpt_soft_paper, random_groups(seed, own=7, demonstration=True), seed)


def srft_weights(logp: Tensor, entropy: Tensor, groups: list[Group]) -> Tensor:
    method = load_method("srft")
    batch = prepared(method, groups)
    leaf = torch.nn.functional.pad(logp, (1, 0)).requires_grad_()
    channel = torch.nn.functional.pad(entropy, (1, 0)).requires_grad_()
    counts = count(method.terms, batch, groups=len(groups))
    parts = [term_loss(t, Scores(leaf, {"entropy": channel}), batch, counts) for t in method.terms]
    loss = sum(p.loss for p in parts if p is not None)
    assert not isinstance(loss, int)
    of_logp, of_entropy = torch.autograd.grad(loss, (leaf, channel), allow_unused=True)
    assert of_entropy is None, "entropy is a weight and no aim"
    return -of_logp[:, 1:]


def test_srft_by_hand() -> None:
    """Entropies of ln 2 and 3 ln 2 in the demonstration: exp(-2 ln 2) = 1/4, half of it, over two tokens; its probabilities are
    1/2. Rewards 1, 1, 0: A = 1/3 / sqrt(1/3). A right answer of entropy ln 3 counts 0.3, a wrong one -1; one token each."""
    groups = [group(answer("EE", 1.0), answer("O", 1.0), answer("O", 0.0))]
    found = srft_weights(of([[0.5, 0.5], [0.5, 1], [0.5, 1]]).log(), of([[LN2, 3 * LN2], [math.log(3), 0], [5, 0]]), groups)
    a = 1 / 3 / (math.sqrt(1 / 3) + 1e-6)
    demo = 0.5 / 4 / 2 + a * 0.5 / 2
    torch.testing.assert_close(found, of([[demo, demo], [0.3, 0], [-1, 0]]))


@pytest.mark.parametrize("seed", range(3))
def test_srfts_second_implementation(seed: int) -> None:
    """arXiv:2506.19767 eq. 6 to 10, token by token."""
    groups = random_groups(seed, own=4, demonstration=True)
    logp, batch = random_logps(load_method("luffy"), groups, seed)
    entropy = 2 * torch.rand(logp.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    live = batch.trained[:, 1:]
    expert = (batch.source == int(Source.EXPERT)).any(dim=1)
    right = ~expert & (batch.reward > 0)
    kinds = {"demo": expert, "right": right, "wrong": ~expert & ~right}
    sizes = {kind: int(live[rows].sum()) for kind, rows in kinds.items()}
    expected = torch.zeros_like(logp)
    for r in range(len(batch)):
        own = batch.reward[batch.group == batch.group[r]]
        a = float((batch.reward[r] - own.mean()) / (own.std() + 1e-6))
        h = float(entropy[r][live[r]].mean())
        for t in torch.nonzero(live[r]).flatten().tolist():
            if expert[r]:
                expected[r, t] = (0.5 * math.exp(-h) + a * math.exp(float(logp[r, t]))) / sizes["demo"]
            elif batch.reward[r] > 0:
                expected[r, t] = 0.1 * math.exp(h) / sizes["right"]
            else:
                expected[r, t] = -1 / sizes["wrong"]
    torch.testing.assert_close(srft_weights(logp, entropy, groups), expected, rtol=0, atol=1e-10)


# --- TRAPO ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solved", "hints"),
    [
        ((0, 0, 0, 0), (0, 2, 4, 7)),
        ((2, 0, 0, 0), (0, 0, 4, 7)),
        ((1, 2, 1, 0), (0, 2, 4, 7)),
        ((2, 2, 1, 0), (0, 0, 0, 7)),
        ((4, 2, 1, 0), (0, 0, 0, 0)),
    ],
)
def test_trapo_gives_hints_where_too_few_are_solved(solved: tuple[int, ...], hints: tuple[int, ...]) -> None:
    """Of a demonstration of eight tokens a quarter, a half, and all but its end; rounds of 4, 2, 1 and 1."""
    plan, have = load_method("trapo").plan, demonstrated(8)
    for n, right, hint in zip((4, 2, 1, 1), solved, hints, strict=True):
        [request] = plan.next(have, {})
        assert (request.n, len(request.prefix)) == (n, hint)
        new = tuple(answer("E" * hint + "O", float(i < right)) for i in range(n))
        have = Group(have.example, have.trajectories + new)
    assert plan.next(have, {}) == ()


def test_trapo_by_hand() -> None:
    """Rewards 0, 0, 1: own tokens have A of -1/3, -1/3 and 2/3. Of two rollouts with the same hint the second is taught: its
    tokens of probabilities 1/2 and 1/20 weigh 1 and 1/2. Seven tokens in all."""
    method = load_method("trapo")
    groups = [group(answer("O", 0.0), answer("EEO", 0.0), answer("EEO", 1.0))]
    batch = prepared(method, groups)
    column = method.columns["taught"](lambda b: pytest.fail("nothing has to be scored"), batch)
    assert column[:, 1].tolist() == [0, 0, 1]
    batch = batch.with_columns(taught=column)
    found = weights_of(method, batch, of([[0.5, 1, 1], [0.5, 0.05, 0.5], [0.5, 0.05, 0.5]]).log())
    expected = of([[-1 / 3, 0, 0], [0, 0, -1 / 3], [1, 0.5, 2 / 3]]) / 7
    torch.testing.assert_close(found.weights, expected, rtol=0, atol=1e-7)
