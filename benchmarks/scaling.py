"""How time and memory grow: of a training step and of sampling, with each size that they depend on, and how good predictions are.

    python -m benchmarks.scaling [--quick] [--out FILE]

Everything runs on random models made here. Each size is varied alone, on a geometric grid; times are medians of three, memory is
what the work takes beyond the model. An exponent is the slope of the least-squares line through the logarithms: 1 is linear growth.
What a step costs anyway pulls it down at the small end, so that of the three largest points is shown too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.prediction import misses, prediction_errors
from benchmarks.random_model import Size
from benchmarks.scaling_points import Load, Measured, Models, sampling, training_step
from crosstrain.training.record import hardware, versions

LINEAR = 1.15
"""Exponents above are called faster than linear: timings alone scatter by about a tenth."""

BASE = Load(groups=4, group_size=4, prompt=32, completion=32, size=Size(hidden=128, layers=4, vocabulary=4096))

ATTENTION = "attention compares each token of a line with all before it, so it grows with the square of the line's length"
GROUP_LINE = f"a group is one line of its prompt and all its answers, and {ATTENTION}"


@dataclass(frozen=True)
class Sweep:
    """One size varied alone: the loads, what each is called on the axis, and why growth faster than linear would be no surprise."""

    work: str
    axis: str
    loads: tuple[Load, ...]
    values: tuple[float, ...]
    why: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every point, print the tables and what they say, and write the record."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three small points per axis, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/scaling.json"))
    options = parser.parse_args(arguments)
    console = Console(width=130)
    works: Mapping[str, Callable[[Models, Load], Measured]] = {"training": training_step, "sampling": sampling}
    rows: list[dict[str, Any]] = []
    fits: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        models = Models(Path(scratch))
        for sweep in sweeps(quick=options.quick):
            found = [works[sweep.work](models, load) for load in sweep.loads]
            rows += [row(sweep, value, one) for value, one in zip(sweep.values, found, strict=True)]
            fits.append(fit(sweep, found))
        predictions = prediction_errors(Path(scratch) / "prediction", BASE.size, steps=3 if options.quick else 8)
    print_scaling(console, rows, fits)
    print_predictions(console, predictions)
    record = {
        "quick": options.quick,
        "base": asdict(BASE),
        "rows": rows,
        "fits": fits,
        "prediction": predictions,
        "threads": torch.get_num_threads(),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {options.out}", highlight=False)


def sweeps(*, quick: bool) -> list[Sweep]:
    """Every axis with its grid; a quick one has three points instead of five."""
    points = 3 if quick else 5

    def grid(first: int) -> tuple[int, ...]:
        return tuple(first * 2**i for i in range(points))

    def sweep(work: str, axis: str, values: Sequence[int], field: str, why: str = "", base: Load = BASE) -> Sweep:
        loads = tuple(replace(base, **{field: value}) for value in values)
        return Sweep(work, axis, loads, tuple(float(v) for v in values), why)

    steps = tuple(replace(BASE, groups=n) for n in grid(1))
    sizes = tuple(Size(hidden, layers, BASE.size.vocabulary) for hidden, layers in _SHAPES[:points])
    vocabularies = tuple(replace(BASE.size, vocabulary=v) for v in grid(1024))
    batch = replace(BASE, group_size=1)
    return [
        Sweep("training", "tokens per step", steps, tuple(float(load.tokens) for load in steps)),
        sweep("training", "prompt length", grid(16), "prompt", ATTENTION),
        sweep("training", "group size", grid(2), "group_size", GROUP_LINE),
        sweep("training", "completion length", grid(16), "completion", GROUP_LINE),
        Sweep("training", "vocabulary", _with(vocabularies), tuple(float(s.vocabulary) for s in vocabularies)),
        Sweep("training", "parameters", _with(sizes), tuple(float(parameters(s)) for s in sizes)),
        sweep("sampling", "prompts", grid(4), "groups", base=batch),
        sweep("sampling", "prompt length", grid(16), "prompt", ATTENTION, base=replace(batch, groups=16)),
        sweep("sampling", "completion length", grid(8), "completion", ATTENTION, base=replace(batch, groups=16)),
    ]


_SHAPES = ((64, 2), (96, 3), (128, 4), (192, 6), (256, 8))
"""Hidden size and layers of models of growing size."""


def _with(sizes: Sequence[Size]) -> tuple[Load, ...]:
    return tuple(replace(BASE, size=size) for size in sizes)


def parameters(size: Size) -> int:
    """Weights of a random model's matrices, its vocabulary counted once.

    >>> parameters(Size(hidden=32, layers=1, vocabulary=100))
    15744
    """
    hidden, inner = size.hidden, size.hidden * 11 // 4
    return size.vocabulary * hidden + size.layers * (4 * hidden * hidden + 3 * hidden * inner)


def row(sweep: Sweep, value: float, found: Measured) -> dict[str, Any]:
    """A point as the record has it."""
    return {"work": sweep.work, "axis": sweep.axis, "value": value, **asdict(found)}


def fit(sweep: Sweep, found: Sequence[Measured]) -> dict[str, Any]:
    """The exponents of time and memory over a sweep, of all points and of the three largest; None for memory where a point took
    none that could be seen."""
    exponents: dict[str, dict[str, float | None]] = {}
    for key in ("seconds", "memory_mb"):
        y = [getattr(one, key) for one in found]
        seen = min(y) > 0
        exponents[key] = {
            "all": exponent(sweep.values, y) if seen else None,
            "largest": exponent(sweep.values[-3:], y[-3:]) if seen else None,
        }
    return {"work": sweep.work, "axis": sweep.axis, **exponents, "why": sweep.why}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope b of the least-squares line through (log x, log y), so that y grows as x^b.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def warnings(fits: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for every quantity that grows faster than linearly.

    >>> linear, square = {"all": 1.0, "largest": 1.0}, {"all": 1.1, "largest": 1.5}
    >>> warnings([{"work": "training", "axis": "prompt length", "seconds": square, "memory_mb": linear, "why": "attention"}])
    ['training: time grows faster than linearly with prompt length (exponent up to 1.50): attention']
    """
    found = []
    for one in fits:
        for key, name in (("seconds", "time"), ("memory_mb", "memory")):
            steepest = max((e for e in one[key].values() if e is not None), default=0.0)
            if steepest > LINEAR:
                why = one["why"] or "no reason is known, so this is worth looking into"
                found.append(
                    f"{one['work']}: {name} grows faster than linearly with {one['axis']} (exponent up to {steepest:.2f}): {why}"
                )
    return found


