"""What is trained of a row is the assistant's text and its end token, whatever the chat template."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from templates import FAMILIES, tokenizer_of

from crosstrain.data.chat import encode, template_hash
from crosstrain.data.rows import Row, parse_row
from crosstrain.errors import UserError
from crosstrain.testing import tiny_tokenizer
from crosstrain.types import Example, Source, Trajectory

tokenizers = cache(tokenizer_of)

# anything but the templates' own markers, which no honest text contains; the prefix makes it visible text
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>[]"), max_size=30).map(lambda t: "x" + t)
families = st.sampled_from(sorted(FAMILIES))


def expert_text(tokenizer: Any, trajectory: Trajectory) -> str:
    tokens = [t for t, s in zip(trajectory.tokens, trajectory.source, strict=True) if s == Source.EXPERT]
    return str(tokenizer.decode(tokens))


def whole_text(tokenizer: Any, trajectory: Trajectory) -> str:
    return str(tokenizer.decode(list(trajectory.tokens)))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def encoded(record: dict[str, Any], tokenizer: Any, **limits: Any) -> Example:
    return encode(parse_row(record, "rows.jsonl:1"), tokenizer, id="train:0", **limits)


@given(families, texts, texts)
def test_the_mask_of_an_answer_is_its_text_and_end_token(family: str, question: str, answer: str) -> None:
    tokenizer, kind = tokenizers(family), FAMILIES[family]
    example = encoded({"prompt": [user(question)], "completion": [assistant(answer)]}, tokenizer)
    assert expert_text(tokenizer, example.expert[0]) == kind.answer(answer)
    assert example.expert[0].finished


@given(families, texts, texts)
def test_a_prompt_is_what_the_model_sees_when_it_answers(family: str, question: str, answer: str) -> None:
    tokenizer = tokenizers(family)
    prompt = [user(question)]
    example = encoded({"prompt": prompt, "completion": [assistant(answer)]}, tokenizer)
    seen = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert list(example.prompt_tokens) == seen
    assert list(example.expert[0].tokens[: len(seen)]) == seen
    assert all(s == Source.PROMPT for s in example.expert[0].source[: len(seen)])


@given(st.sampled_from(sorted(set(FAMILIES) - {"thinking"})), st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_every_assistant_turn_of_a_conversation_is_trained(family: str, turns: list[tuple[str, str]]) -> None:
    tokenizer, kind = tokenizers(family), FAMILIES[family]
    messages = [message for question, answer in turns for message in (user(question), assistant(answer))]
    example = encoded({"messages": messages}, tokenizer)
    assert expert_text(tokenizer, example.expert[0]) == "".join(kind.answer(answer) for _, answer in turns)
    assert example.prompt == (messages[0],)
    # nothing is lost or made up: all tokens together are the rendered conversation, less what follows the last end token
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.rstrip("\n") == whole_text(tokenizer, example.expert[0])


@given(families, texts, texts, texts)
def test_both_answers_of_a_pair_follow_the_same_prompt(family: str, question: str, good: str, bad: str) -> None:
    tokenizer, kind = tokenizers(family), FAMILIES[family]
    example = encode(
        Row("preference", (user(question),), chosen=(assistant(good),), rejected=(assistant(bad),), where="rows.jsonl:1"),
        tokenizer,
        id="train:0",
    )
    assert [t.reward for t in example.expert] == [1.0, 0.0]
    for trajectory, answer in zip(example.expert, (good, bad), strict=True):
        assert expert_text(tokenizer, trajectory) == kind.answer(answer)
        assert trajectory.tokens[: len(example.prompt_tokens)] == example.prompt_tokens


def test_what_a_template_adds_before_the_words_is_prompt() -> None:
    tokenizer = tokenizers("thinking")
    [trajectory] = encoded({"prompt": [user("2+2?")], "completion": [assistant("think 4")]}, tokenizer).expert
    assert whole_text(tokenizer, trajectory).endswith("<think>\n\n</think>\n\nthink 4<|im_end|>")
    assert expert_text(tokenizer, trajectory) == "think 4<|im_end|>"


def test_a_tool_call_is_trained_as_the_template_writes_it() -> None:
    tokenizer = tokenizers("thinking")
    calls = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    answer = assistant("<think>hm</think>I look.", tool_calls=calls)
    [trajectory] = encoded({"prompt": [user("2+2?")], "completion": [answer]}, tokenizer).expert
    assert expert_text(tokenizer, trajectory) == "<think>hm</think>I look.\n<tool_call>look</tool_call><|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: the chat template changes earlier text .* one row per assistant message"
    ):
        encoded({"messages": messages}, tokenizers("thinking"))


def test_a_template_without_an_end_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(UserError, match="would never learn to stop"):
        encoded({"prompt": [user("a")], "completion": [assistant("b")]}, tokenizer)


def test_a_template_that_refuses_a_role_is_a_user_error() -> None:
    row = {"prompt": [{"role": "system", "content": "be brief"}, user("a")], "completion": [assistant("b")]}
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: the chat template refuses the conversation: System role not supported"
    ):
        encoded(row, tokenizers("gemma"))


def test_a_chat_needs_a_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        encoded({"prompt": [user("a")]}, tokenizer)


def test_plain_text_stays_plain_and_ends_in_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    example = encoded({"prompt": "2+2=", "completion": "4"}, tokenizer)
    assert whole_text(tokenizer, example.expert[0]) == "2+2=4<|im_end|>"
    assert expert_text(tokenizer, example.expert[0]) == "4<|im_end|>"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip))
def test_tokenizers_that_add_tokens_or_spaces_of_their_own(answer: str) -> None:
    """A leading BOS and a trailing EOS, as sentencepiece models add: the BOS stays in the prompt, no EOS ends it."""
    tokenizer = sentencepiece_like()
    example = encoded({"prompt": "2 + 2 =", "completion": answer}, tokenizer)
    assert example.prompt_tokens[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in example.prompt_tokens
    tokens = list(example.expert[0].response)
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.bos_token_id not in tokens
    assert tokens.count(tokenizer.eos_token_id) == 1


@cache
def sentencepiece_like() -> Any:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    bos, eos = "<|im_start|>", "<|im_end|>"
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (bos, eos)]
    )
    return tokenizer


def test_only_new_messages_of_a_completion_are_trained() -> None:
    tokenizer = tokenizers("smollm2")
    record = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d"), user("e"), assistant("f")]}
    [trajectory] = encoded(record, tokenizer).expert
    assert expert_text(tokenizer, trajectory) == "d<|im_end|>f<|im_end|>"


def test_limits() -> None:
    tokenizer = tiny_tokenizer()
    record = {"prompt": "a" * 10, "completion": "b" * 10}
    assert encoded(record, tokenizer, max_length=21).expert[0].finished
    cut = encoded(record, tokenizer, max_length=15).expert[0]
    assert (len(cut.tokens), cut.finished, cut.tokens[-1] == tokenizer.eos_token_id) == (15, False, False)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: no supervised token is left within max_length 10"):
        encoded(record, tokenizer, max_length=10)
    assert len(encoded(record, tokenizer, max_prompt_length=10).prompt_tokens) == 10
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the prompt has 10 tokens, more than max_prompt_length 9"):
        encoded(record, tokenizer, max_prompt_length=9)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [user("a")]}, "no assistant message, so no token would be supervised"),
        ({"prompt": [user("a")], "completion": [user("b")]}, "the answer has no assistant message"),
    ],
)
def test_rows_without_a_supervised_token_are_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: {message}"):
        encoded(record, tiny_tokenizer())


def test_a_system_prompt_is_put_where_there_is_none() -> None:
    tokenizer = tokenizers("smollm2")
    own = [{"role": "system", "content": "mine"}, user("a")]
    added = encode(parse_row({"prompt": [user("a")]}, "r:1"), tokenizer, id="x", system_prompt="be brief")
    kept = encode(parse_row({"prompt": own}, "r:1"), tokenizer, id="x", system_prompt="be brief")
    assert [m["content"] for m in added.prompt if not isinstance(m, str)] == ["be brief", "a"]
    assert [m["content"] for m in kept.prompt if not isinstance(m, str)] == ["mine", "a"]
    with pytest.raises(UserError, match="system_prompt needs chat messages"):
        encode(parse_row({"prompt": "a"}, "r:1"), tokenizer, id="x", system_prompt="be brief")


def test_the_template_hash_tells_templates_apart() -> None:
    hashes = {template_hash(tokenizers(name)) for name in FAMILIES}
    assert len(hashes) == len(FAMILIES)


@pytest.mark.real_model
@given(texts, texts)
def test_the_real_models_own_template(question: str, answer: str) -> None:
    tokenizer = real_tokenizer()
    assume(tokenizer.decode(tokenizer(answer)["input_ids"]) == answer)  # its vocabulary lacks the bytes of some rare characters
    example = encoded({"prompt": [user(question)], "completion": [assistant(answer)]}, tokenizer)
    assert expert_text(tokenizer, example.expert[0]) == answer + "<|im_end|>"
    fixture = tokenizers("smollm2").apply_chat_template([user(question)], tokenize=False, add_generation_prompt=True)
    assert fixture == tokenizer.apply_chat_template([user(question)], tokenize=False, add_generation_prompt=True)


@cache
def real_tokenizer() -> Any:
    from crosstrain.models import load_tokenizer

    return load_tokenizer("smollm2-135m-instruct")
