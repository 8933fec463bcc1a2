"""What a model is found to be, and how often it is tried."""

from __future__ import annotations

from typing import Any

import torch

from crosstrain.architecture import found_once
from crosstrain.testing import tiny_model


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


def test_what_was_found_by_another_try_is_another_thing() -> None:
    model = tiny_model()
    assert [found_once(lambda m: "a", model), found_once(lambda m: "b", model)] == ["a", "b"]
