"""The other prompt that a teacher reads: the row's own, with its demonstration in the last user message."""

from __future__ import annotations

from typing import Any

import pytest

from crosstrain.data.chat import encode
from crosstrain.data.rows import parse_row
from crosstrain.errors import UserError
from crosstrain.testing import tiny_tokenizer

TEMPLATE = "{prompt}\n\nSomebody said: {privileged_context}"
SYSTEM = {"role": "system", "content": "be brief"}
ASKED = {"role": "user", "content": "2+2?"}
TOLD = {"role": "assistant", "content": "4"}


def shown(record: dict[str, Any], template: str = TEMPLATE, **settings: Any) -> str | None:
    """The rendered other prompt of a row; None where it has none."""
    tokenizer = tiny_tokenizer()
    example = encode(parse_row(record, "rows.jsonl:1"), tokenizer, id="train:0", contexts=[template], **settings)
    assert all(t.contexts == example.contexts for t in example.expert)
    tokens = example.contexts.get(template)
    return None if tokens is None else tokenizer.decode(tokens)


def chat(*messages: dict[str, str]) -> str:
    """As the tokenizer's template renders messages before an answer."""
    said = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return said + "<|im_start|>assistant\n"


WITH_BOTH = {"role": "user", "content": "2+2?\n\nSomebody said: 4"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [SYSTEM, ASKED], "completion": [TOLD]},
        {"messages": [SYSTEM, ASKED, TOLD]},
        {"messages": [SYSTEM, ASKED, TOLD, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]},
    ],
    ids=["prompt and completion", "messages", "of a longer conversation the first answer"],
)
def test_a_chat_is_rendered_with_the_models_template(record: dict[str, Any]) -> None:
    assert shown(record) == chat(SYSTEM, WITH_BOTH)


def test_a_system_prompt_and_earlier_turns_stay() -> None:
    earlier = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    record = {"prompt": [*earlier, ASKED], "completion": [TOLD]}
    assert shown(record, system_prompt="be brief") == chat(SYSTEM, *earlier, WITH_BOTH)


def test_plain_text_stays_plain_text() -> None:
    assert shown({"prompt": "2+2=", "completion": "4"}) == "2+2=\n\nSomebody said: 4"


def test_braces_are_text_wherever_they_are() -> None:
    """Also where a prompt contains what stands for the demonstration."""
    record = {"prompt": "{privileged_context} {x} {", "completion": "{prompt} {0}"}
    assert shown(record, "{{a} {prompt} / {privileged_context} {b}") == "{{a} {privileged_context} {x} { / {prompt} {0} {b}"


@pytest.mark.parametrize("record", [{"prompt": "2+2="}, {"prompt": "2+2=", "chosen": "4", "rejected": "5"}])
def test_a_row_without_a_demonstration_has_no_other_prompt(record: dict[str, Any]) -> None:
    assert shown(record) is None


def test_a_prompt_that_is_too_long_with_its_demonstration_or_ends_in_no_user_message_is_refused() -> None:
    record = {"prompt": "2+2=", "completion": "4"}
    assert shown(record, max_length=22) is not None
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: the prompt with the demonstration in it has 22 tokens, .* max_length 21"
    ):
        shown(record, max_length=21)
    with pytest.raises(UserError, match="shown in the last user message, and this prompt ends with a message of 'system'"):
        shown({"prompt": [SYSTEM], "completion": [TOLD]})
