"""One answer from a server that speaks OpenAI's protocol; its text is all it gives."""

from __future__ import annotations

import json
import random
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from crosstrain import __version__
from crosstrain.errors import UserError

BACKOFF_S = 1.0
"""About how long the first wait before another try is; each further one is twice as long."""

MOST_S = 60.0
"""No wait is longer, whatever a server asks for."""

FAILED = (None, "abort", "error")
"""Ends that are no end: the server gave up, or does not say. Such an answer is asked for again, as after a refusal."""

SHOWN = 200
"""Characters of what a server said that a message shows."""


@dataclass(frozen=True)
class Answer:
    """What a server said, why it stopped there, in its words, and how many tokens it counts (0 where it does not say)."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class _Reply:
    status: int
    content: bytes
    retry_after: str = ""
    location: str = ""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Redirects are not followed: prompts and the key are for the address that the recipe names."""

    def redirect_request(self, *given: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)


def complete(
    url: str, body: Mapping[str, Any], *, key: str, timeout_s: float, retries: int, wait: Callable[[float], bool]
) -> Answer:
    """The answer to a request `body` at `url`, which ends in /chat/completions or /completions.

    Tried again after 408, 429, 5xx, silence, failed connections and answers that the server gave up, when `wait` has waited so many
    seconds; it says whether to give up instead. key: sent as a bearer token unless empty, and never shown. Raises UserError that
    says what the server did, and what to do.
    """
    for tries in range(1, retries + 2):
        try:
            reply = _post(url, body, key, timeout_s)
        except (OSError, HTTPException) as error:
            again, after, problem = True, "", _silence(error, timeout_s)
        else:
            found = _answer(reply.content, url, key) if reply.status == 200 else None
            if found is not None and found.finish_reason not in FAILED:
                return found
            again = found is not None or reply.status in (408, 429) or reply.status >= 500
            after, problem = reply.retry_after, _problem(reply, url, key) if found is None else _given_up(found)
        if not again or tries > retries or wait(_pause(tries, after)):
            break
    raise UserError(f"{url}{f' (tried {tries} times)' if tries > 1 else ''} {problem}")


def _post(url: str, body: Mapping[str, Any], key: str, timeout_s: float) -> _Reply:
    headers = {"Content-Type": "application/json", "User-Agent": f"crosstrain/{__version__}"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            return _Reply(response.status, response.read())
    except urllib.error.HTTPError as error:
        with error:
            found = error.headers
            return _Reply(error.code, error.read(), found.get("Retry-After", ""), found.get("Location", ""))


def _pause(tries: int, retry_after: str) -> float:
    """Seconds before the next try: what the server asks for, else twice as many each time, less a random part."""
    if retry_after.isdecimal():
        return min(float(retry_after), MOST_S)
    return float(min(BACKOFF_S * 2 ** (tries - 1), MOST_S)) * random.uniform(0.5, 1.0)


def _answer(content: bytes, url: str, key: str) -> Answer:
    try:
        found = json.loads(content)
        choice, usage = found["choices"][0], found.get("usage") or {}
        text = (choice["message"]["content"] if "message" in choice else choice["text"]) or ""
        reason = choice.get("finish_reason")
        counted = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        if not isinstance(text, str) or not isinstance(reason, str | None):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{url} gave {_said(content, key)!r}, which is no completion in OpenAI's protocol; `base_url` must be the address of a "
            "server that speaks it"
        ) from error
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is JSON, and no text
    return Answer(text, reason, *(n if isinstance(n, int) else 0 for n in counted))


def _problem(reply: _Reply, url: str, key: str) -> str:
    """What a refusal says, and what to do."""
    if 300 <= reply.status < 400:
        return (
            f"sends on to {reply.location[:SHOWN]!r}, which is not followed; if you trust it, name that address in `base_url`"
        )
    plain = not url.endswith("/chat/completions")
    if reply.status in (401, 403):
        do = (
            "check the key in the variable that `api_key_env` names"
            if key
            else "name a variable that holds a key as `api_key_env`"
        )
    elif reply.status in (404, 405):
        do = "check `model`, and how `base_url` ends (mostly in /v1)"
        do += "; a server that only chats needs prompts that are chat messages" if plain else ""
    elif reply.status in (408, 429) or reply.status >= 500:
        do = "try again later, or with a lower `concurrency`"
    else:
        do = "change what it does not take: a prompt that is too long, or a setting that it does not know (see `extra_body`)"
    return f"answered {reply.status} ({_said(reply.content, key)}); {do}"


def _given_up(answer: Answer) -> str:
    """What an answer that its server did not end says, and what to do."""
    if answer.finish_reason is None:
        return "does not say why its answer ends (`finish_reason`), so it may be cut; use a server that says it"
    return f"gave up its answer (finish_reason {answer.finish_reason!r}); look at its log, or lower `concurrency`"


def _silence(error: Exception, timeout_s: float) -> str:
    """Why there was no reply, and what to do."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"did not answer within {timeout_s:g} s; raise `timeout_s`, or lower `max_completion_length` or `concurrency`"
    return f"gives no reply ({type(cause).__name__}: {cause}); start the server, or correct `base_url`"


def _said(content: bytes, key: str) -> str:
    """The start of a server's words in one line; its error message where it sent one, and never the key."""
    text = content.decode("utf-8", "replace")
    try:
        told = json.loads(text)["error"]
        text = str(told["message"] if isinstance(told, dict) else told)
    except (ValueError, KeyError, TypeError):
        pass
    text = text.replace(key, "***") if key else text
    return " ".join(text.split())[:SHOWN] or "no words"
