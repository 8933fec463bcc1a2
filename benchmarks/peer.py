"""The peers' side, run in an environment of TRL's own: `python -m benchmarks.peer WORK PRECISION ROWS MODEL [--set k=v ...]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback

from benchmarks.reward import last_number
from benchmarks.settings import BATCH, BETA, GENERATIONS, LEARNING_RATE, NEW_TOKENS
from benchmarks.worker import Pace, serve


def main() -> None:
    """Load what the work needs and do its steps when asked."""
    parser = argparse.ArgumentParser(prog="benchmarks.peer")
    parser.add_argument("work")
    parser.add_argument("precision")
    parser.add_argument("rows", type=Path)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="k=v")
    options = parser.parse_args()
    pace = Pace()
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    settings = {k: json.loads(v) for k, _, v in (s.partition("=") for s in options.set)}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    attention = settings.pop("attn_implementation", None)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation=attention).to(options.device)
    name, _, more = options.work.partition(":")
    if name == "generate":
        size, _, way = more.partition(":")
        prompts = [row["prompt"] for row in rows["prompts"][: int(size)]]
        serve(pace, generating(model, tokenizer, prompts, greedy=way == "greedy", **settings))
        return
    trainer = TRAINERS[name](model, tokenizer, rows, _common(name, options.precision, options.device, settings))
    counted = _count(trainer, name)
    trainer.add_callback(Paced(pace, counted))
    trainer.train()


class Paced(TrainerCallback):  # type: ignore[misc]
    """A step when asked; TRL logs each one, and that is where it ends."""

    def __init__(self, pace: Pace, counted: list[float]) -> None:
        self.pace, self.counted = pace, counted

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pace.ready()
        if not self.pace.go():
            raise SystemExit

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" not in logs:
            return
        wanted = ("loss", "rewards/margins", "reward", "completions/mean_length")
        self.pace.done(sum(self.counted), **{k: float(logs[k]) for k in wanted if k in logs})
        self.counted.clear()
        if not self.pace.go():
            raise SystemExit


def _count(trainer: Any, name: str) -> list[float]:
    """How much each forward pass of a step works on, counted where TRL computes its loss."""
    counted: list[float] = []
    compute = trainer.compute_loss

    def counting(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(AMOUNT[name](inputs))
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = counting
    return counted


AMOUNT = {
    "sft": lambda inputs: float(inputs["attention_mask"].sum()),
    "documents": lambda inputs: float((inputs["labels"] != -100).sum()),
    "dpo": lambda inputs: float(inputs["attention_mask"].sum()),
    "grpo": lambda inputs: float(len(inputs["completion_ids"])),
}


def _common(name: str, precision: str, device: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's defaults but for what the comparison needs."""
    batch = BATCH[name] * (GENERATIONS if name == "grpo" else 1)
    micro = settings.get("per_device_train_batch_size", batch)
    return {
        "output_dir": "runs/bench/trl",
        "gradient_accumulation_steps": max(batch // micro, 1),
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": 1_000_000,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "bf16": precision == "mixed",
        "use_cpu": device == "cpu",
        "per_device_train_batch_size": micro,
        **({} if name == "grpo" else {"train_sampling_strategy": "sequential"}),
        **settings,
    }


def _sft(model: Any, tokenizer: Any, rows: Mapping[str, Any], common: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(
        [
            {"input_ids": r["prompt"] + r["completion"], "labels": [-100] * len(r["prompt"]) + r["completion"]}
            for r in rows["sft"]
        ]
    )
    return SFTTrainer(model, SFTConfig(**common), train_dataset=data, processing_class=tokenizer)


def _documents(model: Any, tokenizer: Any, rows: Mapping[str, Any], common: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": r["tokens"]} for r in rows["documents"]])
    return SFTTrainer(model, SFTConfig(max_length=2048, **common), train_dataset=data, processing_class=tokenizer)


def _dpo(model: Any, tokenizer: Any, rows: Mapping[str, Any], common: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list([r["texts"] for r in rows["dpo"]])  # it takes no tokens
    config = DPOConfig(beta=BETA, precompute_ref_log_probs=True, **common)
    trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    for row, made in zip(rows["dpo"], trainer.train_dataset, strict=True):
        same = all(row[name] == made[f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))
        assert same, "both sides must train on the same tokens"
    return trainer


def _grpo(model: Any, tokenizer: Any, rows: Mapping[str, Any], common: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    for row in rows["prompts"]:
        assert tokenizer(row["text"])["input_ids"] == row["prompt"], "both sides must sample from the same tokens"
    data = Dataset.from_list([{"prompt": r["text"], "answer": r["answer"]} for r in rows["prompts"]])
    config = GRPOConfig(
        num_generations=GENERATIONS,
        max_completion_length=NEW_TOKENS,
        beta=0.0,
        loss_type="grpo",
        temperature=1.0,
        shuffle_dataset=False,
        **common,
    )
    return GRPOTrainer(model, last_number, args=config, train_dataset=data, processing_class=tokenizer)


TRAINERS = {"sft": _sft, "documents": _documents, "dpo": _dpo, "grpo": _grpo}


def generating(model: Any, tokenizer: Any, prompts: list[list[int]], *, greedy: bool, continuous: bool = False) -> Any:
    """transformers' `generate`, or its continuous batching, with nothing that ends a completion."""
    model.generation_config.eos_token_id = None
    model.eval()
    sampling = {"do_sample": not greedy, **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0})}
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)

    def plain() -> list[list[int]]:
        with torch.no_grad():
            found = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.pad_token_id, **sampling
            )
        return [row[longest:] for row in found.tolist()]

    def batched() -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=tokenizer.pad_token_id, **sampling)
        with torch.no_grad():
            found = model.generate_batch(prompts, generation_config=config, progress_bar=False)
        return [list(found[k].generated_tokens) for k in sorted(found, key=lambda k: int(k.rpartition("_")[2]))]

    def step() -> Mapping[str, Any]:
        tokens = batched() if continuous else plain()
        return {"amount": sum(map(len, tokens)), **({"tokens": tokens} if greedy else {})}

    return step


if __name__ == "__main__":
    main()
