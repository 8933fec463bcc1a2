"""A server's answers as demonstrations: asked for once, before training, and kept on disk (sequence-level distillation)."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from crosstrain.cache import cache_folder
from crosstrain.config import TextTeacherSpec
from crosstrain.data.chat import BEHAVIOUR
from crosstrain.data.filters import Filtered
from crosstrain.data.rows import Row, Text
from crosstrain.errors import UserError
from crosstrain.text_server import FAILED, Answer, complete
from crosstrain.training.display import Display
from crosstrain.training.record import append_lines, read_lines

ENDED = ("stop", "eos_token", "stop_sequence")
"""What servers call an answer that its author ended. Any other is left out: it would teach to stop where it was cut."""


@dataclass(frozen=True)
class Taught:
    """Rows with a teacher's answers.

    rows: a demonstration for every answer that was kept; one for every answer that is wanted, with words that stand for it, where
    some are not there. names: of each row, the index of its question, with the answer's number where it has several: 17, 17#2.
    kept: which answers were, and where those stand that were left out, by reason. file: where all are. waiting: how many requests
    would get those that are not there. prompt_tokens, completion_tokens: as the server counts.
    """

    rows: tuple[Row, ...]
    names: tuple[str, ...]
    file: Path
    kept: Filtered
    waiting: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class _Request:
    """One request; key: a hash of all that its answer depends on, and of which of `n` answers it asks for."""

    key: str
    where: str
    url: str
    body: dict[str, Any]


def question(row: Row, spec: TextTeacherSpec) -> Row:
    """The row's prompt alone, a conversation's up to its last answer, with the row's columns. UserError with file:row for a row
    that brings an answer, unless that is to be replaced, and for one that a server cannot be asked."""
    if row.kind in ("preference", "unpaired"):
        raise UserError(f"{row.where}: a {row.kind} row brings its answers; a `teacher` is for prompts, so use a file of those")
    if "tools" in row.columns:
        raise UserError(f"{row.where}: the row has tools, of which a text teacher is not told; leave the column out")
    prompt: Text = row.prompt
    told = row.completion is not None
    if row.kind == "messages":
        said = [i for i, message in enumerate(row.messages) if message["role"] != "assistant"]
        prompt = row.messages[: said[-1] + 1] if said else ()
        told = len(prompt) < len(row.messages)
        if not prompt:
            raise UserError(f"{row.where}: the conversation has no message to answer; it needs one that is not the assistant's")
    if told and not spec.replace:
        raise UserError(
            f"{row.where}: the row brings an answer, which the `teacher` would replace; set `replace: true` for that, or leave the "
            "answer or the `teacher` out"
        )
    columns = {name: value for name, value in row.columns.items() if name != BEHAVIOUR}  # it was of the answer
    return replace(row, kind="prompt", prompt=prompt, completion=None, messages=(), columns=columns)


def teach(key: str, questions: Sequence[Row], spec: TextTeacherSpec, *, ask: bool) -> Taught:
    """The questions with the teacher's answers, whatever order these came in; those that end in no end of their own left out.

    key: what the recipe calls the teacher. Answers are read from the cache, and what is not there is asked for and kept as it comes
    in; unless `ask` is false, and words as long as the longest answer stand for all. Raises UserError that names row and address
    when a request fails for good, when the key's variable is not set, and when no answer is left.
    """
    requests = [_request(row, k, spec) for row in questions for k in range(spec.n)]
    asked = [row for row in questions for _ in range(spec.n)]
    names = [f"{i}{_number(k, spec)}" for i in range(len(questions)) for k in range(spec.n)]
    file = cache_folder() / "answers" / f"{_hash(_settings(spec))}.jsonl"
    known = _known(file)
    waiting = len({one.key for one in requests} - known.keys())
    if waiting:
        secret = _secret(key, spec)
        if not ask:
            words = " ".join(["answer"] * spec.max_completion_length)
            rows = tuple(map(_answered, asked, requests, [words] * len(asked)))
            return Taught(rows, tuple(names), file, Filtered(()), waiting)
        known = _fill(key, requests, spec, secret, file)
    answers = [known[one.key] for one in requests]
    reasons = [_reason(one) for one in answers]
    kept = [i for i, reason in enumerate(reasons) if not reason]
    dropped = {
        reason: tuple(one.where for one, why in zip(requests, reasons, strict=True) if why == reason)
        for reason in sorted(set(reasons))
        if reason
    }
    result = Filtered(tuple(kept), dropped)
    if not kept:
        raise UserError(f"{key} leaves no row: it {result}; see {file}, and raise `max_completion_length` if answers are cut")
    paid = {one.key: known[one.key] for one in requests}.values()
    return Taught(
        tuple(_answered(asked[i], requests[i], answers[i].text) for i in kept),
        tuple(names[i] for i in kept),
        file,
        result,
        prompt_tokens=sum(one.prompt_tokens for one in paid),
        completion_tokens=sum(one.completion_tokens for one in paid),
    )


def _request(row: Row, sample: int, spec: TextTeacherSpec) -> _Request:
    plain = isinstance(row.prompt, str)
    url = f"{spec.base_url}/completions" if plain else f"{spec.base_url}/chat/completions"
    body = {"prompt": row.prompt} if plain else {"messages": list(row.prompt)}
    body |= {name: value for name, value in _settings(spec)["body"].items() if value is not None}
    if sample and isinstance(body.get("seed"), int):  # one seed would give n copies of one answer
        body["seed"] += sample
    return _Request(_hash([url, body, sample]), f"{row.where}{_number(sample, spec)}", url, body)


def _number(sample: int, spec: TextTeacherSpec) -> str:
    """What tells a row's answers apart; nothing where there is one."""
    return "" if spec.n == 1 else f"#{sample + 1}"


