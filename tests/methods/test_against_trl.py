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


# --- GRPO and what differs from it by its ratio ----------------------------------------------------------------------


def trl_grpo(
    model: Any,
    batch: Batch,
    *,
    loss_type: str,
    beta: float = 0.0,
    low: float = 0.2,
    high: float,
    limit: int = 6,
    level: str = "token",
    compute: Any = None,
) -> Tensor:
    """`GRPOTrainer._compute_loss` itself, or that of another trainer, on a stand-in that has only what such functions read.

    Its KL is the paper's k3 only with `use_bias_correction_kl` off, which is not its default.
    """
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(output_dir="unused", use_bias_correction_kl=False, **QUIET)
    trainer = types.SimpleNamespace(
        model=model,
        args=args,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=low,
        epsilon_high=high,
        max_completion_length=limit,
        temperature=1.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
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
    return (compute or GRPOTrainer._compute_loss)(trainer, model, inputs)


def with_old_policy(batch: Batch, model: Any, spread: float) -> Batch:
    """Old log-probs that are `spread` away from the model's."""
    logp = torch.nn.functional.pad(plain_logps(model, batch).detach(), (len(PROMPT), 0))
    noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return batch.with_columns(old_logp=logp + spread * noise)


@pytest.mark.parametrize(
    ("name", "settings", "theirs"),
    [
        (
            "gspo",
            {"epsilon": 0.03, "epsilon_high": 0.04},
            {"loss_type": "grpo", "level": "sequence", "low": 0.03, "high": 0.04},
        ),
        ("cispo", {"epsilon_high": 1.2}, {"loss_type": "cispo", "high": 1.2}),
        ("sapo", {}, {"loss_type": "sapo", "high": 0.2}),
        ("gmpo", {"epsilon": 0.1}, {"loss_type": "grpo", "low": 0.1, "high": 0.1}),
    ],
    ids=["gspo", "cispo", "sapo", "gmpo"],
)
def test_other_ratios_are_trls(name: str, settings: dict[str, Any], theirs: dict[str, Any]) -> None:
    from trl.experimental.gmpo import GMPOTrainer

    method, model = load_method(name, **settings), tiny_model()
    batch = with_old_policy(batch_of(method, Source.POLICY, [(0, 1), (2, 3)]), model, 0.1)
    compute = GMPOTrainer._compute_loss if name == "gmpo" else None
    assert_same_gradient(method, model, batch, lambda: trl_grpo(model, batch, compute=compute, **theirs))


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


@pytest.mark.parametrize(
    ("name", "settings", "losses"),
    [
        ("dpo", {}, {"loss_type": ["sigmoid"]}),
        ("dpo", {"label_smoothing": 0.2}, {"loss_type": ["sigmoid", "robust"], "loss_weights": [1.6, -0.6]}),
        ("cdpo", {"label_smoothing": 0.2}, {"loss_type": ["sigmoid", "robust"], "loss_weights": [1.6, -0.6]}),
        ("ipo", {"average": True}, {"loss_type": ["ipo"]}),
        ("ipo_mean", {}, {"loss_type": ["ipo"]}),
        ("dpo_nll", {"nll_coef": 0.5}, {"loss_type": ["sigmoid"]}),
    ],
    ids=["dpo", "conservative dpo", "cdpo", "ipo", "ipo of means", "dpo with likelihood"],
)
def test_losses_with_a_reference_are_trls(
    tmp_path: Path, saved: Path, name: str, settings: dict[str, Any], losses: dict[str, Any]
) -> None:
    """A real `DPOTrainer`, in fp32, with a reference of other weights.

    TRL has no conservative DPO under that name; from its `robust` = ((1 - e) L+ - e L-) / (1 - 2 e) and `sigmoid` = L+ follows
    (1 - e) L+ + e L- = 2 (1 - e) sigmoid - (1 - 2 e) robust. Its likelihood beside DPO is a mean over all chosen tokens, the
    paper's one over each answer's: it is added here.
    """
    from trl import DPOConfig, DPOTrainer

    model, reference = loaded(saved), loaded(saved)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(0.9)
    strength = {"tau" if name.startswith("ipo") else "beta": 0.3}
    method = load_method(name, **strength, **settings)
    batch = batch_of(method, Source.EXPERT, [(0, 1), (2, 3)])
    with torch.no_grad():
        ref_logp = torch.nn.functional.pad(plain_logps(reference, batch), (len(PROMPT), 0))
    batch = batch.with_columns(ref_logp=ref_logp)
    smoothing = settings.get("label_smoothing", 0.0)
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

    def theirs() -> Tensor:
        loss = trainer._compute_loss(model, inputs, False)
        chosen = means(model, batch)[::2]
        return loss - settings["nll_coef"] * chosen.mean() if name == "dpo_nll" else loss

    assert_same_gradient(method, model, batch, theirs, tolerance=2e-6)


def means(model: Any, batch: Batch, *, total: bool = False) -> Tensor:
    """The mean log-prob of each answer, [B], or with `total` the sum, straight from the model's logits."""
    mask = completions(batch)
    sums = (plain_logps(model, batch) * mask).sum(dim=1)
    return sums if total else sums / mask.sum(dim=1)


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo"])
def test_losses_without_a_reference_are_trls(name: str) -> None:
    """`cpo_loss` and `odds_ratio_loss` themselves, on a stand-in for the trainer; the likelihood beside them is added here."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    settings = {"simpo": {"beta": 2.0, "gamma": 0.5}, "cpo": {"beta": 0.2}, "orpo": {"beta": 0.3}}[name]
    method, model = load_method(name, **settings), tiny_model()
    batch = batch_of(method, Source.EXPERT, [(0, 1), (2, 3)])
    trainer = types.SimpleNamespace(
        **{"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5, "loss_type": "simpo" if name == "simpo" else "sigmoid"},
        beta=settings["beta"],
        accelerator=types.SimpleNamespace(device=torch.device("cpu")),
    )

    def theirs() -> Tensor:
        answers = means(model, batch, total=name == "cpo")
        chosen, rejected = answers[::2], answers[1::2]
        if name == "orpo":
            return -chosen.mean() - ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0].mean()
        loss = CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean()
        return loss if name == "simpo" else loss - chosen.sum() / completions(batch)[::2].sum()

    # ORPO's odds are in fp32 there
    assert_same_gradient(method, model, batch, theirs, tolerance=1e-6 if name == "orpo" else 1e-9)
