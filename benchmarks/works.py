"""What is compared, with which settings of the peer, and what is to be reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]
MEMORY_TARGET = 0.6
"""Our peak memory as a share of the peer's, at most."""


@dataclass(frozen=True)
class Work:
    """A row of the table.

    key: what workers know it by. precisions: policies it is measured in where the processor has bf16 instructions; elsewhere fp32
    alone. peers: the peer's settings to choose the fastest of, which is measured. target: ratio of speeds to reach.
    """

    key: str
    title: str
    unit: str
    peer: str
    peers: Sequence[Settings]
    target: float
    precisions: Sequence[str] = ("bf16", "mixed")


MICRO = "per_device_train_batch_size"
EAGER: Settings = {"attn_implementation": "eager"}

WORKS = (
    Work("sft", "SFT step, 16 short answers", "tokens/s", "TRL", [{MICRO: 16}, {MICRO: 16, **EAGER}, {MICRO: 8}], 5),
    Work(
        "documents",
        "SFT, documents of 512 to 2,048 tokens, all supervised",
        "supervised tokens/s",
        "TRL",
        [
            {MICRO: 1, "packing": True, "gradient_accumulation_steps": 3},
            {MICRO: 1},  # 4 take more than 19 GB in fp32, too much beside our worker on 24 GB
            {MICRO: 2},
            {MICRO: 1, "packing": True, "packing_strategy": "wrapped", "gradient_accumulation_steps": 3},
        ],
        2,
    ),
    Work(
        "dpo",
        "DPO step, 16 pairs, reference precomputed",
        "tokens/s",
        "TRL",
        [{MICRO: 16}, {MICRO: 16, **EAGER}, {MICRO: 8}],
        5,
    ),
    Work(
        "grpo",
        "GRPO step, 8 prompts x 8 completions of at most 64 tokens",
        "completions/s",
        "TRL",
        [
            {MICRO: 64},  # the fastest wherever all were tried
            {MICRO: 64, **EAGER},
            {MICRO: 32},
            {MICRO: 16},
            {MICRO: 8},
            {MICRO: 16, "use_transformers_continuous_batching": True},
        ],
        6,
    ),
    *(
        Work(
            f"generate:{n}",
            f"sampling 64 tokens, {n} {'prompt' if n == 1 else 'prompts'}",
            "new tokens/s",
            "transformers",
            [{}, EAGER, {"continuous": True}],
            target,
            ("bf16",),
        )
        for n, target in ((1, 2), (32, 3), (128, 4))
    ),
)

UTILISATION_TARGET = 0.45
"""Share of the time of an SFT forward and backward, 16 rows of 256 tokens, that its matrix products alone take."""


def label(settings: Settings) -> str:
    """The settings as a table shows them.

    >>> label({"per_device_train_batch_size": 8, "packing": True})
    'micro-batch 8, packing'
    """
    names = {
        MICRO: "micro-batch",
        "use_transformers_continuous_batching": "continuous batching",
        "continuous": "continuous batching",
        "attn_implementation": "attention",
    }
    parts = []
    for key, value in settings.items():
        name = names.get(key, key)
        parts.append(name if value is True else f"{name} {value}")
    return ", ".join(parts) or "generate"