def _settings(spec: TextTeacherSpec) -> dict[str, Any]:
    """What answers depend on beside the prompt."""
    body = {"model": spec.model, "temperature": spec.temperature, "max_tokens": spec.max_completion_length}
    body |= {"top_p": spec.top_p} if spec.top_p < 1 else {}
    return {"base_url": spec.base_url, "body": {**body, **spec.extra_body}}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _reason(answer: Answer) -> str:
    """Why an answer is left out; nothing for one that is kept."""
    if answer.finish_reason not in ENDED:
        return str(answer.finish_reason)
    return "" if answer.text.strip() else "empty"


def _answered(row: Row, request: _Request, text: str) -> Row:
    completion: Text = text if isinstance(row.prompt, str) else ({"role": "assistant", "content": text},)
    return replace(row, kind="prompt_completion", completion=completion, where=request.where)


def _secret(key: str, spec: TextTeacherSpec) -> str:
    """The server's key, which is never shown or written; nothing where none is named."""
    if spec.api_key_env is None:
        return ""
    found = os.environ.get(spec.api_key_env, "").strip()
    if not found or not (found.isascii() and found.isprintable()):
        what = "holds no key" if found else "is not set"
        raise UserError(f"{key}.api_key_env: the environment variable {spec.api_key_env} {what}; export it, and start again")
    return found


def _known(file: Path) -> dict[str, Answer]:
    """The answers of a file, by key; those that a server gave up, which earlier versions kept, are not there yet."""
    found = {line["key"]: Answer(**line["answer"]) for line in read_lines(file)}
    return {key: answer for key, answer in found.items() if answer.finish_reason not in FAILED}


def _fill(key: str, requests: Sequence[_Request], spec: TextTeacherSpec, secret: str, file: Path) -> dict[str, Answer]:
    """Ask for what the file lacks, and add it there as it comes in; all of the file's answers. A second process waits meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        _cut_torn_line(file)
        known = _known(file)
        missing = list({one.key: one for one in requests if one.key not in known}.values())
        display = Display()
        display.say(f"{key}: asking {spec.model} at {spec.base_url} for {len(missing)} answers, kept in {file}")
        display.start(f"{spec.model}'s answers")

        def ask(one: _Request, wait: Callable[[float], bool]) -> Answer:
            return complete(one.url, one.body, key=secret, timeout_s=spec.timeout_s, retries=spec.retries, wait=wait)

        try:
            for done, (one, answer) in enumerate(_in_threads(ask, missing, spec.concurrency), start=1):
                append_lines(file, [{"key": one.key, "where": one.where, "request": one.body, "answer": asdict(answer)}])
                known[one.key] = answer
                display.step(done / len(missing), {})
        finally:
            display.finish()
    return known


def _cut_torn_line(file: Path) -> None:
    """Take away the end of a file whose last line a kill cut short, so that the next does not join it."""
    if file.is_file():
        content = file.read_bytes()
        os.truncate(file, content.rfind(b"\n") + 1)


def _in_threads(
    ask: Callable[[_Request, Callable[[float], bool]], Answer], requests: Sequence[_Request], workers: int
) -> Iterator[tuple[_Request, Answer]]:
    """Every request with its answer, as they come in, `workers` under way at a time.

    After a failure no more are begun; what is under way still comes in, since it is paid for, and then the failure is raised, with
    its row. The threads end with the process, so that an interrupt waits for no server.
    """
    todo: queue.SimpleQueue[_Request] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[_Request, Answer | Exception] | None] = queue.SimpleQueue()
    stop = threading.Event()
    for one in requests:
        todo.put(one)

    def work() -> None:
        while not stop.is_set():
            try:
                one = todo.get_nowait()
            except queue.Empty:
                break
            try:
                done.put((one, ask(one, stop.wait)))
            except Exception as error:
                stop.set()
                done.put((one, error))
        done.put(None)

    running = min(workers, len(requests))
    for _ in range(running):
        threading.Thread(target=work, daemon=True).start()
    failures: list[tuple[_Request, Exception]] = []
    try:
        while running:
            found = done.get()
            if found is None:
                running -= 1
            elif isinstance(found[1], Exception):
                failures.append((found[0], found[1]))
            else:
                yield found[0], found[1]
    finally:
        stop.set()
    for one, error in failures[:1]:
        if not isinstance(error, UserError):
            raise error
        raise UserError(f"{one.where}: {error}. Answers that came in are kept: the same command goes on from there") from error
