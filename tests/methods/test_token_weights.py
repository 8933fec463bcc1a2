"""The weight of a token on grad log pi in closed form, as its method's page has it, against what autograd gives: random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from test_ppo import credited
from torch import Tensor
from valued import outcome
from worked import answer, group, prepared, random_groups, selected, weights_of

from crosstrain.methods import load_method
from crosstrain.methods.nft import solved
from crosstrain.training.batching import to_batch
from crosstrain.types import Batch, Group, Method, Source, Trajectory

F64 = torch.float64
CHOICES = ("covariant", "kept", "taught", "unsure")
"""Columns of 0 and 1 that say which tokens a method has chosen; here at random."""


@dataclass(frozen=True)
class Seen:
    """What a formula is written in; all [B, T - 1] or [B, 1]."""

    batch: Batch
    logp: Tensor

    def column(self, name: str) -> Tensor:
        found = self.batch.columns[name]
        return (found[:, 1:] if found.ndim == 2 else found[:, None]).nan_to_num()

    @property
    def p(self) -> Tensor:
        return self.logp.exp()

    def ratio(self, name: str = "old_logp") -> Tensor:
        """pi over what a column has, 1 without it."""
        return (self.logp - self.column(name)).exp() if name in self.batch.columns else torch.ones_like(self.logp)

    @property
    def live(self) -> Tensor:
        return self.batch.trained[:, 1:]

    @property
    def expert(self) -> Tensor:
        return self.batch.written_by(Source.EXPERT)[:, 1:]

    @property
    def own(self) -> Tensor:
        return self.batch.written_by(Source.POLICY)[:, 1:]

    @property
    def a(self) -> Tensor:
        return self.batch.advantage[:, 1:].nan_to_num()

    @property
    def reward(self) -> Tensor:
        return self.batch.reward[:, None]

    @property
    def rows(self) -> int:
        return len(self.batch)

    @property
    def groups(self) -> int:
        return len(torch.unique(self.batch.group))

    @property
    def length(self) -> Tensor:
        return self.live.double().sum(dim=1, keepdim=True)

    def in_group(self, which: Tensor) -> Tensor:
        """How many tokens of `which` a row's group has, [B, 1]."""
        per_row = which.double().sum(dim=1)
        return torch.stack([per_row[self.batch.group == g].sum() for g in self.batch.group])[:, None]

    def gate(self, low: float = 0.2, high: float = 0.2) -> Tensor:
        """PPO's: 0 where the ratio is past the bound on the side that A points to, else 1."""
        r = self.ratio()
        return 1.0 - (((self.a > 0) & (r > 1 + high)) | ((self.a < 0) & (r < 1 - low))).double()

    def clipped(self, low: float = 0.2, high: float = 0.2) -> Tensor:
        return self.gate(low, high) * self.ratio() * self.a

    def by_answer(self, values: Tensor, *, mean: bool = False) -> tuple[Tensor, Tensor]:
        """Sums or means over the better and the worse answer of each pair, each repeated for both rows, [B, 1]."""
        s = torch.where(self.live, values, 0.0).sum(dim=1) / (self.length[:, 0] if mean else 1.0)
        return s[::2].repeat_interleave(2)[:, None], s[1::2].repeat_interleave(2)[:, None]

    @property
    def sign(self) -> Tensor:
        """1 on the better answer of a pair, the first here, -1 on the other."""
        return torch.tensor([1.0, -1.0] * (self.rows // 2), dtype=F64)[:, None]


Formula = Callable[[Seen], Tensor]


def seen(method: Method, groups: list[Group], seed: int) -> Seen:
    """Random log-probs for the groups, and every column that the method reads, at random."""
    shape = to_batch(selected(method, groups)).tokens[:, 1:].shape
    generator = torch.Generator().manual_seed(seed)
    logp = -0.05 - 3 * torch.rand(shape, generator=generator, dtype=F64)
    made = {n: logp + 0.5 * torch.randn(shape, generator=generator, dtype=F64) for n in ("old_logp", "ref_logp")}
    made |= {n: logp + 0.5 * torch.randn(shape, generator=generator, dtype=F64) for n in ("behaviour_logp", "teacher_logp")}
    made |= {n: (torch.rand(shape, generator=generator) < 0.5).double() for n in CHOICES}
    made |= {n: 2 * torch.rand(shape, generator=generator, dtype=F64) for n in ("sampled_entropy",)}
    batch = prepared(method, groups, **{n: c for n, c in made.items() if n in method.needs})
    if "solved" in method.needs:
        batch = batch.with_columns(solved=solved(lambda b: pytest.fail("nothing has to be scored"), batch))
    return Seen(batch, logp)


def assert_weights(method: Method, groups: list[Group], formula: Formula, seed: int = 5) -> None:
    found = seen(method, groups, seed)
    expected = torch.where(found.live, formula(found), 0.0)
    assert float(expected.abs().max()) > 1e-3
    ours = weights_of(method, found.batch, found.logp).weights
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


# --- demonstrations -----------------------------------------------------------------------------------------------------


def over_tokens(weight: Formula) -> Formula:
    return lambda s: weight(s) / s.live.sum()


def suffix_weight(s: Seen) -> Tensor:
    """exp of the sum over later tokens of log pi - log behaviour, cut to [-0.08, 0.3] each, and of ln 0.999."""
    d = torch.where(s.live, (s.logp - s.column("behaviour_logp")).clamp(-0.08, 0.3), 0.0)
    later = torch.stack([d[:, t + 1 :].sum(dim=1) for t in range(d.shape[1])], dim=1)
    n = torch.stack([s.live[:, t + 1 :].sum(dim=1) for t in range(d.shape[1])], dim=1)
    return later.exp() * 0.999 ** n.double()


IMITATION: dict[str, tuple[dict[str, Any], Formula]] = {
    "sft": ({}, over_tokens(lambda s: torch.ones_like(s.p))),
    "dft": ({}, over_tokens(lambda s: s.p)),
    "pear": ({}, over_tokens(suffix_weight)),
    "token_cleaning": ({}, lambda s: s.column("kept") / s.column("kept").sum()),
}


@pytest.mark.parametrize("name", IMITATION)
def test_of_a_demonstration(name: str) -> None:
    settings, formula = IMITATION[name]
    assert_weights(load_method(name, **settings), random_groups(5, demonstration=True), formula)


# --- pairs --------------------------------------------------------------------------------------------------------------


def preferred(beta: float) -> Formula:
    """+-beta sigmoid(-beta (d_chosen - d_rejected)) / N_pairs."""

    def weight(s: Seen) -> Tensor:
        chosen, rejected = s.by_answer(s.logp - s.column("ref_logp"))
        return s.sign * beta * torch.sigmoid(-beta * (chosen - rejected)) / s.groups

    return weight


def conservative(s: Seen) -> Tensor:
    chosen, rejected = s.by_answer(s.logp - s.column("ref_logp"))
    return s.sign * 0.3 * (torch.sigmoid(-0.3 * (chosen - rejected)) - 0.2) / s.groups


def squared(mean: bool) -> Formula:
    def weight(s: Seen) -> Tensor:
        chosen, rejected = s.by_answer(s.logp - s.column("ref_logp"), mean=mean)
        return -s.sign * 2 * (chosen - rejected - 1 / 0.6) / s.groups / (s.length if mean else 1)

    return weight


def with_likelihood(s: Seen) -> Tensor:
    return preferred(0.3)(s) + 0.7 * (s.sign > 0).double() / (s.length * s.groups)


def by_means(s: Seen) -> Tensor:
    chosen, rejected = s.by_answer(s.logp, mean=True)
    return s.sign * 2.0 * torch.sigmoid(0.5 - 2.0 * (chosen - rejected)) / (s.length * s.groups)


def without_reference(s: Seen) -> Tensor:
    chosen, rejected = s.by_answer(s.logp)
    likelihood = 0.7 * (s.sign > 0).double() / (s.live & (s.sign > 0)).double().sum()
    return s.sign * 0.2 * torch.sigmoid(-0.2 * (chosen - rejected)) / s.groups + likelihood


def by_odds(s: Seen) -> Tensor:
    """(1 + beta s / (1 - e^l)) / (T N) on the better answer, -beta s / ((1 - e^l) T N) on the other, with s = sigmoid(-log odds
    ratio)."""
    means = [x.exp() for x in s.by_answer(s.logp, mean=True)]
    odds = [q / (1 - q) for q in means]
    away = odds[1] / (odds[0] + odds[1])
    q = torch.where(s.sign > 0, means[0], means[1])
    return ((s.sign > 0) + s.sign * 0.3 * away / (1 - q)) / (s.length * s.groups)


PAIRS: dict[str, tuple[dict[str, Any], Formula]] = {
    "dpo": ({"beta": 0.3}, preferred(0.3)),
    "cdpo": ({"beta": 0.3, "label_smoothing": 0.2}, conservative),
    "dpo_nll": ({"beta": 0.3, "nll_coef": 0.7}, with_likelihood),
    "ipo": ({"tau": 0.3}, squared(mean=False)),
    "ipo_mean": ({"tau": 0.3}, squared(mean=True)),
    "simpo": ({"beta": 2.0, "gamma": 0.5}, by_means),
    "cpo": ({"beta": 0.2, "nll_coef": 0.7}, without_reference),
    "orpo": ({"beta": 0.3}, by_odds),
}


@pytest.mark.parametrize("name", PAIRS)
def test_of_an_answer_in_a_pair(name: str) -> None:
    settings, formula = PAIRS[name]
    assert_weights(load_method(name, **settings), random_groups(5, pair=True), formula)


@pytest.mark.parametrize("name", ["online_dpo", "spin"])
def test_of_an_answer_in_a_pair_made_in_training(name: str) -> None:
    words = ("OOO", "O") if name == "online_dpo" else ("EEE", "O")
    groups = [group(answer(words[0] * n, 1.0), answer(words[1] * (4 - n), 0.0), name=str(n)) for n in (1, 2, 3)]
    assert_weights(load_method(name, beta=0.3), groups, preferred(0.3))


# --- own answers --------------------------------------------------------------------------------------------------------


def by_sequence(weight: Formula) -> Formula:
    return lambda s: weight(s) / (s.length * s.rows)


def sequence_ratio(s: Seen) -> Tensor:
    """A s with s the geometric mean of ratios, 0 where s is past its bound."""
    ratio = (torch.where(s.live, s.logp - s.column("old_logp"), 0.0).sum(dim=1, keepdim=True) / s.length).exp()
    closed = ((s.a > 0) & (ratio > 1.04)) | ((s.a < 0) & (ratio < 0.97))
    return torch.where(closed, 0.0, ratio * s.a)


def geometric_mean(s: Seen) -> Tensor:
    """A rho with rho the geometric mean of ratios cut at e^0.4 or e^-0.4 on the side that A points to; 0 on the tokens cut."""
    moved = s.logp - s.column("old_logp")
    cut = torch.where(s.a >= 0, moved.clamp(max=0.4), moved.clamp(min=-0.4))
    rho = (torch.where(s.live, cut, 0.0).sum(dim=1, keepdim=True) / s.length).exp()
    return torch.where(cut == moved, rho * s.a, 0.0)


def soft_gate(s: Seen) -> Tensor:
    open_ = torch.sigmoid((1.0 + 0.05 * (s.a <= 0).double()) * (s.ratio() - 1))
    return 4 * open_ * (1 - open_) * s.ratio() * s.a


def held(s: Seen) -> Tensor:
    return s.ratio() * s.a - 0.7 * s.column("covariant") * (s.logp - s.column("old_logp")).sign()


def negative_aware(s: Seen) -> Tensor:
    q, r = s.column("solved"), s.ratio()
    wrong = q * r / (1 - q) / ((1 - q * r) / (1 - q)).clamp(min=1.0)
    return (1 - q) * torch.where(s.reward > 0, torch.ones_like(r), -wrong) / 16


def near_a_reference(beta: float) -> Formula:
    """k3's: -beta (1 - ref / pi)."""
    return lambda s: -beta * (1 - 1 / s.ratio("ref_logp"))


def above_its_teacher(s: Seen) -> Tensor:
    return (s.column("teacher_logp") - s.column("old_logp")) * s.ratio()


ONE = over_tokens(lambda s: torch.ones_like(s.p))
CLIPPED = over_tokens(lambda s: s.clipped())
HIGHER = over_tokens(lambda s: s.clipped(0.2, 0.28))
TWO = {"num_iterations": 2}

OWN: dict[str, tuple[dict[str, Any], Formula]] = {
    "reinforce": ({}, lambda s: s.reward.expand(s.p.shape) / s.rows),
    "rloo": ({}, lambda s: s.a / s.rows),
    "raft": ({}, ONE),
    "rft": ({}, ONE),
    "star": ({}, ONE),
    "rest_em": ({}, ONE),
    "raft_pp": ({}, over_tokens(lambda s: s.gate() * s.ratio() * s.reward.clamp(min=0))),
    "reinforce_rej": ({}, over_tokens(lambda s: s.reward.expand(s.p.shape))),
    "reinforce_pp": ({"kl_coef": 0.0, **TWO}, CLIPPED),
    "reinforce_pp_baseline": (TWO, CLIPPED),
    "grpo": (
        {"beta": 0.1, **TWO},
        by_sequence(lambda s: s.clipped() + near_a_reference(0.1)(s)),
    ),
    "dr_grpo": ({"max_completion_length": 7, **TWO}, lambda s: s.clipped() / (7 * s.rows)),
    "dapo": ({}, HIGHER),
    "drop_dead": (TWO, by_sequence(lambda s: s.clipped())),
    "bread": (TWO, by_sequence(lambda s: s.clipped())),
    "srl": (TWO, by_sequence(lambda s: s.clipped())),
    "entropy_advantage": (TWO, HIGHER),
    "cispo": ({"epsilon_high": 1.5}, over_tokens(lambda s: s.ratio().clamp(max=1.5) * s.a)),
    "sapo": ({}, by_sequence(soft_gate)),
    "gspo": ({"epsilon": 0.03, "epsilon_high": 0.04}, by_sequence(sequence_ratio)),
    "gmpo": ({}, by_sequence(geometric_mean)),
    "clip_cov": ({}, over_tokens(lambda s: (1 - s.column("covariant")) * (s.ratio() * s.a) * ~((s.a > 0) & (s.ratio() > 2)))),
    "kl_cov": ({"beta": 0.7}, over_tokens(held)),
    "nft": ({"constant": 16.0}, negative_aware),
    "relift": (TWO, HIGHER),
    "mifo": (TWO, over_tokens(lambda s: s.clipped(0.2, 0.28))),
    "sasr": (
        {"beta": 0.1},
        by_sequence(lambda s: s.clipped() + near_a_reference(0.1)(s)),
    ),
    "on_policy_distillation": (TWO, over_tokens(above_its_teacher)),
}


@pytest.mark.parametrize("name", OWN)
def test_of_an_own_answer(name: str) -> None:
    settings, formula = OWN[name]
    assert_weights(load_method(name, **settings), random_groups(5, own=4, n=5), formula)


def test_of_an_own_answer_beside_a_greedy_one() -> None:
    """ReMax: A / N, and nothing on the greedy answer."""
    groups = [replace_first(g) for g in random_groups(5, own=4)]
    greedy = torch.tensor([t.greedy for g in groups for t in g.trajectories])[:, None]
    assert_weights(load_method("remax", num_generations=3), groups, lambda s: s.a * ~greedy / (~greedy).sum())


def replace_first(g: Group) -> Group:
    """The group, its first answer the greedy one."""
    first, *rest = g.trajectories
    return replace(g, trajectories=(replace(first, greedy=True), *rest))


def test_of_an_own_answer_with_a_critic() -> None:
    """PPO: gate r A / N, A whitened returns less values; the critic has no weight here."""
    method = load_method("ppo", kl_coef=0.0, gamma=0.9, lam=0.7)
    groups = random_groups(5, own=3)
    shape = to_batch(groups).tokens[:, 1:].shape
    made = [torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=F64) for i in range(3)]
    logp = -3 + made[0].clamp(-2, 2)
    batch = credited(method, groups, logp, old_logp=logp + 0.3 * made[1], old_value=made[2])
    s = Seen(batch, logp)
    expected = torch.where(s.live, s.clipped() / s.live.sum(), 0.0)
    assert bool((s.gate()[s.live] == 0).any())
    torch.testing.assert_close(outcome(method, batch, logp, made[2]).weights, expected, rtol=0, atol=1e-10)


# --- both ---------------------------------------------------------------------------------------------------------------


def mixed(mu: float, demo: Formula) -> Formula:
    return lambda s: torch.where(s.expert, mu * demo(s) / s.expert.sum(), (1 - mu) * s.clipped() / s.own.sum())


def importance(s: Seen) -> Tensor:
    old = s.column("old_logp").exp()
    demo = s.a * (1 - s.p).sqrt() * s.p / ((old + (old + 1) / 2) / 2)
    return torch.where(s.expert, demo, s.ratio() * s.a)


def shaped(s: Seen) -> Tensor:
    return torch.where(s.expert, s.a * 0.1 * s.p / (s.p + 0.1) ** 2, s.ratio() * s.a)


def one_of_two(own: Formula) -> Formula:
    """1 / (T N_groups) on a demonstration that is kept, else the rollouts' own over their group's tokens."""
    return lambda s: torch.where(s.expert, 1 / s.length, own(s) / s.in_group(s.own).clamp(min=1)) / s.groups


def soft(s: Seen) -> Tensor:
    """Of seven rollouts: the table's a (R - mean) and b."""
    table = {0: (0, 1), 1: (0.125, 0.5), 2: (0.25, 0.25), 3: (0.5, 0.125)}
    own_rows = ~s.expert.any(dim=1)
    solved_rows = [(own_rows & (s.batch.reward > 0) & (s.batch.group == g)).sum().item() for g in s.batch.group]
    means = [s.batch.reward[own_rows & (s.batch.group == g)].mean() for g in s.batch.group]
    a, b = (torch.tensor([table.get(int(n), (1, 0))[i] for n in solved_rows], dtype=F64)[:, None] for i in (0, 1))
    own = a * (s.reward - torch.stack(means)[:, None]) / s.in_group(s.own)
    return torch.where(s.expert, b / s.length, own) / s.groups


BOTH: dict[str, tuple[dict[str, Any], Formula]] = {
    "chord_mu": ({"mu": 0.4, **TWO}, mixed(0.4, lambda s: torch.ones_like(s.p))),
    "chord_phi": ({"mu": 0.4, **TWO}, mixed(0.4, lambda s: s.p * (1 - s.p))),
    "rl_plus": (TWO, over_tokens(importance)),
    "luffy": (TWO, over_tokens(shaped)),
    "hpt": ({}, one_of_two(lambda s: s.a)),
    "superrl": ({}, one_of_two(lambda s: s.clipped())),
    "hpt_soft": ({}, soft),
}


@pytest.mark.parametrize("name", BOTH)
def test_of_rollouts_and_a_demonstration(name: str) -> None:
    settings, formula = BOTH[name]
    failed = group(answer("EEE", 1.0), *(answer("OO", 0.0) for _ in range(7)), name="failed")
    groups = [*random_groups(5, own=7, demonstration=True), failed]
    assert_weights(load_method(name, **settings), groups, formula)


def test_of_rollouts_and_a_demonstration_in_amfts_main_phase() -> None:
    method = load_method("amft").at({"step": 99, "mu": 0.3, "target": 1.0})
    groups = random_groups(5, own=4, demonstration=True)
    assert_weights(method, groups, mixed(0.3, lambda s: torch.ones_like(s.p)))


@pytest.mark.parametrize("name", ["relift", "mifo", "sasr"])
def test_of_a_step_of_demonstrations(name: str) -> None:
    """1 / N on every token, with MIFO on the chosen ones."""
    found = seen(load_method(name), random_groups(5, demonstration=True), 5)
    on = found.live & (found.column("unsure") > 0) if name == "mifo" else found.live
    ours = weights_of(load_method(name), found.batch, found.logp).weights
    torch.testing.assert_close(ours, on.double() / on.sum(), rtol=0, atol=1e-10)


def from_prefixes(seed: int) -> list[Group]:
    """Two plain rollouts and two from prefixes of the demonstration in each group."""
    rest = ("O", "OOO", "EEOO", "EO")
    rewards = ((1.0, 0.0, 1.0, 0.0), (0.0, 0.0, 1.0, 1.0), (1.0, 1.0, 0.0, 0.5))
    return [
        group(*(answer(w, r) for w, r in zip(rest[i:] + rest[:i], found, strict=True)), name=str(i + seed))
        for i, found in enumerate(rewards)
    ]


def explored(s: Seen) -> Tensor:
    """UFT: gate r A / N_own and the KL's part on own tokens, 0.1 / N_hint on hints."""
    own = (s.clipped() + near_a_reference(0.2)(s)) / s.own.sum()
    return torch.where(s.expert, 0.1 / s.expert.double().sum(), own)


def trusted(s: Seen) -> Tensor:
    """TRAPO: r A / N on own tokens, p / max(p, 0.1) / N on prefixes that are taught."""
    return torch.where(s.expert, s.column("taught") * s.p / s.p.clamp(min=0.1), s.ratio() * s.a)


PREFIXES: dict[str, tuple[dict[str, Any], Formula]] = {
    "uft": ({"hint_coef": 0.1, "beta": 0.2, **TWO}, explored),
    "prefix_rft": ({"max_completion_length": 9}, lambda s: s.clipped() / (9 * s.rows)),
    "trapo": (TWO, over_tokens(trusted)),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_of_rollouts_from_prefixes(name: str) -> None:
    settings, formula = PREFIXES[name]
    assert_weights(load_method(name, **settings), from_prefixes(0), formula)


def test_of_replayed_answers() -> None:
    """r A / N on fresh tokens, A gamma w / (w + gamma)^2 / N on remembered ones, w = pi / the policy that sampled."""

    def remembered(t: Trajectory) -> Trajectory:
        return replace(t, replayed=True, behaviour_logp=(float("nan"), *(-0.3 * i - 0.1 for i in range(len(t.response)))))

    groups = [replace(g, trajectories=(remembered(g.trajectories[0]), *g.trajectories[1:])) for g in random_groups(5, own=4)]
    method = load_method("replay", gamma=0.2, num_iterations=2)
    shape = to_batch(groups).tokens[:, 1:].shape
    generator = torch.Generator().manual_seed(5)
    logp = -3 * torch.rand(shape, generator=generator, dtype=F64)
    batch = prepared(method, groups, old_logp=logp + 0.5 * torch.randn(shape, generator=generator, dtype=F64))
    s = Seen(batch, logp)
    w = s.ratio("behaviour_logp")
    again = s.column("replayed") > 0
    assert bool(again.any())
    expected = torch.where(again, s.a * 0.2 * w / (w + 0.2) ** 2, s.ratio() * s.a) / s.live.sum()
    ours = weights_of(method, batch, logp).weights
    torch.testing.assert_close(ours, torch.where(s.live, expected, 0.0), rtol=0, atol=1e-8)  # sampled in fp32
