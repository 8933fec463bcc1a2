"""What a model is found to be, and how often it is tried."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch

from crosstrain.architecture import found_once
from crosstrain.testing import tiny_model
from crosstrain.training.score import choose_layout


def test_a_model_is_tried_once_until_its_dtype_or_attention_changes() -> None:
    tried: list[torch.dtype] = []

    def find(model: Any) -> int:
        tried.append(next(model.parameters()).dtype)
        return len(tried)

    one, other = tiny_model(), tiny_model()
    assert [found_once(find, one), found_once(find, one), found_once(find, other)] == [1, 1, 2]
    assert found_once(find, one.to(torch.bfloat16)) == 3
    one.config._attn_implementation = "eager"
    assert [found_once(find, one), found_once(find, one), found_once(find, other)] == [4, 4, 2]


def test_a_hook_another_forward_or_a_changed_configuration_is_noticed() -> None:
    model = tiny_model()
    tried: list[int] = []

    def find(model: Any) -> int:
        tried.append(1)
        return len(tried)

    assert found_once(find, model) == 1
    hook = model.register_forward_hook(lambda module, args, output: output)
    assert found_once(find, model) == 2
    hook.remove()
    assert found_once(find, model) == 1
    model.config.sliding_window = 3
    assert found_once(find, model) == 3
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert [found_once(find, model), found_once(find, model)] == [4, 4]


def test_what_was_found_by_another_try_is_another_thing() -> None:
    model = tiny_model()
    assert [found_once(lambda m: "a", model), found_once(lambda m: "b", model)] == ["a", "b"]


def test_what_was_found_goes_with_the_model() -> None:
    model = tiny_model()
    found_once(choose_layout, model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
