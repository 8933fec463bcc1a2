"""Outside oracles: the same model and tokens through TRL's and transformers' own losses, gradient for gradient."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from crosstrain.methods import load_method
from crosstrain.testing import gradient, save_tiny_model, tiny_model
from crosstrain.training.batching import to_batch, with_advantage
from crosstrain.types import Batch, Example, Group, Method, Source, Trajectory

PROMPT = (5, 9, 11)
ANSWERS = ((7, 8, 13, 21), (30, 2), (17, 17, 40), (12,))
REWARDS = (1.0, 0.0, 0.5, 0.0)
QUIET: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "gradient_checkpointing": False}


def batch_of(method: Method, source: Source, groups: list[tuple[int, ...]]) -> Batch:
    """Groups of the answers above by index; old and reference log-probs are fixed numbers."""

    def one(i: int) -> Trajectory:
        return Trajectory(PROMPT + ANSWERS[i], (Source.PROMPT,) * 3 + (source,) * len(ANSWERS[i]), reward=REWARDS[i])

    batch = to_batch([Group(Example(str(g), "", PROMPT), tuple(one(i) for i in members)) for g, members in enumerate(groups)])
    batch = replace(batch, reward=batch.reward.double())
    return with_advantage(batch, method.advantage(batch))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a folder: trainers insist on a name they can load."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def real(batch: Batch) -> Tensor:
    """[B, T] bool: what is not padding."""
    return torch.arange(batch.tokens.shape[1]) < batch.length[:, None]


def completions(batch: Batch) -> Tensor:
    """[B, C] bool: which of the positions after the prompt are real."""
    return batch.trained[:, len(PROMPT) :]


def plain_logps(model: Any, batch: Batch) -> Tensor:
    """Per-token log-probs of the completions straight from the model's logits, [B, C]."""
    logp = model(batch.tokens).logits.log_softmax(-1)
    picked = logp[:, :-1].gather(2, batch.tokens[:, 1:, None])[..., 0]
    return picked[:, len(PROMPT) - 1 :]


def assert_same_gradient(
    method: Method, model: Any, batch: Batch, other: Callable[[], Tensor], *, tolerance: float = 1e-9
) -> None:
    ours = gradient(method, model, batch, layout="plain")
    model.zero_grad(set_to_none=True)
    other().backward()
    assert max(float(g.abs().max()) for g in ours.values()) > 1e-4
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# --- SFT and DFT ----------------------------------------------------------------------------------------------------


def labels(batch: Batch) -> Tensor:
    return torch.where(batch.trained, batch.tokens, torch.full_like(batch.tokens, -100))


def test_sft_is_transformers_own_loss_with_labels() -> None:
    """transformers takes its loss in fp32 whatever the model is in, hence the tolerance."""
    method, model = load_method("sft"), tiny_model()
    batch = batch_of(method, Source.EXPERT, [(0,), (1,), (2,), (3,)])
    assert_same_gradient(method, model, batch, lambda: model(batch.tokens, labels=labels(batch)).loss, tolerance=2e-7)


@pytest.mark.parametrize(("name", "loss_type"), [("sft", "nll"), ("dft", "dft")])
def test_sft_and_dft_are_trls(tmp_path: Path, saved: Path, name: str, loss_type: str) -> None:
    """A real `SFTTrainer`, in fp32."""
    from trl import SFTConfig, SFTTrainer

    method, model = load_method(name), loaded(saved)
    batch = batch_of(method, Source.EXPERT, [(0,), (1,), (2,), (3,)])
    args = SFTConfig(output_dir=str(tmp_path), loss_type=loss_type, **QUIET)
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(saved))
    inputs = {"input_ids": batch.tokens, "labels": labels(batch), "attention_mask": real(batch).long()}
    assert_same_gradient(method, model, batch, lambda: trainer.compute_loss(model, inputs), tolerance=2e-6)


# --- GRPO, Dr. GRPO, DAPO -------------------------------------------------------------------------------------------


