"""Rows to tokens, each tagged with who wrote it. The only place that renders chats.

What is trained comes from rendering: the text a chat template puts between its generation prompt and the end of the assistant's
turn. No marker in the template is needed. A prompt is tokenized as the sampler will see it, alone; the answer's tokens follow.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from crosstrain.data.rows import Row, Text
from crosstrain.errors import UserError, nearest
from crosstrain.types import Example, Source, Trajectory

BEHAVIOUR = "behaviour_logp"
"""The column with the log-prob of each token of a demonstration under the model that wrote it."""

Messages = Sequence[Mapping[str, Any]]
Piece = tuple[str, Source]
"""Text and who wrote it."""

ANSWERED = ("prompt_completion", "unpaired", "messages")
"""Kinds of row that bring one answer."""


def encode(
    row: Row,
    tokenizer: Any,
    *,
    id: str,
    max_prompt_length: int | None = None,
    max_length: int | None = None,
    system_prompt: str | None = None,
    contexts: Mapping[str, str] | None = None,
) -> Example:
    """The row, tokenized: its prompt and the trajectories it brings.

    A chat row is rendered with the model's own template. A plain-text prompt stays plain text (as in TRL), and a plain-text answer
    gets the end token. Trained are the assistant's words and the token that ends its turn; what a template adds around them is not.
    An answer that does not fit into max_length is cut and its trajectory marked unfinished. contexts: by name, texts in place
    of the prompt (of a chat's last user message), with `{prompt}`, `{completion}` and columns in braces. Raises UserError with
    file:row when the prompt is longer than max_prompt_length or a context than max_length, when nothing is left to train on, when
    the template cannot be split, or when the row lacks what a context names.
    """
    if system_prompt is not None:
        row = with_system(row, system_prompt)
    if row.kind == "messages":
        first = next((i for i, m in enumerate(row.messages) if m["role"] == "assistant"), None)
        if first is None:
            raise UserError(f"{row.where}: no assistant message, so no token would be supervised")
        pieces = chat_pieces(row.messages, 0, tokenizer, row)
        prompt: Text = row.messages[:first]
        prompt_tokens, answers = _tokens(tokenizer, pieces[:1], chat=True)[0], [(pieces, None)]
    else:
        prompt = row.prompt
        chat = not isinstance(prompt, str)
        prompt_text = _render(tokenizer, prompt, row, generate=True) if not isinstance(prompt, str) else prompt
        prompt_tokens = _ids(tokenizer, prompt_text, chat=chat)
        given = [(row.completion, None if row.label is None else float(row.label)), (row.chosen, 1.0), (row.rejected, 0.0)]
        answers = [(_answer_pieces(prompt, text, tokenizer, row), reward) for text, reward in given if text is not None]
    chat = not isinstance(prompt, str)
    told = row.kind in ANSWERED  # a row without an answer lacks more than this prompt, and is refused for that
    asked = {name: text for name, text in (contexts or {}).items() if told or "{completion}" not in text}
    written = {name: _context(name, text, prompt, tokenizer, row) for name, text in asked.items()}
    _check_lengths(row, prompt_tokens, written, max_prompt_length, max_length)
    expert = tuple(
        replace(_trajectory(tokenizer, pieces, reward, max_length, row, chat=chat), contexts=written)
        for pieces, reward in answers
    )
    if BEHAVIOUR in row.columns and len(expert) == 1:
        [(pieces, _)] = answers
        whole = _trajectory(tokenizer, pieces, None, None, row, chat=chat)
        expert = (replace(expert[0], behaviour_logp=_behaviour(row, whole)[: len(expert[0].tokens)]),)
    return Example(
        id=id,
        prompt=prompt,
        prompt_tokens=tuple(prompt_tokens),
        expert=expert,
        columns=dict(row.columns),
        where=row.where,
        contexts=written,
    )


def _context(name: str, text: str, prompt: Text, tokenizer: Any, row: Row) -> tuple[int, ...]:
    """The tokens of the prompt as `text` writes it."""
    if isinstance(prompt, str):
        return tuple(_ids(tokenizer, _filled(name, text, prompt, row), chat=False))
    asked = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=None)
    if asked is None:
        raise UserError(f"{row.where}: {name!r} writes the last user message otherwise, and the prompt has none")
    said = _filled(name, text, str(prompt[asked]["content"]), row)
    messages = [*prompt[:asked], {**prompt[asked], "content": said}, *prompt[asked + 1 :]]
    return tuple(_ids(tokenizer, _render(tokenizer, messages, row, generate=True), chat=True))


def _filled(name: str, text: str, prompt: str, row: Row) -> str:
    """`text` with the prompt, the row's columns and its completion in place of their names in braces."""
    known = {**row.columns, "prompt": prompt}
    if row.kind in ANSWERED:
        known["completion"] = _words(row)

    def value(found: re.Match[str]) -> str:
        if found[1] not in known:
            raise UserError(
                f"{row.where}: {name!r} wants {{{found[1]}}}, and the row has no such column; {nearest(found[1], known)}"
            )
        return str(known[found[1]])

    return re.sub(r"\{(\w+)\}", value, text)


def _words(row: Row) -> str:
    """What the row's answer says; of a longer conversation the first answer."""
    if isinstance(row.completion, str):
        return row.completion
    told = row.completion or [m for m in row.messages if m["role"] == "assistant"][:1]
    return "\n".join(str(m.get("content") or "") for m in told if m["role"] == "assistant")


def _check_lengths(
    row: Row,
    prompt: Sequence[int],
    contexts: Mapping[str, Sequence[int]],
    max_prompt_length: int | None,
    max_length: int | None,
) -> None:
    """UserError for a prompt longer than max_prompt_length, and for a context longer than max_length."""
    limited = [("prompt", prompt, "max_prompt_length", max_prompt_length)]
    limited += [(f"prompt as {name!r} writes it", tokens, "max_length", max_length) for name, tokens in contexts.items()]
    for what, tokens, key, limit in limited:
        if limit is not None and len(tokens) > limit:
            raise UserError(
                f"{row.where}: the {what} has {len(tokens)} tokens, more than {key} {limit}; shorten it, or raise the limit"
            )


def _behaviour(row: Row, demonstration: Trajectory) -> tuple[float, ...]:
    """The row's log-probs of its demonstration's tokens at their places, NaN elsewhere; UserError where they cannot be those."""
    given, n = row.columns[BEHAVIOUR], sum(s == Source.EXPERT for s in demonstration.source)
    numbers = isinstance(given, list | tuple) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in given)
    if not numbers or len(given) != n or not all(x <= 0 for x in given):
        got = f"{len(given)} entries" if isinstance(given, list | tuple) else type(given).__name__
        raise UserError(
            f"{row.where}: column '{BEHAVIOUR}' must have one log-prob, at most 0, for each of the {n} tokens that the "
            f"demonstration has here, its end token among them; got {got}"
        )
    values = iter(float(x) for x in given)
    return tuple(next(values) if s == Source.EXPERT else math.nan for s in demonstration.source)


