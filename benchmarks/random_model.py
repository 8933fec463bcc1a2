"""Random Llama models of any size, made here: nothing is fetched."""

from __future__ import annotations

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
