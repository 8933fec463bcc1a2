"""More outside oracles: RLOO's, SDFT's and GKD's losses in TRL, and transformers' own for what imitates its own right answers."""

from __future__ import annotations

import collections
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_against_trl import PROMPT, assert_same_gradient, batch_of, completions, labels, plain_logps
from test_distillation import assert_same, first_update
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.experimental.sdft.sdft_trainer import DistillationLogits, SDFTTrainer

from crosstrain.methods import load_method
from crosstrain.testing import REFERENCE, TEACHER, gradient, made_up_batch, made_up_other, tiny_model
from crosstrain.types import Source


@pytest.mark.parametrize("name", ["raft", "rft", "star", "rest_em"])
def test_imitation_of_own_right_answers_is_transformers_own_loss_with_labels(name: str) -> None:
    """Of the answers that were kept; transformers takes its loss in fp32 whatever the model is in, hence the tolerance."""
    method, model = load_method(name), tiny_model()
    batch = batch_of(method, Source.POLICY, [(0,), (1,), (2,), (3,)])
    assert_same_gradient(method, model, batch, lambda: model(batch.tokens, labels=labels(batch)).loss, tolerance=2e-7)


@pytest.mark.parametrize("name", ["rloo", "reinforce"])
def test_a_whole_answers_log_prob_times_its_credit_is_trls(name: str) -> None:
    """`RLOOTrainer._compute_loss` itself at one update per batch, where its ratio of whole answers is 1. The credit is given to it:
    for `rloo` the reward less the others' mean, worked out here."""
    from trl import RLOOTrainer

    method, model = load_method(name), tiny_model()
    batch = batch_of(method, Source.POLICY, [(0, 1), (2, 3)])
    mask = completions(batch)
    credit = (
        batch.advantage[:, -1:].nan_to_num()[:, 0] if name == "reinforce" else torch.tensor([1.0, -1.0, 0.5, -0.5]).double()
    )
    trainer: Any = types.SimpleNamespace(
        model=model,
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        accelerator=types.SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": collections.defaultdict(list), "eval": collections.defaultdict(list)},
    )

    def theirs() -> Tensor:
        logp = plain_logps(model, batch)
        trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logp, torch.zeros_like(logp), None)
        inputs = {
            "prompt_ids": batch.tokens[:, : len(PROMPT)],
            "prompt_mask": torch.ones(len(batch), len(PROMPT), dtype=torch.long),
            "completion_ids": batch.tokens[:, len(PROMPT) :],
            "completion_mask": mask.long(),
            "old_logps": (logp * mask).sum(dim=1).detach(),
            "advantages": credit,
        }
        return RLOOTrainer._compute_loss(trainer, model, inputs)

    assert_same_gradient(method, model, batch, theirs)


def test_on_policy_distillation_over_the_vocabulary_is_trls() -> None:
    """`GKDTrainer.generalized_jsd_loss` at beta 1."""
    method, model = load_method("on_policy_distillation", mode="full_logits"), tiny_model()
    batch = made_up_batch(method, model)
    teacher = made_up_other(model, TEACHER)
    wanted = torch.where(batch.trained, batch.tokens, torch.full_like(batch.tokens, -100))[:, 1:]
    ours = gradient(method, model, batch)
    model.zero_grad(set_to_none=True)
    own, theirs = (m(batch.tokens).logits[:, :-1] for m in (model, teacher))
    n = int(batch.trained.sum())
    GKDTrainer.generalized_jsd_loss(own, theirs, labels=wanted, beta=1.0, num_items_in_batch=n).backward()
    assert_same(ours, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize(
    "settings",
    [
        {"distillation_alpha": 0.0},
        {"distillation_alpha": 0.5},
        {"distillation_mode": "topk_logits", "distillation_topk": 4, "distillation_add_tail": True, "distillation_alpha": 0.5},
        {"distillation_mode": "topk_logits", "distillation_topk": 4, "distillation_alpha": 0.0},
        {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("inner", [False, True], ids=["one update", "old policy"])
def test_sdft_is_trls(settings: dict[str, Any], inner: bool) -> None:
    """`SDFTTrainer._compute_self_distillation_loss` on both models' logits, the teacher's after its own prompt."""
    method, model = load_method("sdft", num_generations=2, teacher_model_kind="base", **settings), tiny_model()
    [context] = method.contexts
    batch = first_update(made_up_batch(method, model))
    reference = made_up_other(model, REFERENCE)
    rows: list[tuple[Tensor, Tensor, list[int]]] = []
    model.zero_grad(set_to_none=True)
    for r in range(len(batch)):
        tokens = batch.tokens[r, : int(batch.length[r])].tolist()
        start = int(torch.nonzero(batch.source[r] != 0)[0])
        prompt, said = list(batch.contexts[context][r]), tokens[start:]
        with torch.no_grad():
            other = reference(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
        rows.append((model(torch.tensor([tokens])).logits[0, start - 1 : -1], other, said))
    width = max(len(said) for *_, said in rows)
    student, teacher = (
        torch.stack([torch.nn.functional.pad(row[i], (0, 0, 0, width - len(row[2]))) for row in rows]) for i in (0, 1)
    )
    ids = torch.tensor([[*said, *[0] * (width - len(said))] for *_, said in rows])
    mask = torch.tensor([[1.0] * len(said) + [0.0] * (width - len(said)) for *_, said in rows], dtype=torch.float64)
    now = student.detach().log_softmax(-1).gather(2, ids[..., None])[..., 0]
    old = now + 0.5 * torch.randn(now.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = {"old_per_token_logps": old} if inner else {}
    keys = ("distillation_mode", "distillation_topk", "distillation_alpha", "distillation_add_tail", "distillation_is_clip")
    trainer: Any = types.SimpleNamespace(
        args=types.SimpleNamespace(**{key: method.settings[key] for key in keys}),
        accelerator=types.SimpleNamespace(gather=lambda x: x),
        _log_self_distillation_metric=lambda *a: None,
    )
    SDFTTrainer._compute_self_distillation_loss(
        trainer, model, inputs, DistillationLogits(ids, mask, student, teacher)
    ).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    if inner:
        column = torch.full_like(batch.advantage, torch.nan).double()
        for r, (*_, said) in enumerate(rows):
            start = int(torch.nonzero(batch.source[r] != 0)[0])
            column[r, start : start + len(said)] = old[r, : len(said)]
        batch = replace(batch, columns={**batch.columns, "old_logp": column})
    assert_same(gradient(method, model, batch), expected, 1e-7)  # a sequence's mean is a weight in the advantage's dtype, fp32
