"""A language model and its value head, saved as the sequence classifier that transformers knows as a reward model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosstrain.errors import UserError
from crosstrain.training.checkpoint import write_folder

OURS = "crosstrain_reward_model"
"""Key of the config of those that we made: their texts end in the end token, and nothing comes after it."""


def check_classifier(model: Any) -> None:
    """Before step 1: transformers has a sequence classifier of this architecture that reads a linear head off the last token.

    UserError where it has none, or one of another kind.
    """
    with torch.device("meta"):
        _classifier(_plain(model))


def save_reward_model(model: Any, head: nn.Linear, tokenizer: Any, folder: Path) -> None:
    """A Hugging Face folder that `AutoModelForSequenceClassification` loads: the language model's body (LoRA merged) with `head` as
    its score, one label. It appears complete or not at all, in the place of one that was there.

    Classifiers find the last token as the last that is not padding. Where the tokenizer pads with the end token, that would be the
    one before it; the folder's tokenizer then pads with another special token, and with none if it has no other.
    """
    merged = copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
    with torch.device("meta"):
        classifier = _classifier(merged)
    setattr(classifier, classifier.base_model_prefix, merged.base_model)
    weight = head.weight.detach().to(merged.dtype)
    classifier.score = nn.Linear(weight.shape[1], 1, bias=False, device=weight.device, dtype=weight.dtype)
    classifier.score.weight.data = weight
    reader = copy.deepcopy(tokenizer)
    pad = _padding(tokenizer)
    classifier.config.pad_token_id = pad
    setattr(classifier.config, OURS, True)
    reader.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
    reader.padding_side = "right"

    def fill(temporary: Path) -> None:
        classifier.save_pretrained(temporary)
        reader.save_pretrained(temporary)

    write_folder(folder, fill)


def _plain(model: Any) -> Any:
    """The transformers model below adapters, if there are any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _classifier(model: Any) -> Any:
    """A sequence classifier of the model's architecture with one label, its weights whatever they are."""
    from transformers import AutoModelForSequenceClassification

    kind = f"model {type(model).__name__} ({model.config.model_type})"
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    try:
        classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(
            f"{kind}: transformers has no sequence classifier of this architecture, so no reward model can be saved; train one of "
            "another architecture (Llama, Qwen, Mistral, Gemma, GPT-2, ...)"
        ) from error
    score = getattr(classifier, "score", None)
    width = model.get_output_embeddings().weight.shape[1]
    fits = type(score) is nn.Linear and score.bias is None and tuple(score.weight.shape) == (1, width)
    if not fits or type(classifier.base_model) is not type(model.base_model):
        raise UserError(
            f"{kind}: its sequence classifier does not read one linear score off the language model's last hidden states, so no "
            "reward model can be saved; train one of another architecture (Llama, Qwen, Mistral, Gemma, GPT-2, ...)"
        )
    return classifier


def _padding(tokenizer: Any) -> int | None:
    """A token to pad with that no text ends in."""
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids)
    return next((i for i in candidates if i is not None and i != tokenizer.eos_token_id), None)
