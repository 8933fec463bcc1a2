"""crosstrain against TRL and transformers on the same rows, side by side in one run on one machine.

Two processes, ours and the peer's in an environment of its own, do a step each in turn. Of the peer's settings the fastest
in the first precision is taken, found by trying. Prints a table and writes benchmarks/results.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.checks import Check, curves, greedy
from benchmarks.pair import Side, Steps, WorkerFailed, alone, by_speed, in_turn_with_floor
from benchmarks.rows import make_rows
from benchmarks.works import MEMORY_TARGET, UTILISATION_TARGET, WORKS, Settings, Work, label
from crosstrain.models import has_bf16_instructions, load_tokenizer, resolve_model
from crosstrain.training.record import hardware, versions

FOLDER = Path("runs/bench")
RESULTS = Path(__file__).with_name("results.json")
LIMIT = (
    "limit: the ratio if our step were its matrix products alone / with torch's kernels for attention, softmax and optimizer;\n"
    f"of memory, at most {MEMORY_TARGET} of the peer's: if ours were the loaded model, its gradients and moments alone"
)


@dataclass(frozen=True)
class Row:
    """A line of the results. ours, peer: the work's units per second. ratio: ours to the peer's, step by step in turn: the
    median, the smallest and the largest. memory_ratio: of peak memory, ours to the peer's; memory_limit: if ours were the loaded
    process, with gradients and moments where it trains, and nothing of a step. products_limit, limit: the ratio if our step were
    its matrix products alone, and those with the kernels of `benchmarks.kernels`. peer_tried: speed of each setting, in the first
    precision, where they were tried; None of one that was given up.
    """

    work: str
    dtype: str
    ours: float
    peer: float
    unit: str
    ratio: float
    ratio_min: float
    ratio_max: float
    memory_ratio: float | None
    target: float
    met: bool
    limit: float | None = None
    products_limit: float | None = None
    memory_limit: float | None = None
    memory_met: bool | None = None
    ours_memory_gb: float | None = None
    peer_memory_gb: float | None = None
    peer_settings: str = ""
    peer_tried: dict[str, float | None] = field(default_factory=dict)
    steps: int = 0


Chosen = dict[str, Any]
"""order: a work's settings for the peer by their speed. tried: the speed of each by its label."""


