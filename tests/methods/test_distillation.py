"""GKD, on-policy distillation, SDFT and ASFT: by hand, against a second implementation, at their limits, and learning."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from bandit import END, PROMPTS, VOCABULARY, Bandit, learn, model_for, probability
from torch import Tensor
from torch.nn import functional as F
from worked import answer, group, prepared, random_groups, weights_of

from crosstrain.errors import UserError
from crosstrain.explain import GivenBatch, explain
from crosstrain.methods import load_method
from crosstrain.methods.describe import needs_of
from crosstrain.rollout.sampler import Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.testing import (
    AVERAGE,
    REFERENCE,
    TEACHER,
    ScriptedSampler,
    gradient,
    made_up_batch,
    made_up_examples,
    made_up_other,
    tiny_model,
)
from crosstrain.training.collect import Truncation, collect
from crosstrain.training.engine import Engine, Teacher
from crosstrain.training.loop import Progress, StageSettings, train_stage
from crosstrain.training.optimizer import Optimizer
from crosstrain.training.score import score
from crosstrain.types import Batch, Example, Group, Method, Source, Trajectory

# --- on-policy distillation, in log-probs ----------------------------------------------------------------------------


def of(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_on_policy_distillation_by_hand() -> None:
    """log q - log pi = 1 and -1/2 of three tokens: weights 1/3 and -1/6, logged is the mean of log pi - log q."""
    method = load_method("on_policy_distillation")
    batch = prepared(method, [group(answer("OO"), answer("O"))], teacher_logp=of([-1.0, -2.5], [-1.0, 0.0]))
    found = weights_of(method, batch, of([-2.0, -2.0], [-1.0, 0.0]))
    torch.testing.assert_close(found.weights, of([1 / 3, -1 / 6], [0.0, 0.0]))
    assert found.logged == pytest.approx((-1.0 + 0.5 + 0.0) / 3)


def test_after_an_inner_update_the_credit_stays_and_the_ratio_moves() -> None:
    """log q - log old = 1, pi / old = 2: weight 2."""
    method = load_method("on_policy_distillation", num_iterations=2)
    batch = prepared(method, [group(answer("O"))], teacher_logp=of([-1.0]), old_logp=of([-2.0]))
    found = weights_of(method, batch, of([-2.0 + math.log(2)]))
    torch.testing.assert_close(found.weights, of([2.0]))


@pytest.mark.parametrize("seed", range(4))
def test_on_policy_distillation_second_implementation(seed: int) -> None:
    """As the recipe's code has it: an advantage for each token, discount 0, then importance sampling, here averaged over tokens."""
    method = load_method("on_policy_distillation", num_iterations=2)
    groups = random_groups(seed, own=3)
    generator = torch.Generator().manual_seed(seed)
    shape = prepared(load_method("rloo"), groups).tokens[:, 1:].shape
    logp = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    old, teacher = (logp + torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    batch = prepared(method, groups, old_logp=old, teacher_logp=teacher)
    expected, logged, n = torch.zeros_like(logp), 0.0, int(batch.trained.sum())
    for r in range(len(batch)):
        for t in range(1, int(batch.length[r])):
            kl = old[r, t - 1] - teacher[r, t - 1]
            expected[r, t - 1] = -kl * (logp[r, t - 1] - old[r, t - 1]).exp() / n
            logged += float(logp[r, t - 1] - teacher[r, t - 1]) / n
    found = weights_of(method, batch, logp)
    torch.testing.assert_close(found.weights, expected, rtol=0, atol=1e-12)
    assert found.logged == pytest.approx(logged)


def test_explain_shows_what_single_tokens_can_show() -> None:
    one = {"source": ["prompt", "policy", "policy"], "logp": [0, -2.0, -1.0], "teacher_logp": [0, -1.0, -1.5]}
    found = explain(load_method("on_policy_distillation"), GivenBatch(groups=[{"trajectories": [one]}]))
    assert found["groups"][0]["trajectories"][0]["weights"] == pytest.approx([0.0, 0.5, -0.25])
    assert found["groups"][0]["advantage"] == [None]
    del one["teacher_logp"]
    with pytest.raises(UserError, match="needs `teacher_logp`, which is absent"):
        explain(load_method("on_policy_distillation"), GivenBatch(groups=[{"trajectories": [one]}]))
    for name, settings in (("gkd", {}), ("sdft", {}), ("asft", {}), ("on_policy_distillation", {"mode": "full_logits"})):
        with pytest.raises(UserError, match="looks at the whole next-token distribution"):
            explain(load_method(name, **settings), GivenBatch(groups=[{"trajectories": [one]}]))


def test_what_a_run_has_to_bring() -> None:
    assert needs_of(load_method("gkd")) == ["demonstrations", "teacher"]
    assert needs_of(load_method("gkd", seq_kd=True)) == ["teacher"] == needs_of(load_method("on_policy_distillation"))
    assert needs_of(load_method("on_policy_distillation", mode="full_logits")) == ["teacher"]
    assert needs_of(load_method("sdft", teacher_model_kind="base")) == ["demonstrations", "reference model"]
    assert needs_of(load_method("sdft")) == needs_of(load_method("sdft", teacher_model_kind="live")) == ["demonstrations"]
    assert needs_of(load_method("asft")) == ["demonstrations", "reference model"]
    assert needs_of(load_method("gkd", lmbda=1.0)) == ["teacher"], "every answer is the policy's own"
    assert [load_method("gkd", lmbda=share).plan.samples for share in (0.0, 0.5)] == [False, True]


def test_sdft_compares_the_hundred_likeliest_tokens_unless_told() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, others = torch.randn(2, 3, 120, generator=generator)
    said = []
    for settings in ({}, {"distillation_topk": 100}, {"distillation_topk": 120}):
        [comparison] = load_method("sdft", distillation_mode="topk_logits", **settings).comparisons.values()
        said.append(comparison.divergence(logits, others, torch.zeros(3, dtype=torch.long)))
    assert torch.equal(said[0], said[1]) and not torch.equal(said[0], said[2])


def test_sdfts_average_goes_a_hundredth_of_the_way_unless_told_and_there_is_none_of_other_teachers() -> None:
    assert [load_method("sdft").average, load_method("sdft", teacher_update_rate=0.05).average] == [0.01, 0.05]
    assert [load_method("sdft", teacher_model_kind=kind).average for kind in ("base", "live")] == [None, None]


# --- over the vocabulary, on a model: a second implementation, row by row and token by token --------------------------

Loss = Callable[[Tensor, Tensor, int], Tensor]
"""(log pi [V], log q [V], the token) -> its loss."""


def paper_jsd(beta: float) -> Loss:
    """arXiv:2306.13649, eq. 1, entry by entry; its ends by name."""

    def loss(own: Tensor, other: Tensor, token: int) -> Tensor:
        p, q = own.exp(), other.exp()
        if beta in (0.0, 1.0):
            return (p * (own - other)).sum() if beta else (q * (other - own)).sum()
        m = beta * q + (1 - beta) * p
        return beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()

    return loss


def own_gradient(
    model: Any,
    other: Any,
    batch: Batch,
    loss: Loss,
    *,
    context: str = "",
    temperature: float = 1.0,
    by_sequence: bool = False,
    skip: int = 0,
) -> dict[str, Tensor]:
    """The gradient of the mean of `loss` over trained tokens, or over rows of each row's mean, from both models' own forwards."""
    model.zero_grad(set_to_none=True)
    sums, counts = [], []
    for r in range(len(batch)):
        n = int(batch.length[r])
        tokens = batch.tokens[r, :n].tolist()
        start = int(torch.nonzero(batch.source[r] != 0)[0])
        prompt = list(batch.contexts[context][r]) if context else tokens[:start]
        log_pi = (model(torch.tensor([tokens])).logits[0] / temperature).log_softmax(-1)
        with torch.no_grad():
            log_q = (other(torch.tensor([prompt + tokens[start:]])).logits[0] / temperature).log_softmax(-1)
        shift = len(prompt) - start
        at = range(start + skip, n)
        if at:
            sums.append(sum((loss(log_pi[t - 1], log_q[t + shift - 1], tokens[t]) for t in at), torch.zeros(())))
            counts.append(len(at))
    total = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(sums) if by_sequence else sum(sums) / sum(counts)
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def first_update(batch: Batch) -> Batch:
    """The batch as it is in the first update on it: nothing is old."""
    return replace(batch, columns={name: column for name, column in batch.columns.items() if name != "old_logp"})


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert max(float(g.abs().max()) for g in one.values()) > 1e-4
    for name, g in one.items():
        torch.testing.assert_close(g, other[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "settings",
    [{}, {"beta": 0.0, "lmbda": 0.0}, {"beta": 1.0, "lmbda": 1.0}, {"beta": 0.2, "seq_kd": True, "temperature": 2.0}],
    ids=str,
)
def test_gkd_is_the_papers(settings: dict[str, Any]) -> None:
    method, model = load_method("gkd", **settings), tiny_model()
    batch = made_up_batch(method, model)
    loss = paper_jsd(settings.get("beta", 0.5))
    expected = own_gradient(model, made_up_other(model, TEACHER), batch, loss, temperature=settings.get("temperature", 1.0))
    assert_same(gradient(method, model, batch), expected)


def test_gkd_is_trls_loss_on_a_model() -> None:
    """`GKDTrainer.generalized_jsd_loss` on both models' logits, labels and all."""
    from trl.experimental.gkd import GKDTrainer

    method, model = load_method("gkd", beta=0.3), tiny_model()
    batch = made_up_batch(method, model)
    teacher = made_up_other(model, TEACHER)
    labels = torch.where(batch.trained, batch.tokens, torch.full_like(batch.tokens, -100))[:, 1:]
    ours = gradient(method, model, batch)
    model.zero_grad(set_to_none=True)
    own, theirs = (m(batch.tokens).logits[:, :-1] for m in (model, teacher))
    n = int(batch.trained.sum())
    GKDTrainer.generalized_jsd_loss(own, theirs, labels=labels, beta=0.3, num_items_in_batch=n).backward()
    assert_same(ours, {name: p.grad for name, p in model.named_parameters()})


def test_on_policy_distillation_over_the_vocabulary_is_the_reverse_kl() -> None:
    method, model = load_method("on_policy_distillation", mode="full_logits"), tiny_model()
    batch = made_up_batch(method, model)
    assert_same(gradient(method, model, batch), own_gradient(model, made_up_other(model, TEACHER), batch, paper_jsd(1.0)))
    same = load_method("gkd", beta=1.0, lmbda=1.0)
    assert_same(gradient(method, model, batch), gradient(same, model, batch), 1e-12)


@pytest.mark.parametrize("kind", ["ema", "base", "live"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_sdft_is_the_papers(kind: str, alpha: float) -> None:
    method, model = load_method("sdft", num_generations=2, distillation_alpha=alpha, teacher_model_kind=kind), tiny_model()
    [context] = method.contexts
    batch = first_update(made_up_batch(method, model))
    other = model if kind == "live" else made_up_other(model, AVERAGE if kind == "ema" else REFERENCE)
    expected = own_gradient(model, other, batch, paper_jsd(alpha), context=context, by_sequence=True)
    assert_same(gradient(method, model, batch), expected, 1e-7)  # a sequence's mean is a weight in the advantage's dtype, fp32


def test_sdft_of_sampled_tokens_without_the_first() -> None:
    settings = {"num_generations": 3, "distillation_mode": "sampled_token", "num_loss_tokens_to_skip": 1}
    settings |= {"teacher_model_kind": "base", "distillation_alpha": 1.0}
    method, model = load_method("sdft", **settings), tiny_model()
    [context] = method.contexts
    batch = first_update(made_up_batch(method, model))

    def loss(own: Tensor, other: Tensor, token: int) -> Tensor:
        return (own[token] - other[token]).detach() * own[token]

    reference = made_up_other(model, REFERENCE)
    expected = own_gradient(model, reference, batch, loss, context=context, by_sequence=True, skip=1)
    assert_same(gradient(method, model, batch), expected, 1e-7)


def test_sdft_weighs_a_token_by_how_far_the_policy_has_moved() -> None:
    """Old log-probs 1 below the policy's: e, cut to 2; 1 above: 1 / e."""
    method, model = load_method("sdft", num_generations=2, num_iterations=2), tiny_model()
    batch = first_update(made_up_batch(method, model))
    once = gradient(method, model, batch)
    now = score(model, batch, layout="plain").logp.detach()
    for shift, factor in ((-1.0, 2.0), (1.0, math.exp(-1))):
        moved = gradient(method, model, batch.with_columns(old_logp=now + shift))
        for name, g in once.items():
            torch.testing.assert_close(moved[name], factor * g, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", ["asft", "sft+kl"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_asft_is_the_authors(mode: str, direction: str) -> None:
    """Their loss with torch's `kl_div`: token losses, DFT's weighted by the token's own probability, and the KL beside them."""
    method, model = load_method("asft", mode=mode, direction=direction, kl_weight=0.3), tiny_model()
    batch = made_up_batch(method, model)

    def loss(own: Tensor, ref: Tensor, token: int) -> Tensor:
        kl = F.kl_div(own, ref.exp(), reduction="sum") if direction == "forward" else F.kl_div(ref, own.exp(), reduction="sum")
        return -own[token] * (own[token].exp().detach() if mode == "asft" else 1.0) + 0.3 * kl

    assert_same(gradient(method, model, batch), own_gradient(model, made_up_other(model, REFERENCE), batch, loss))


# --- identities and limits --------------------------------------------------------------------------------------------


def test_without_its_anchor_asft_is_dft_or_sft_and_at_its_reference_too() -> None:
    model = tiny_model()
    for mode, name in (("asft", "dft"), ("sft+kl", "sft")):
        batch = made_up_batch(load_method(name), model)
        faint = gradient(load_method("asft", mode=mode, kl_weight=1e-12), model, batch)
        assert_same(gradient(load_method(name), model, batch), faint)
    anchored = load_method("asft", kl_weight=5.0)
    at_start = replace(anchored, comparisons={"kl": replace(anchored.comparisons["kl"], of="current")})
    batch = made_up_batch(anchored, model)
    assert_same(gradient(load_method("dft"), model, batch), gradient(at_start, model, batch))


def test_a_teacher_that_is_the_student_teaches_nothing() -> None:
    model = tiny_model()
    for name in ("gkd", "on_policy_distillation"):
        method = load_method(name, **({"mode": "full_logits"} if name != "gkd" else {}))
        itself = replace(method, comparisons={n: replace(c, of="current") for n, c in method.comparisons.items()})
        found = gradient(itself, model, made_up_batch(method, model))
        assert max(float(g.abs().max()) for g in found.values()) < 1e-12
    sdft = load_method("sdft", num_generations=2, teacher_model_kind="live")
    batch = made_up_batch(sdft, model)
    plain = tuple(
        tuple(t[:n]) for t, n in zip(batch.tokens.tolist(), [_start(batch, r) for r in range(len(batch))], strict=True)
    )
    found = gradient(sdft, model, replace(batch, contexts={next(iter(sdft.contexts)): plain}))
    assert max(float(g.abs().max()) for g in found.values()) < 1e-12


def _start(batch: Batch, row: int) -> int:
    return int(torch.nonzero(batch.source[row] != 0)[0])


def test_a_teacher_that_is_sure_makes_gkd_imitation() -> None:
    """Forward KL to a teacher with all probability on the given token is -log pi(y): `sft`."""
    model, sft = tiny_model(), load_method("sft")
    batch = made_up_batch(sft, model)
    gkd = load_method("gkd", beta=0.0, lmbda=0.0)

    def sure(logits: Tensor, others: Tensor, targets: Tensor) -> Tensor:
        [comparison] = gkd.comparisons.values()
        return comparison.divergence(logits, 1e4 * F.one_hot(targets, logits.shape[1]).to(logits), targets)

    certain = replace(gkd, comparisons={"jsd": replace(gkd.comparisons["jsd"], divergence=sure)})
    assert_same(gradient(sft, model, batch), gradient(certain, model, batch))


# --- what is collected ------------------------------------------------------------------------------------------------


def collected(method: Method, n: int = 200, *, order: int = 1, teacher: Any = None) -> dict[str, Group]:
    class Stream:
        examples = made_up_examples(method, n)

        def draw(self, position: int, size: int) -> tuple[list[Example], int]:
            return self.examples[::order][position : position + size], position + size

    found = collect(
        method,
        {},
        {"train": Stream()},
        {},
        batch_size=n,
        sampler=ScriptedSampler(),
        sampling=Sampling(),
        rewards=None,
        truncation=Truncation(),
        seed=3,
        step=0,
        teacher=teacher,
    )
    return {g.example.id.split("@")[0]: g for g in found.groups}


def test_a_share_of_lmbda_is_answered_by_the_student_whatever_stands_beside_it() -> None:
    method = load_method("gkd", lmbda=0.3)
    groups = collected(method)
    own = {name for name, g in groups.items() if g.by(Source.POLICY)}
    assert 0.2 < len(own) / 200 < 0.4
    assert all(len(g.trajectories) == 1 for g in groups.values())
    assert {len(g.trajectories[0].behaviour_logp) > 0 for name, g in groups.items() if name in own} == {True}
    few = {name for name, g in collected(method, 20).items() if g.by(Source.POLICY)}
    assert few == {name for name in own if int(name.split(":")[1]) < 20}, "drawn for each example, not for a batch"
    assert not any(g.by(Source.POLICY) for g in collected(load_method("gkd", lmbda=0.0), 20).values())
    assert all(g.by(Source.POLICY) for g in collected(load_method("gkd", lmbda=1.0), 20).values())


def test_seq_kd_has_the_teacher_write_what_the_student_does_not() -> None:
    method = load_method("gkd", lmbda=0.5, seq_kd=True)
    groups = collected(method, 40, teacher=ScriptedSampler(length=3))
    written = [g.trajectories[0] for g in groups.values() if not g.by(Source.POLICY)]
    assert 10 < len(written) < 30
    for t in written:
        assert t.wrote(Source.EXPERT) and not t.behaviour_logp and t.policy_version == -1
        assert t.tokens not in {e.expert[0].tokens for e in made_up_examples(method, 40)}
    with pytest.raises(UserError, match="needs a sampler of the teacher"):
        collected(method, 40)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gkd", {"lmbda": 1.5}, "lmbda: got 1.5"),
        ("gkd", {"beta": -1.0}, "beta: got -1.0"),
        ("gkd", {"lmbda": 1.0, "seq_kd": True}, "seq_kd: with lmbda=1"),
        ("gkd", {"temperature": 0.0}, "temperature: got 0.0"),
        ("on_policy_distillation", {"mode": "top"}, "allowed: sampled_token, full_logits"),
        ("on_policy_distillation", {"num_generations": 0}, "at least 1"),
        ("sdft", {"distillation_mode": "sampled_token", "distillation_alpha": 0.5}, "distillation_alpha must be 1"),
        ("sdft", {"distillation_topk": 5}, "distillation_topk: got 5, which has an effect in mode topk_logits alone"),
        (
            "sdft",
            {"distillation_add_tail": True},
            "distillation_add_tail: got True, which has an effect in mode topk_logits alone",
        ),
        ("sdft", {"distillation_mode": "all"}, "allowed: full_logits, topk_logits, sampled_token"),
        ("sdft", {"distillation_alpha": 2.0}, "distillation_alpha: got 2.0"),
        ("sdft", {"distillation_is_clip": 0.0}, "distillation_is_clip: got 0.0"),
        ("sdft", {"num_loss_tokens_to_skip": -1}, "num_loss_tokens_to_skip: got -1"),
        ("sdft", {"teacher_model_kind": "old"}, "allowed: ema, base, live"),
        ("sdft", {"teacher_model_kind": "live", "teacher_update_rate": 0.1}, "has an effect on an average alone"),
        ("sdft", {"teacher_update_rate": 0.0}, "teacher_update_rate: got 0.0"),
        ("sdft", {"teacher_prompt_template": "{prompt}"}, r"must contain \{privileged_context\}"),
        ("asft", {"mode": "dft"}, "allowed: asft, sft"),
        ("asft", {"direction": "both"}, "allowed: forward, reverse"),
        ("asft", {"kl_weight": 0.0}, "kl_weight: got 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method(name, **settings)


# --- learning ---------------------------------------------------------------------------------------------------------


class Cycle:
    """Examples in their order, again and again."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        return [self.examples[(position + i) % len(self.examples)] for i in range(n)], position + n


def distil(method: Method, model: Any, examples: list[Example], *, steps: int, teacher: Any = None, length: int = 1) -> None:
    """Train `model` in place, without any reward."""
    frozen = copy.deepcopy(model)
    teachers = None
    if teacher is not None:
        teachers = Teacher(lambda: nullcontext(teacher), 1, "shared", TorchSampler(teacher, stop_token_ids=(END,)))
    engine = Engine(
        model=model,
        parameters=1,
        layout="shared",
        device=torch.device("cpu"),
        streams={"train": Cycle(examples)},
        sampler=TorchSampler(model, stop_token_ids=(END,)),
        sampling=Sampling(max_completion_length=length),
        seed=1,
        reference=lambda: nullcontext(frozen),
        teacher=teachers,
    )
    settings = StageSettings(batch_size=min(len(examples), 12), learning_rate=5e-3, max_steps=steps)
    for _ in train_stage(engine, method, settings, Optimizer(model, "fp32"), Progress(state=method.init())):
        pass


@pytest.fixture(scope="module")
def taught() -> tuple[Bandit, Any]:
    """A task of one token, and a teacher who knows it."""
    teacher = model_for(seed=3)
    bandit = Bandit.reachable(model_for())
    learn(load_method("sft"), teacher, bandit, steps=40)
    assert min(bandit.success(teacher)) > 0.9
    return bandit, teacher.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gkd", {"lmbda": 1.0}),
        ("gkd", {"lmbda": 0.0, "beta": 0.0}),
        ("gkd", {"seq_kd": True, "beta": 0.9}),
        ("on_policy_distillation", {"mode": "full_logits"}),
        ("on_policy_distillation", {"num_generations": 8}),
    ],
    ids=str,
)
def test_a_student_learns_what_its_teacher_knows(taught: tuple[Bandit, Any], name: str, settings: dict[str, Any]) -> None:
    """From no reward at all; with lmbda 0 also from wrong answers, since what is learned is what the teacher says of them."""
    bandit, teacher = taught
    model = model_for()
    assert max(bandit.success(model)) < 0.2
    told = Bandit(bandit.wrong, bandit.right) if settings.get("lmbda") == 0.0 else bandit
    method = load_method(name, **settings)
    distil(method, model, told.examples(method.plan.needs_expert), steps=60, teacher=teacher)
    assert min(bandit.success(model)) > 0.8
    assert (
        min(probability(model, p, a) / q for p, a, q in zip(PROMPTS, bandit.right, bandit.success(teacher), strict=True)) > 0.8
    )


def test_sdft_takes_what_the_prompt_showed_into_the_weights() -> None:
    """A model that has learned to repeat the token before its prompt; then right answers are shown there, and not any more."""
    model = model_for()
    copying = [
        Example(f"train:{i}-{a}", "", (a, *prompt), (_demonstration((a, *prompt), (a,)),))
        for i, prompt in enumerate(PROMPTS)
        for a in range(3, VOCABULARY)
    ]
    distil(load_method("sft"), model, copying, steps=90)
    bandit = Bandit.reachable(model)
    shown = [probability(model, (a[0], *p), a) for p, a in zip(PROMPTS, bandit.right, strict=True)]
    assert min(shown) > 0.8 and max(bandit.success(model)) < 0.3
    method = load_method("sdft", num_generations=8, teacher_model_kind="base")
    [context] = method.contexts
    examples = [
        Example(f"train:{i}", "", p, (_demonstration(p, a),), contexts={context: (a[0], *p)})
        for i, (p, a) in enumerate(zip(PROMPTS, bandit.right, strict=True))
    ]
    distil(method, model, examples, steps=30)
    assert min(bandit.success(model)) > 0.7


def _demonstration(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Trajectory:
    return Trajectory(prompt + tokens, (Source.PROMPT,) * len(prompt) + (Source.EXPERT,) * len(tokens))


@pytest.mark.parametrize("settings", [{}, {"mode": "sft+kl"}], ids=str)
def test_asft_learns_the_demonstrations_and_a_strong_anchor_holds_it_back(settings: dict[str, Any]) -> None:
    model, held = model_for(), model_for()
    bandit = Bandit.reachable(model)
    start = bandit.success(model)
    examples = bandit.examples("demonstration")
    distil(load_method("asft", kl_weight=0.01, **settings), model, examples, steps=40)
    distil(load_method("asft", kl_weight=100.0, **settings), held, examples, steps=40)
    assert min(bandit.success(model)) > 0.9
    assert max(bandit.success(held)) < 0.35 and max(abs(a - b) for a, b in zip(start, bandit.success(held), strict=True)) < 0.2
