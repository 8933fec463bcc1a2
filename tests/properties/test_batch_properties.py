"""Properties over random groups: batching loses nothing, cuts are partitions, no cut changes a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosstrain.objective import denominators
from crosstrain.objective.gates import always, ppo_clip, soft, token_clip
from crosstrain.objective.reduce import count, term_loss
from crosstrain.objective.terms import best_by, by, group_mean, kl, nll, seq_mean, surrogate, token_sum
from crosstrain.training.batching import cut, distinct_tokens, to_batch, with_advantage
from crosstrain.training.collect import shares
from crosstrain.types import Batch, Example, Group, Per, Scores, Source, Term, Trajectory

TOKEN = st.integers(0, 50)
REWARD = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]))
WRITERS = st.sampled_from([Source.PROMPT, Source.EXPERT, Source.POLICY, Source.TOOL])


@st.composite
def trajectories(draw: Callable, prompt: tuple[int, ...]) -> Trajectory:
    response = draw(st.lists(st.tuples(TOKEN, WRITERS), min_size=1, max_size=6))
    tokens = prompt + tuple(t for t, _ in response)
    logp = draw(
        st.one_of(st.just(()), st.lists(st.floats(-5, 0, width=32), min_size=len(tokens), max_size=len(tokens)).map(tuple))
    )
    return Trajectory(
        tokens,
        (Source.PROMPT,) * len(prompt) + tuple(s for _, s in response),
        reward=draw(REWARD),
        behaviour_logp=logp,
        finished=draw(st.booleans()),
    )


@st.composite
def groups(draw: Callable) -> list[Group]:
    made = []
    for i in range(draw(st.integers(1, 4))):
        prompt = tuple(draw(st.lists(TOKEN, min_size=1, max_size=5)))
        several = draw(st.lists(trajectories(prompt), min_size=1, max_size=4))
        made.append(Group(Example(f"train:{i}", "", prompt), tuple(several)))
    return made


def read_back(batch: Batch) -> list[list[tuple[tuple[int, ...], tuple[int, ...], float | None]]]:
    """The groups a batch was made from, as tokens, sources and reward."""
    found: dict[int, list[tuple[tuple[int, ...], tuple[int, ...], float | None]]] = {}
    for r in range(len(batch)):
        n, reward = int(batch.length[r]), float(batch.reward[r])
        row = (tuple(batch.tokens[r, :n].tolist()), tuple(batch.source[r, :n].tolist()), None if math.isnan(reward) else reward)
        found.setdefault(int(batch.group[r]), []).append(row)
    return list(found.values())


@given(groups(), st.booleans())
def test_a_batch_holds_exactly_what_its_groups_hold(made: list[Group], mask: bool) -> None:
    batch = to_batch(made, mask_truncated=mask)
    expected = [[(t.tokens, tuple(int(s) for s in t.source), t.reward) for t in g.trajectories] for g in made]
    assert read_back(batch) == expected
    flat = [t for g in made for t in g.trajectories]
    for r, t in enumerate(flat):
        masked = mask and not t.finished and t.wrote(Source.POLICY)
        trained = [i > 0 and s != Source.PROMPT and not masked for i, s in enumerate(t.source)]
        assert batch.trained[r].tolist() == trained + [False] * (batch.tokens.shape[1] - len(t.tokens))
        known = batch.columns["behaviour_logp"][r]
        if t.behaviour_logp:
            assert known[: len(t.tokens)].tolist() == list(t.behaviour_logp)
        assert bool(torch.isnan(known[len(t.tokens) if t.behaviour_logp else 0 :]).all())
    for g, group in enumerate(made):
        shared = int(batch.prompt_length[batch.group == g][0])
        assert all(t.tokens[:shared] == group.trajectories[0].tokens[:shared] for t in group.trajectories)
        assert all(s == Source.PROMPT for t in group.trajectories for s in t.source[:shared])


@given(groups(), st.integers(1, 60), st.sampled_from(["token", "sequence", "group"]), st.booleans())
def test_a_cut_is_a_partition_that_respects_units_and_budget(made: list[Group], tokens: int, unit: str, shared: bool) -> None:
    batch = to_batch(made)
    pieces = cut(batch, tokens, unit, shared=shared)
    assert sorted(r for p in pieces for r in p.tolist()) == list(range(len(batch)))
    if unit == "group":
        for g in torch.unique(batch.group):
            rows = set(torch.nonzero(batch.group == g).flatten().tolist())
            assert sum(bool(rows & set(p.tolist())) for p in pieces) == 1
    for piece in pieces:
        groups = len(torch.unique(batch.group[piece]))
        units = groups if unit == "group" else len(piece)
        alone = int(batch.prompt_length[piece[0]]) if shared and groups == 1 else 0  # a prompt is no reason to split its group
        assert units == 1 or padded_size(batch.rows(piece), shared) <= tokens + alone


def padded_size(batch: Batch, shared: bool) -> int:
    if not shared:
        return len(batch) * int(batch.length.max())
    lines = []
    for g in torch.unique(batch.group):
        rows = batch.group == g
        prompt = int(batch.prompt_length[rows][0])
        lines.append(prompt + int((batch.length[rows] - prompt).sum()))
    return len(lines) * max(lines)


@given(groups(), st.randoms())
def test_charged_tokens_do_not_depend_on_order_or_cuts_between_groups(made: list[Group], random) -> None:
    batch = to_batch(made)
    order = list(range(len(batch)))
    random.shuffle(order)
    assert distinct_tokens(batch.rows(torch.tensor(order))) == distinct_tokens(batch)
    pieces = cut(batch, random.randint(1, 60), "group")
    assert sum(distinct_tokens(batch.rows(p)) for p in pieces) == distinct_tokens(batch)
    assert distinct_tokens(batch) <= int(batch.length.sum())


SHARES = st.dictionaries(st.sampled_from(["rl", "demos", "pairs", "more"]), st.floats(0, 10), min_size=1)


@given(SHARES.filter(lambda wanted: sum(wanted.values()) > 0.01), st.integers(0, 200))
def test_shares_add_up_and_are_off_by_less_than_one(wanted: dict[str, float], n: int) -> None:
    found = shares(wanted, n)
    assert sum(found.values()) == n and set(found) == set(wanted)
    total = sum(wanted.values())
    assert all(abs(found[s] - n * w / total) < 1 + 1e-9 for s, w in wanted.items())


# --- no cut changes a gradient --------------------------------------------------------------------------------------

ONS = st.sampled_from([by(Source.POLICY), by(Source.EXPERT), by(Source.POLICY, Source.EXPERT), best_by(Source.EXPERT)])
COUNTS = st.lists(st.sampled_from(["own_tokens", "all_tokens", "sequences", "groups"]), max_size=2, unique=True).map(tuple)
PER = st.builds(Per, COUNTS, constant=st.floats(0.5, 100))
NORMALISE = st.sampled_from([token_sum, seq_mean, group_mean])
DENOMINATOR = st.sampled_from(
    [
        *(denominators.current, denominators.old, denominators.one, denominators.uncertain, denominators.mixture),
        *(denominators.shaped(0.1), denominators.floored(0.1), denominators.capped(0.8, 1.5)),
        *(denominators.sequence, denominators.clipped_sequence(0.4, 0.4)),
    ]
)


@st.composite
def terms(draw: Callable) -> list[Term]:
    """Up to three random terms of the policy-gradient family, likelihood and KL, with random denominators."""
    made = []
    for i in range(draw(st.integers(1, 3))):
        common = {"on": draw(ONS), "per": draw(PER), "normalise": draw(NORMALISE), "coef": draw(st.floats(0.1, 2))}
        kind = draw(st.sampled_from(["surrogate", "nll", "kl"]))
        if kind == "surrogate":
            gate = draw(st.sampled_from([always, ppo_clip(0.2, 0.28, 3.0), token_clip(0.4, 0.4), soft()]))
            made.append(surrogate(f"{i}", denominator=draw(DENOMINATOR), gate=gate, **common))
        else:
            make: dict[str, Callable[..., Term]] = {"nll": nll, "kl": kl}
            made.append(make[kind](f"{i}", **common))
    return made


def gradient(objective: list[Term], batch: Batch, logp: Tensor, pieces: list[Tensor]) -> Tensor:
    leaf = logp.clone().requires_grad_()
    counts = count(objective, batch, groups=len(torch.unique(batch.group)))
    losses = [term_loss(t, Scores(leaf[p]), batch.rows(p), counts) for p in pieces for t in objective]
    live = [part.loss for part in losses if part is not None and part.loss.requires_grad]
    return torch.autograd.grad(sum(live), leaf)[0] if live else torch.zeros_like(leaf)


@settings(max_examples=60)
@given(groups(), terms(), st.integers(1, 40), st.integers(0, 10_000))
def test_no_cut_order_or_padding_changes_a_gradient(made: list[Group], objective: list[Term], tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = to_batch(made)
    shape = batch.tokens.shape
    logp, old, ref, advantage = (-3 * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    batch = with_advantage(batch, advantage + 1.5).with_columns(old_logp=old, ref_logp=ref)
    whole = gradient(objective, batch, logp, [torch.arange(len(batch))])
    pieces = cut(batch, tokens, "group")
    torch.testing.assert_close(gradient(objective, batch, logp, pieces), whole, rtol=0, atol=1e-12)
    order = torch.randperm(len(batch), generator=generator)
    shuffled = gradient(objective, batch.rows(order), logp[order], [torch.arange(len(batch))])
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-12)
    assert float(whole[~batch.trained].abs().sum()) == 0


@given(groups(), terms())
def test_an_empty_term_counts_0_and_only_an_empty_term_does(made: list[Group], objective: list[Term]) -> None:
    batch = to_batch(made, mask_truncated=True)
    counts = count(objective, batch, groups=len(made))
    for term in objective:
        assert (counts[term.name] == 0) == (not bool(term.on(batch).any()))
