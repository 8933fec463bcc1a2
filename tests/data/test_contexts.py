"""A prompt written otherwise for a method's own use: what goes into the braces, how it is rendered, and what is wrong with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from crosstrain import assemble
from crosstrain.config import Recipe, parse
from crosstrain.data import encode
from crosstrain.data.rows import parse_row
from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.testing import tiny_tokenizer

HINT = {"hint": "{prompt} ({answer})"}


def rendered(record: dict[str, Any], contexts: dict[str, str], **limits: Any) -> tuple[str, str]:
    """The prompt and the context, as text."""
    tokenizer = tiny_tokenizer()
    example = encode(parse_row(record, "rows.jsonl:1"), tokenizer, id="train:0", contexts=contexts, **limits)
    assert example.contexts.keys() == contexts.keys()
    return tokenizer.decode(example.prompt_tokens), tokenizer.decode(example.contexts["hint"])


def test_a_plain_prompt_stays_plain() -> None:
    assert rendered({"prompt": "2+2=", "answer": 4}, HINT) == ("2+2=", "2+2= (4)")
    assert rendered({"prompt": "2+2=", "completion": "four"}, {"hint": "{completion} <- {prompt}"})[1] == "four <- 2+2="
    assert rendered({"prompt": "{answer}", "answer": "4"}, HINT)[1] == "{answer} (4)", "what is put in is not filled in again"


def test_of_a_chat_the_last_user_message_is_written_otherwise() -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "2+2"},
    ]
    plain, hinted = rendered({"prompt": turns, "answer": "4"}, HINT)
    assert hinted == plain.replace("user\n2+2<", "user\n2+2 (4)<") != plain
    assert hinted.endswith("<|im_start|>assistant\n")
    messages = [*turns, {"role": "assistant", "content": "four"}]
    assert (
        rendered({"messages": messages[3:], "answer": "4"}, HINT)[1]
        == "<|im_start|>user\n2+2 (4)<|im_end|>\n<|im_start|>assistant\n"
    )
    answered = {"prompt": turns[3:], "completion": [{"role": "assistant", "content": "four"}]}
    assert "2+2, four<" in rendered(answered, {"hint": "{prompt}, {completion}"})[1]


def test_what_cannot_be_written_is_an_error_with_its_row() -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:1: 'hint' wants \{answer\}, and the row has no such column; .*'answers'"):
        rendered({"prompt": "2+2=", "answers": "4"}, HINT)
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: 'hint' writes the last user message otherwise, and the prompt has none"
    ):
        rendered({"prompt": [{"role": "system", "content": "speak"}], "answer": "4"}, HINT)
    with pytest.raises(UserError, match="the prompt as 'hint' writes it has 8 tokens, more than max_length 7"):
        rendered({"prompt": "2+2=", "answer": "4"}, HINT, max_prompt_length=6, max_length=7)


def test_of_a_longer_conversation_the_first_answer_is_shown() -> None:
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    shown = rendered({"messages": turns}, {"hint": "{prompt} Somebody said: {completion}"})[1]
    assert shown == "<|im_start|>user\n2+2? Somebody said: 4<|im_end|>\n<|im_start|>assistant\n"


def test_every_trajectory_of_a_row_knows_its_contexts() -> None:
    row = parse_row({"prompt": "2+2=", "chosen": "4", "rejected": "5", "answer": "4"}, "rows.jsonl:1")
    example = encode(row, tiny_tokenizer(), id="train:0", contexts=HINT)
    assert [t.contexts for t in example.expert] == [example.contexts] * 2


def test_only_the_streams_that_a_method_draws_from_are_written_and_stages_agree() -> None:
    rows = [{"prompt": "2+2=", "answer": "4"}]
    stage = {"method": "star", "max_steps": 1, "learning_rate": 1e-5}
    recipe = parse(Recipe, {"data": {"train": rows, "other": [{"prompt": "3+3="}]}, "stages": [stage]})
    star, sft = load_method("star", hint=HINT["hint"]), load_method("sft")
    loaded = assemble.load_streams(recipe, tiny_tokenizer(), None, [sft, star])
    assert [list(loaded.streams[name].examples[0].contexts) for name in ("train", "other")] == [["hint"], []]
    assert assemble.load_streams(recipe, tiny_tokenizer(), None, [star, star]).streams.keys() == {"train", "other"}
    other = replace(star, contexts={"hint": "{prompt}: {answer}"})
    with pytest.raises(UserError, match=r"stages want 'hint' of 'train' both as .* and as .*; give them the same"):
        assemble.load_streams(recipe, tiny_tokenizer(), None, [star, other])