@dataclass(frozen=True)
class Bench:
    """What a run of the benchmarks is made with."""

    model: str
    peer_python: str
    device: str
    rows: Path
    steps: int
    search: bool

    def ours(self, work: str, precision: str) -> Side:
        """Our worker for a work."""
        return self._side("ours", sys.executable, work, precision, {})

    def peer(self, work: str, precision: str, settings: Settings) -> Side:
        """The peer's worker for a work with settings."""
        return self._side("peer", self.peer_python, work, precision, settings)

    def _side(self, who: str, python: str, work: str, precision: str, settings: Settings) -> Side:
        command = [python, "-m", f"benchmarks.{who}", work, precision, str(self.rows), self.model, "--device", self.device]
        for key, value in settings.items():
            command += ["--set", f"{key}={json.dumps(value)}"]
        return Side(command, f"{who}-{work.replace(':', '-')}-{precision}", label(settings))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks, print the table and write the results."""
    options = _options(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = resolve_model(options.model)
    rows = options.rows or FOLDER / "rows.json"
    if options.rows is None:
        made = make_rows(load_tokenizer(model), sft=800, documents=40, pairs=160, prompts=128)
        rows.write_text(json.dumps(made), encoding="utf-8")
    bench = Bench(model, options.peer_python, options.device, rows, options.steps, not options.no_search)
    bf16 = has_bf16_instructions(torch.device(options.device))
    found: list[Row] = []
    checks: list[Check] = []
    failed: list[str] = []
    record: dict[str, Any] = {
        "machine": hardware(torch.device(options.device)),
        "bf16_instructions": bf16,
        "versions": {**versions(), **_peer_versions(options.peer_python)},
        "model": options.model,
    }
    part = FOLDER / "results.json"
    out = options.out or (part if options.only else RESULTS)  # a part is not the results

    def write(path: Path = part) -> None:  # after every row: what an hour has measured should not be lost
        found_so_far = {"rows": [asdict(r) for r in found], "checks": [asdict(c) for c in checks], "failed": failed}
        path.write_text(json.dumps({**record, **found_so_far}, indent=1) + "\n", encoding="utf-8")

    for work in WORKS:
        if options.only and work.key not in options.only:
            continue
        chosen: Chosen = {}
        for precision in options.precision or (work.precisions if bf16 else ("fp32",)):
            _attempt(found, failed, f"{work.title}, {precision}", lambda w=work, p=precision, c=chosen: compare(bench, w, p, c))
            write()
    if not options.only or "limit" in options.only:
        _attempt(found, failed, "utilisation", lambda: utilisation(bench, "mixed" if bf16 else "fp32"))
        write()
    if not options.only or "checks" in options.only:
        for work, compared in _checks(options.curve_steps).items():
            try:
                checks += compared(bench.ours(work, "fp32"), bench.peer(work, "fp32", {}), FOLDER / "logs")
            except WorkerFailed as error:
                failed.append(f"check of {work}: {error}")
            write()
    write(out)
    show(found, checks, record)
    print(f"written to {out}")
    if failed:
        sys.exit("failed: " + "; ".join(failed))


def _checks(curve_steps: int) -> dict[str, Callable[[Side, Side, Path], list[Check]]]:
    """What is compared of each work."""
    return {
        "sft": lambda ours, peer, logs: curves(ours, peer, logs, curve_steps, "SFT loss", ["loss"]),
        "dpo": lambda ours, peer, logs: curves(ours, peer, logs, 10, "DPO", ["loss", "rewards/margins"]),
        "generate:32:greedy": lambda ours, peer, logs: [greedy(ours, peer, logs)],
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--peer-python", default=".venv-trl/bin/python", help="Python of an environment with TRL")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=Path, help="rows that a run has left, in runs/bench/rows.json, instead of making them")
    parser.add_argument("--steps", type=int, default=5, help="measured steps after one for warming up")
    parser.add_argument("--curve-steps", type=int, default=50, help="steps over which losses are compared")
    parser.add_argument(
        "--precision", nargs="*", choices=["bf16", "mixed", "fp32"], help="instead of what the processor is made for"
    )
    parser.add_argument("--only", nargs="*", choices=[*(w.key for w in WORKS), "limit", "checks"], help="these alone")
    parser.add_argument("--no-search", action="store_true", help="take the peer's first setting instead of the fastest")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results.json, or runs/bench/results.json for a part")
    return parser.parse_args(arguments)


def _attempt(found: list[Row], failed: list[str], title: str, run: Callable[[], Row]) -> None:
    print(title, flush=True)
    try:
        row = run()
    except WorkerFailed as error:  # the other rows are worth having
        failed.append(f"{title}: {error}")
        print(f"    failed: {error}", flush=True)
        return
    found.append(row)
    print(f"    {row.ours:,.1f} against {row.peer:,.1f} {row.unit}: {row.ratio:.2f}", flush=True)


def compare(bench: Bench, work: Work, precision: str, chosen: Chosen) -> Row:
    """A work in one precision: the fastest of the peer's settings, then both in turn; the next fastest where that one fails, since
    what it has memory for alone may not fit beside ours. chosen: of the work, filled in the first precision, used in the others."""
    logs = FOLDER / "logs"
    sides = [bench.peer(work.key, precision, settings) for settings in work.peers]
    if not chosen:
        best, tried = by_speed(sides, logs) if bench.search and len(sides) > 1 else (sides, {})
        chosen |= {"order": [sides.index(side) for side in best], "tried": tried}
    order = [sides[i] for i in chosen["order"]]
    for side in order:
        try:
            ours, peer, floor, needed = in_turn_with_floor(bench.ours(work.key, precision), side, logs, bench.steps)
        except WorkerFailed as error:
            if error.side is not side or side is order[-1]:
                raise
            print(f"    {side.label} failed beside ours: {str(error).splitlines()[-1].strip()}", flush=True)
        else:
            row = row_of(work, precision, ours, peer, floor, needed)
            return replace(row, peer_settings=f"{work.peer}: {side.label}", peer_tried=chosen["tried"])
    raise AssertionError("the last setting returns or raises")


def row_of(work: Work, precision: str, ours: Steps, peer: Steps, floor: Steps, needed: float) -> Row:
    """The line of two workers' steps. needed: the least that ours takes, in GiB."""
    ratios = [b / a for a, b in zip(ours.seconds, peer.seconds, strict=True)]
    memory = ours.memory_gb / peer.memory_gb
    return Row(
        work=work.title,
        dtype=precision,
        ours=ours.speed,
        peer=peer.speed,
        unit=work.unit,
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        memory_ratio=memory,
        target=work.target,
        met=statistics.median(ratios) >= work.target,
        limit=_limit(floor, peer, "products", "kernels"),
        products_limit=_limit(floor, peer, "products"),
        memory_limit=needed / peer.memory_gb,
        memory_met=memory <= MEMORY_TARGET,
        ours_memory_gb=ours.memory_gb,
        peer_memory_gb=peer.memory_gb,
        steps=len(ratios),
    )


