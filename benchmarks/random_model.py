"""Random Llama models of any size, made here: nothing is fetched.

    python -m benchmarks.random_model FOLDER TOKENIZER

writes one of half a billion parameters, in bf16, with the tokenizer of the folder TOKENIZER, for `make bench` on a card.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from crosstrain.testing import tiny_tokenizer


@dataclass(frozen=True)
class Size:
    """Hidden size, layers and vocabulary of a model; attention heads have 32 dimensions, MLPs 2.75 times the hidden size."""

    hidden: int
    layers: int
    vocabulary: int


HALF_A_BILLION = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""The shape of Qwen2.5-0.5B."""


def save_half_a_billion(folder: Path, tokenizer: Path) -> None:
    """A model folder with random weights in the shape of Qwen2.5-0.5B and another model's tokenizer, of at most 151,936 tokens."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    found = AutoTokenizer.from_pretrained(tokenizer)
    config = Qwen2Config(**HALF_A_BILLION, eos_token_id=found.eos_token_id, pad_token_id=found.pad_token_id)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    found.save_pretrained(folder)


def save_random_model(folder: Path, size: Size) -> Path:
    """A model folder that any recipe can name, in fp32, with the tokenizer of tests (its vocabulary needs 259)."""
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.random_model", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokenizer", type=Path)
    options = parser.parse_args()
    save_half_a_billion(options.folder, options.tokenizer)
