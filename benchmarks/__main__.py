"""Sampling against transformers' `generate`, and training steps against a plain padded loop, on the bundled 135M model.

Both sides of a row run in turn, after one warm-up each, in one process with the same threads and dtype; medians and their ratio are
printed and written to runs/bench.json with what they were measured on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from crosstrain.data import encode
from crosstrain.methods import load_method
from crosstrain.models import has_bf16_instructions, load_model
from crosstrain.objective.reduce import count
from crosstrain.rollout import Prompt, Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.tasks import get_task
from crosstrain.training.batching import cut, to_batch, with_advantage
from crosstrain.training.loop import Engine, backward
from crosstrain.training.metrics import Meter
from crosstrain.training.record import hardware, peak_memory_gb, versions
from crosstrain.types import Batch, Example, Group, Method, Source, Trajectory

NEW_TOKENS = 32
Work = Callable[[], int]
"""Does something and says how many tokens it was."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every benchmark, print the table and write the record."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    options = parser.parse_args(arguments)
    dtype = torch.bfloat16 if has_bf16_instructions(torch.device("cpu")) else torch.float32
    model, tokenizer = load_model(options.model, dtype=dtype)
    examples = [encode(row, tokenizer, id=f"train:{i}") for i, row in enumerate(get_task("sums").rows("train", 32, seed=0))]
    rows = [
        measure(f"sampling, {n} prompts, {NEW_TOKENS} tokens", *sampling(model, tokenizer, examples[:n]), options.repeats)
        for n in (1, 32)
    ]
    rows.append(
        measure("SFT forward and backward, 16 rows", *training(model, "sft", demonstrations(examples[:16])), options.repeats)
    )
    rows.append(
        measure("GRPO forward and backward, 8 x 8", *training(model, "dr_grpo", rollouts(examples[:8])), options.repeats)
    )
    record = {
        "model": options.model,
        "dtype": str(dtype),
        "repeats": options.repeats,
        "rows": rows,
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "peak_memory_gb": peak_memory_gb(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = Table("work", "crosstrain, tokens/s", "peer, tokens/s", "ratio", "peer")
    for row in rows:
        table.add_row(row["work"], f"{row['ours']:,.0f}", f"{row['theirs']:,.0f}", f"{row['ratio']:.2f}", row["peer"])
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{dtype}, {torch.get_num_threads()} threads, peak {record['peak_memory_gb']} GB; {options.out}", highlight=False
    )


def measure(work: str, ours: Work, theirs: Work, peer: str, repeats: int) -> dict[str, Any]:
    """Tokens per second of both, medians of runs in turn, and the median ratio of their times."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    tokens = {"ours": ours(), "theirs": theirs()}  # the warm-up
    for _ in range(repeats):
        for name, run in (("ours", ours), ("theirs", theirs)):
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    speed = {name: tokens[name] / statistics.median(found) for name, found in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {"work": work, **speed, "ratio": statistics.median(ratios), "ratios": ratios, "peer": peer}


def sampling(model: Any, tokenizer: Any, examples: Sequence[Example]) -> tuple[Work, Work, str]:
    """The same prompts continued by the same number of tokens; neither side may stop early."""
    prompts = [Prompt(e.prompt_tokens, 1, e.id) for e in examples]
    sampler = TorchSampler(model, stop_token_ids=())
    longest = max(len(p.tokens) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p.tokens)) + list(p.tokens) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p.tokens)) + [1] * len(p.tokens) for p in prompts])

    def ours() -> int:
        sampler.sample(prompts, Sampling(max_completion_length=NEW_TOKENS), seed=0, step=0)
        return len(prompts) * NEW_TOKENS

    def theirs() -> int:
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                repetition_penalty=1.0,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
            )
        return len(prompts) * NEW_TOKENS

    return ours, theirs, "generate"


def demonstrations(examples: Sequence[Example]) -> Batch:
    """One demonstration of each example."""
    return to_batch([Group(e, e.expert) for e in examples])


def rollouts(examples: Sequence[Example]) -> Batch:
    """Eight answers of 16 tokens to each example, half of them right."""
    groups = []
    for e in examples:
        source = (Source.PROMPT,) * len(e.prompt_tokens) + (Source.POLICY,) * 16
        answers = [tuple((97 * k + 13 * i) % 40_000 + 100 for i in range(16)) for k in range(8)]
        rows = (Trajectory(e.prompt_tokens + a, source, reward=float(k % 2)) for k, a in enumerate(answers))
        groups.append(Group(e, tuple(rows)))
    return to_batch(groups)


def training(model: Any, name: str, batch: Batch) -> tuple[Work, Work, str]:
    """One gradient of a method, by the loop's own backward and by whole padded rows with all logits."""
    method: Method = load_method(name)
    batch = with_advantage(batch, method.advantage(batch))
    counts = count(method.terms, batch, groups=len(torch.unique(batch.group)))
    engine = Engine(model, parameters=1, layout="shared", device=torch.device("cpu"), streams={})
    mask = (torch.arange(batch.tokens.shape[1]) < batch.length[:, None]).long()
    weight = torch.where(batch.trained, batch.advantage, torch.zeros_like(batch.advantage))[:, 1:]

    def ours() -> int:
        model.zero_grad(set_to_none=True)
        for index in cut(batch, engine.micro_batch_tokens, "token"):
            backward(engine, method, batch.rows(index), counts, Meter())
        return int(batch.length.sum())

    def theirs() -> int:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=batch.tokens, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        logp = torch.log_softmax(logits, dim=-1).gather(2, batch.tokens[:, 1:, None])[..., 0]
        (-(logp * weight).sum() / counts[method.terms[0].name]).backward()
        return int(batch.length.sum())

    return ours, theirs, "padded rows, all logits"


if __name__ == "__main__":
    main()
