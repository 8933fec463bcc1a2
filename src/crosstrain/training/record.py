"""A run's folder: what is written there, and how a resumed run cuts it back to its checkpoint."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from crosstrain.types import Group, Source

PACKAGES = ("crosstrain", "torch", "transformers", "peft", "safetensors", "datasets", "numpy", "reasoning-gym", "trl")


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add JSON lines to a file; NaN is written as null, since unknown is not a number JSON has."""
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps({k: _plain(v) for k, v in line.items()}, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, none when it does not exist; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    # not splitlines: model text may hold U+2028, which JSON leaves as it is
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]


def cut_lines(path: Path, step: int) -> None:
    """Drop lines of steps after `step`: they were written after the checkpoint and will be written again."""
    if path.is_file():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.touch()
        append_lines(temporary, kept)
        temporary.replace(path)


def completion_lines(step: int, groups: Iterable[Group], decode: Any, limit: int = 4) -> list[dict[str, Any]]:
    """The first own completions that a step sampled, as text, for `completions.jsonl`."""
    lines: list[dict[str, Any]] = []
    for group in groups:
        for t in [t for t in group.by(Source.POLICY) if not t.replayed][:1]:
            lines.append(
                {
                    "step": step,
                    "id": group.example.id,
                    "prompt": decode(list(t.tokens[: t.response_start])),
                    "completion": decode(list(t.response)),
                    "reward": t.reward,
                    "finished": t.finished,
                }
            )
    return lines[:limit]


def versions() -> dict[str, str]:
    """Versions of Python and of every package that results may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package that is not installed cannot have mattered
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor or card, cores, threads and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "device": str(device),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory / 2**30, 1),
        "platform": platform.platform(),
    }


def peak_memory_gb(device: torch.device | None = None) -> float:
    """The most memory held since `reset_peak_memory`, in GB: on a CUDA device by tensors there, else by this process.

    Where a process's peak cannot be reset (outside Linux) it is the one since its start.
    """
    if _on_card(device):
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    peak = _status_kb("VmHWM")
    if peak is None:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(most / (2**30 if sys.platform == "darwin" else 2**20), 3)
    return round(peak / 2**20, 3)


def held_memory_gb(device: torch.device | None = None) -> float:
    """The memory held now, in GB, counted as `peak_memory_gb` counts; where the system does not say, the peak so far."""
    if _on_card(device):
        return round(torch.cuda.memory_allocated(device) / 2**30, 3)
    held = _status_kb("VmRSS")
    return peak_memory_gb() if held is None else round(held / 2**20, 3)


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Forget the peak so far, so that a run in a study's process has its own (on Linux and CUDA; elsewhere nothing happens)."""
    if _on_card(device):
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # not Linux, or a container that keeps /proc read-only
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _on_card(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def _status_kb(name: str) -> int | None:
    """An entry of the process's status in kB; None outside Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    found = [int(line.split()[1]) for line in lines if line.startswith(f"{name}:")]
    return found[0] if found else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