def template_hash(tokenizer: Any) -> str:
    """sha256 of the chat template, or of nothing when there is none."""
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()


def chat_pieces(messages: Messages, start: int, tokenizer: Any, row: Row) -> list[Piece]:
    """A conversation as alternating PROMPT and EXPERT pieces; assistant messages before `start` belong to the prompt."""
    pieces: list[Piece] = []
    done = ""
    for i, message in enumerate(messages):
        if i < start or message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], row, generate=True)
        after = _render(tokenizer, messages[: i + 1], row, generate=False)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError(
                f"{row.where}: the chat template changes earlier text when message {i} is added (it may drop earlier thinking), so "
                "what was trained is not what will be seen; split the conversation into one row per assistant message"
            )
        added, words, end = _split_turn(after[len(before) :], message, tokenizer, row)
        pieces += [(before[len(done) :] + added, Source.PROMPT), (words + end, Source.EXPERT)]
        done = before + added + words + end
    return pieces


def _answer_pieces(prompt: Text, answer: Text, tokenizer: Any, row: Row) -> list[Piece]:
    if isinstance(prompt, str):
        assert isinstance(answer, str)
        return [(prompt, Source.PROMPT), (answer + tokenizer.eos_token, Source.EXPERT)]
    assert not isinstance(answer, str)
    if not any(m["role"] == "assistant" for m in answer):
        raise UserError(f"{row.where}: the answer has no assistant message, so no token would be supervised")
    return chat_pieces([*prompt, *answer], len(prompt), tokenizer, row)