def print_scaling(console: Console, rows: Sequence[Mapping[str, Any]], fits: Sequence[Mapping[str, Any]]) -> None:
    """One line per point, the exponents at the end of each axis, and what grows too fast."""
    table = Table("work", "axis", "value", "seconds", "memory, MB", "tokens/s")
    for one in fits:
        for point in rows:
            if (point["work"], point["axis"]) == (one["work"], one["axis"]):
                table.add_row(
                    point["work"],
                    point["axis"],
                    f"{point['value']:,.0f}",
                    f"{point['seconds']:.3f}",
                    f"{point['memory_mb']:.0f}",
                    f"{point['tokens'] / point['seconds']:,.0f}",
                )
        for part, last in (("all", False), ("largest", True)):
            shown = ["-" if one[key][part] is None else f"{one[key][part]:.2f}" for key in ("seconds", "memory_mb")]
            table.add_row("", "", f"exponent, {part}", *shown, "", style="bold", end_section=last)
    console.print(table)
    for text in warnings(fits) or ["nothing grows faster than linearly"]:
        console.print(text, highlight=False)


def print_predictions(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Predicted beside measured, and which of them are too far apart."""
    table = Table("recipe", "quantity", "predicted", "measured", "error")
    for one in rows:
        table.add_row(
            one["recipe"], one["quantity"], f"{one['predicted']:.4g}", f"{one['measured']:.4g}", f"{one['error']:+.0%}"
        )
    console.print(table)
    for text in misses(rows) or ["every prediction is within the goal"]:
        console.print(text, highlight=False)


if __name__ == "__main__":
    main()
