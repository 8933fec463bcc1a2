"""The rows of the benchmarks, tokenized once for both sides."""

from __future__ import annotations

import random
from typing import Any

from crosstrain.data import encode
from crosstrain.tasks import get_task

DOCUMENT = (512, 2048)
"""Tokens of a document, fewest and most."""


def make_rows(tokenizer: Any, *, sft: int, documents: int, pairs: int, prompts: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by kind: `sft` (prompt, completion), `documents` (tokens), `dpo` (prompt, chosen, rejected, and their texts), `prompts`
    (prompt, text, answer); all token ids but texts and answers. Questions are reasoning-gym's chain_sum; no two rows are the same.
    """
    task = get_task("reasoning_gym", dataset="chain_sum")
    rows = task.rows("train", max(sft, pairs, prompts), seed=1)
    examples = [encode(row, tokenizer, id=f"train:{i}") for i, row in enumerate(rows)]
    answers = [list(e.expert[0].response) for e in examples]
    end = answers[0][-1]
    plain = [{"prompt": list(e.prompt_tokens), "completion": a} for e, a in zip(examples, answers, strict=True)]
    wrong = [tokenizer(str(int(row.columns["answer"]) + 1))["input_ids"] + [end] for row in rows]

    def texts(*tokens: list[int]) -> dict[str, str]:
        return dict(zip(("prompt", "chosen", "rejected"), map(tokenizer.decode, tokens), strict=True))

    return {
        "sft": plain[:sft],
        "dpo": [
            {"prompt": p["prompt"], "chosen": p["completion"], "rejected": w, "texts": texts(p["prompt"], p["completion"], w)}
            for p, w in zip(plain[:pairs], wrong, strict=False)
        ],
        "prompts": [
            {"prompt": p["prompt"], "text": tokenizer.decode(p["prompt"]), "answer": str(row.columns["answer"])}
            for p, row in zip(plain[:prompts], rows, strict=False)
        ],
        "documents": [{"tokens": tokens} for tokens in _documents(tokenizer, documents)],
    }


def _documents(tokenizer: Any, n: int) -> list[list[int]]:
    """Texts of 512 to 2,048 tokens made of solved word problems, each from another place on."""
    rows = get_task("reasoning_gym", dataset="gsm_symbolic").rows("train", 256, seed=1)
    texts = [tokenizer(_plain(row))["input_ids"] for row in rows]
    rng = random.Random(1)
    documents = []
    for _ in range(n):
        length = rng.randint(*DOCUMENT)
        tokens: list[int] = []
        while len(tokens) < length:
            tokens += texts[rng.randrange(len(texts))]
        documents.append(tokens[:length])
    return documents


def _plain(row: Any) -> str:
    prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
    return f"{prompt}\n{row.columns['answer']}\n\n"