def _split_turn(text: str, message: Mapping[str, Any], tokenizer: Any, row: Row) -> tuple[str, str, str]:
    """An assistant's turn as what the template puts before its words, the words, and the token that ends it.

    White space before the words, where a template's generation prompt ends without it, is theirs: it is part of the first token.
    A turn that calls tools is all words up to its last end token: how a call is written is the template's business, and to learn.
    """
    ends = _end_tokens(tokenizer)
    content = str(message.get("content") or "")
    if message.get("tool_calls"):
        at, end = max(((text.rfind(t), t) for t in ends), default=(-1, ""))
        if at > 0:
            return "", text[:at], end
    for words in dict.fromkeys((content, content.strip())):
        for found in re.finditer(re.escape(words), text) if words else ():
            rest = text[found.end() :]
            blank = rest[: len(rest) - len(rest.lstrip())]
            end = max((t for t in ends if rest.lstrip().startswith(t)), key=len, default="")
            added = text[: found.start()]
            if end and not added.strip():
                return "", added + words, blank + end  # the model has to write that space itself
            if end:
                return added, words, blank + end
    raise UserError(
        f"{row.where}: the chat template does not give the assistant's words followed by an end token; got {text[:120]!r}. "
        "Without an end token the model would never learn to stop"
    )


def _end_tokens(tokenizer: Any) -> set[str]:
    """The special tokens, one of which ends a turn; not the other added ones, such as Qwen's <tool_call>."""
    added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    return {t for t in (*tokenizer.all_special_tokens, *added) if t}


def _render(tokenizer: Any, messages: Messages, row: Row, *, generate: bool) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{row.where}: the row is a chat, and the model has no chat template; use plain text, or an instruct model"
        )
    tools = row.columns.get("tools")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=generate))
    except Exception as error:  # templates raise what they like, jinja2's TemplateError among others
        raise UserError(f"{row.where}: the chat template refuses the conversation: {error}") from error


def _trajectory(
    tokenizer: Any, pieces: Sequence[Piece], reward: float | None, max_length: int | None, row: Row, *, chat: bool
) -> Trajectory:
    parts = _tokens(tokenizer, pieces, chat=chat)
    tokens = [t for part in parts for t in part]
    source = [s for part, (_, s) in zip(parts, pieces, strict=True) for _ in part]
    finished = max_length is None or len(tokens) <= max_length
    tokens, source = tokens[:max_length], source[:max_length]
    if Source.EXPERT not in source:
        raise UserError(
            f"{row.where}: no supervised token is left within max_length {max_length}; shorten the prompt or raise it"
        )
    return Trajectory(tuple(tokens), tuple(source), reward=reward, finished=finished)


def _tokens(tokenizer: Any, pieces: Sequence[Piece], *, chat: bool) -> list[list[int]]:
    """Token ids of each piece: as one text where the pieces' ends are token ends, else piece by piece.

    Some tokenizers put a space before whatever text they are given; taking a piece's ids out of the whole text avoids it.
    """
    result: list[list[int]] = []
    ids: list[int] = []
    text = ""
    for piece, _ in pieces:
        whole = _ids(tokenizer, text + piece, chat=chat)
        new = whole[len(ids) :] if whole[: len(ids)] == ids else _ids(tokenizer, piece, chat=True)
        result.append(new)
        ids, text = ids + new, text + piece
    return result


def _ids(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    """Ids of a text; a chat template writes its own special tokens, plain text gets the tokenizer's (a leading BOS)."""
    if chat:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(text)["input_ids"])
    # a tokenizer that adds an end token to every text would end the prompt: only what comes before is wanted
    end = tokenizer.eos_token_id
    added = len(ids) > 1 and ids[-1] == end and (not text.endswith(tokenizer.eos_token) or ids[-2] == end)
    return ids[:-1] if added else ids


def with_system(row: Row, system_prompt: str) -> Row:
    """The row with that system message before its prompt, where it has none of its own."""

    def add(messages: Any) -> Any:
        if isinstance(messages, str):
            raise UserError(f"{row.where}: system_prompt needs chat messages, and this prompt is plain text")
        if messages and messages[0]["role"] == "system":
            return messages
        return ({"role": "system", "content": system_prompt}, *messages)

    return replace(row, messages=add(row.messages)) if row.kind == "messages" else replace(row, prompt=add(row.prompt))
