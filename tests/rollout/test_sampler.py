"""What a sampler is asked and answers: validation, random numbers, counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from crosstrain.errors import UserError
from crosstrain.rollout.sampler import Completion, Prompt, Sampling, check_keys, uniforms, usage


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", 1e-7),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("max_completion_length", 0),
        ("max_completion_length", 1.5),
    ],
)
def test_a_bad_setting_is_named_with_what_it_got_and_what_is_allowed(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"sampling\.{field}: got {value!r}; it must be "):
        Sampling(**{field: value})


def test_the_edges_of_what_is_allowed_pass() -> None:
    Sampling(temperature=0, top_p=1, top_k=0, max_completion_length=1)
    Sampling(temperature=1e-6, top_p=1e-9, top_k=10**6)


def test_a_prompt_needs_tokens_and_a_completion_to_ask_for() -> None:
    with pytest.raises(UserError, match="no tokens"):
        Prompt((), 1, "a")
    with pytest.raises(UserError, match="n=0"):
        Prompt((1,), 0, "a")


def test_a_completion_has_a_log_prob_for_every_token() -> None:
    with pytest.raises(ValueError, match="2 tokens but 1 log-probs"):
        Completion((1, 2), (-0.5,), True)


def test_two_prompts_with_one_key_are_refused() -> None:
    check_keys([Prompt((1,), 1, "a"), Prompt((1,), 1, "b")])
    with pytest.raises(ValueError, match=r"repeated: \['a'\]"):
        check_keys([Prompt((1,), 1, "a"), Prompt((2,), 1, "a")])


def test_random_numbers_change_with_each_part_of_their_key_and_with_nothing_else() -> None:
    base = uniforms(0, 1, "key", 2, 50)
    assert np.array_equal(base, uniforms(0, 1, "key", 2, 50))
    assert np.array_equal(base[:7], uniforms(0, 1, "key", 2, 7))
    for other in (
        uniforms(1, 1, "key", 2, 50),
        uniforms(0, 2, "key", 2, 50),
        uniforms(0, 1, "kez", 2, 50),
        uniforms(0, 1, "key", 3, 50),
    ):
        assert not np.isin(other, base).any()
    # the parts are set apart: (1, 11) is not (11, 1)
    assert not np.array_equal(uniforms(1, 11, "k", 0, 5), uniforms(11, 1, "k", 0, 5))


def test_random_numbers_are_uniform_over_positions_and_over_keys() -> None:
    assert stats.kstest(uniforms(0, 0, "a", 0, 5000), "uniform").pvalue > 1e-3
    assert stats.kstest([float(uniforms(0, 0, str(i), 0, 1)[0]) for i in range(5000)], "uniform").pvalue > 1e-3


def test_usage_counts_each_prompt_once_and_every_completion() -> None:
    prompts = [Prompt((1, 2, 3), 2, "a"), Prompt((4,), 1, "b")]
    done = [[Completion((5, 6), (-1.0, -1.0), True), Completion((5,), (-1.0,), False)], [Completion((7,), (-1.0,), True)]]
    assert usage(prompts, done) == (4, 4)