def trl_grpo(model: Any, batch: Batch, *, loss_type: str, beta: float, high: float, limit: int) -> Tensor:
    """`GRPOTrainer._compute_loss` itself, on a stand-in for the trainer that has only what that function reads.

    Its KL is the paper's k3 only with `use_bias_correction_kl` off, which is not its default.
    """
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(output_dir="unused", use_bias_correction_kl=False, **QUIET)
    trainer = types.SimpleNamespace(
        model=model,
        args=args,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=high,
        max_completion_length=limit,
        temperature=1.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=0.0,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        accelerator=types.SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": collections.defaultdict(list), "eval": collections.defaultdict(list)},
        _log_metric=lambda *a: None,
    )
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (
        plain_logps(model, batch),
        torch.zeros_like(completions(batch), dtype=torch.float64),
        None,
    )
    mask = completions(batch).long()
    inputs = {
        "prompt_ids": batch.tokens[:, : len(PROMPT)],
        "prompt_mask": torch.ones(len(batch), len(PROMPT), dtype=torch.long),
        "completion_ids": batch.tokens[:, len(PROMPT) :],
        "completion_mask": mask,
        "advantages": batch.advantage[:, -1:].nan_to_num()[:, 0],
        "num_items_in_batch": mask.sum(),
    }
    for theirs, ours in (("old_per_token_logps", "old_logp"), ("ref_per_token_logps", "ref_logp")):
        if ours in batch.columns:
            inputs[theirs] = batch.columns[ours][:, len(PROMPT) :]
    return GRPOTrainer._compute_loss(trainer, model, inputs)


@pytest.mark.parametrize("inner", [False, True], ids=["one update", "old policy"])
@pytest.mark.parametrize(
    ("name", "settings", "loss_type", "high"),
    [
        ("grpo", {"beta": 0.04}, "grpo", 0.2),
        ("grpo", {"beta": 0.0}, "grpo", 0.2),
        ("dr_grpo", {"max_completion_length": 6}, "dr_grpo", 0.2),
        ("dapo", {}, "dapo", 0.28),
        ("grpo", {"average": "tokens", "beta": 0.1}, "dapo", 0.2),
    ],
)
def test_grpo_family_is_trls(name: str, settings: dict[str, Any], loss_type: str, high: float, inner: bool) -> None:
    method, model = load_method(name, **settings), tiny_model()
    batch = batch_of(method, Source.POLICY, [(0, 1), (2, 3)])
    generator = torch.Generator().manual_seed(0)
    logp = torch.nn.functional.pad(plain_logps(model, batch).detach(), (len(PROMPT), 0))
    for column in ["ref_logp"] * ("ref_logp" in method.needs) + ["old_logp"] * inner:
        noise = 0.4 * torch.randn(logp.shape, generator=generator, dtype=torch.float64)
        batch = batch.with_columns(**{column: logp + noise})
    beta = float(method.settings.get("beta", 0.0))
    assert_same_gradient(
        method, model, batch, lambda: trl_grpo(model, batch, loss_type=loss_type, beta=beta, high=high, limit=6)
    )


# --- DPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_trls(tmp_path: Path, saved: Path, smoothing: float) -> None:
    """A real `DPOTrainer`, in fp32, with a reference of other weights.

    TRL has no conservative DPO under that name; from its `robust` = ((1 - e) L+ - e L-) / (1 - 2 e) and `sigmoid` = L+ follows
    (1 - e) L+ + e L- = 2 (1 - e) sigmoid - (1 - 2 e) robust.
    """
    from trl import DPOConfig, DPOTrainer

    model, reference = loaded(saved), loaded(saved)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(0.9)
    method = load_method("dpo", beta=0.3, label_smoothing=smoothing)
    batch = batch_of(method, Source.EXPERT, [(0, 1), (2, 3)])
    with torch.no_grad():
        ref_logp = torch.nn.functional.pad(plain_logps(reference, batch), (len(PROMPT), 0))
    batch = batch.with_columns(ref_logp=ref_logp)
    losses = {"loss_type": ["sigmoid"]}
    if smoothing:
        losses = {"loss_type": ["sigmoid", "robust"], "loss_weights": [2 * (1 - smoothing), -(1 - 2 * smoothing)]}
    args = DPOConfig(output_dir=str(tmp_path), beta=0.3, label_smoothing=smoothing, **losses, **QUIET)
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = AutoTokenizer.from_pretrained(saved)
    trainer = DPOTrainer(model, ref_model=reference, args=args, train_dataset=rows, processing_class=tokenizer)
    stacked = batch.rows(torch.tensor([0, 2, 1, 3]))  # TRL stacks the chosen answers on the rejected ones
    inputs = {
        "input_ids": stacked.tokens,
        "attention_mask": real(stacked).long(),
        "completion_mask": stacked.trained.long(),
    }
    assert_same_gradient(method, model, batch, lambda: trainer._compute_loss(model, inputs, False), tolerance=2e-6)