def _limit(floor: Steps, peer: Steps, *parts: str) -> float:
    """The ratio of a step that takes as long as these parts of ours alone."""
    least = [sum(line[part] for part in parts) / line["amount"] for line in floor.lines]
    return statistics.median(b / a for a, b in zip(least, peer.seconds, strict=True))


def utilisation(bench: Bench, precision: str) -> Row:
    """The real work against its matrix products alone, in turn in one process."""
    command = [sys.executable, "-m", "benchmarks.limit", precision, str(bench.rows), bench.model, "--device", bench.device]
    side = Side(command, f"limit-{precision}")
    lines = alone(side, FOLDER / "logs", bench.steps).lines
    shares = [line["products"] / line["real"] for line in lines]
    share = statistics.median(shares)
    return Row(
        work="SFT forward and backward, 16 x 256, all supervised",
        dtype=precision,
        ours=1 / statistics.median(line["real"] for line in lines),
        peer=1 / statistics.median(line["products"] for line in lines),
        unit="passes/s",
        ratio=share,
        ratio_min=min(shares),
        ratio_max=max(shares),
        memory_ratio=None,
        target=UTILISATION_TARGET,
        met=share >= UTILISATION_TARGET,
        peer_settings="its matrix products alone",
        steps=len(lines),
    )


def _peer_versions(python: str) -> dict[str, str]:
    code = "import importlib.metadata as m; print(*(f'{p}={m.version(p)}' for p in ('trl', 'transformers', 'torch')))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return {f"peer {name}": version for name, _, version in (entry.partition("=") for entry in found)}


def show(rows: Sequence[Row], checks: Sequence[Check], record: dict[str, Any]) -> None:
    """The tables."""
    console = Console(width=150)
    columns = ("work", "dtype", "ours", "peer", "unit", "ratio", "target", "limit", "memory, GB", "peer's settings")
    table = Table(*columns, title="speed", caption=LIMIT)
    for row in rows:
        memory = f"{row.ours_memory_gb:.1f}" if row.ours_memory_gb is not None else ""
        memory += f" / {row.peer_memory_gb:.1f} = {row.memory_ratio:.2f}" if row.memory_ratio is not None else ""
        table.add_row(
            row.work,
            row.dtype,
            f"{row.ours:,.3g}",
            f"{row.peer:,.3g}",
            row.unit,
            f"{row.ratio:.2f} ({row.ratio_min:.2f} to {row.ratio_max:.2f})",
            f"{row.target:g} {'met' if row.met else 'not met'}",
            "" if row.limit is None else f"{row.products_limit:.2f} / {row.limit:.2f}",
            memory
            + ("" if row.memory_met is None else " met" if row.memory_met else f" not met, limit {row.memory_limit:.2f}"),
            row.peer_settings,
        )
    console.print(table)
    if checks:
        found = Table("the same work", "largest difference", "allowed", title="checks, fp32")
        for check in checks:
            found.add_row(check.check, f"{check.value:.2g}", f"{check.limit:g} {'met' if check.met else 'not met'}")
        console.print(found)
    machine = record["machine"]
    console.print(f"{machine['processor']}, {machine['threads']} threads; torch {record['versions']['torch']}", highlight=False)


if __name__ == "__main__":
    main()
