"""How much of an SFT forward and backward is matrix products: `python -m benchmarks.limit PRECISION ROWS MODEL`, a worker.

A step does the real work once, in micro-batches of the default size, and its matrix products alone once, all rows together, in
turn, and says what each took.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours import EXAMPLES
from benchmarks.products import inputs, training_products, weights_of
from benchmarks.worker import Pace, serve
from crosstrain.methods import load_method
from crosstrain.models import load_model, resolve_device
from crosstrain.objective.reduce import count
from crosstrain.training.batching import cut, to_batch, with_advantage
from crosstrain.training.engine import Engine
from crosstrain.training.gradient import backward
from crosstrain.training.metrics import Meter
from crosstrain.training.optimizer import Optimizer
from crosstrain.training.timing import clock
from crosstrain.types import Group

ROWS, LENGTH = 16, 256


def main() -> None:
    """Load the model and answer steps."""
    parser = argparse.ArgumentParser(prog="benchmarks.limit")
    parser.add_argument("precision")
    parser.add_argument("rows", type=Path)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    pace = Pace()
    rows = json.loads(options.rows.read_text(encoding="utf-8"))["documents"]
    device = resolve_device(options.device)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    model, _ = load_model(options.model, dtype=dtype, device=device)
    optimizer = Optimizer(model, options.precision)
    real = training(model, optimizer, [row["tokens"][:LENGTH] for row in rows[:ROWS]])
    weights = weights_of(model)
    given = inputs(weights, ROWS * LENGTH, ROWS * (LENGTH - 1))

    def step() -> Mapping[str, Any]:
        started = clock(device)
        real()
        between = clock(device)
        training_products(weights, given, ROWS * LENGTH, ROWS * (LENGTH - 1))
        ended = clock(device)
        return {"amount": 1, "real": between - started, "products": ended - between}

    serve(pace, step)


def training(model: Any, optimizer: Optimizer, rows: list[list[int]]) -> Callable[[], None]:
    """Forward and backward of the real loop, gradients dropped."""
    examples = [EXAMPLES["documents"](i, {"tokens": tokens}) for i, tokens in enumerate(rows)]
    method = load_method("sft")
    device = next(model.parameters()).device
    batch = to_batch([Group(e, e.expert) for e in examples]).to(device)
    batch = with_advantage(batch, method.advantage(batch))
    counts = count(method.terms, batch, groups=len(rows))
    engine = Engine(model, parameters=1, layout="shared", device=device, streams={})

    def run() -> None:
        for index in cut(batch, engine.micro_batch_tokens, "token"):
            backward(engine, method, batch.rows(index.to(device)), counts, Meter())
        optimizer.zero_grad()

    return run


if __name__ == "__main__":
    main()
