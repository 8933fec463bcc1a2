"""The child process that runs reward functions: JSON lines in, JSON lines out, one call at a time.

Started by `crosstrain.rewards.child` as `python -m crosstrain.rewards.worker`. First line in: `{"functions": [{"spec", "config"}],
"memory": bytes or null}`; out: `{"ready": true}` or `{"error": "..."}`. Then, for each `{"function": i, "seconds": s, "columns":
{...}}`, out: `{"result": [number, null or {"bad": "..."}, ...]}`, `{"bad": "..."}` for a result that is no list, or `{"error":
"..."}` for an exception.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import numbers
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from crosstrain.errors import UserError
from crosstrain.rewards.load import find_function


def main() -> None:
    """Serve until the parent closes our standard input."""
    requests, answers = _private_pipes()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, lines), daemon=True).start()

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    start = json.loads(lines.get())
    _limit("RLIMIT_AS", start["memory"])
    sys.path.append(os.getcwd())  # last, so that no file of the user's hides a module of Python's
    try:
        functions = [find_function(f["spec"], f["config"]) for f in start["functions"]]
    except UserError as error:
        answer({"error": str(error)})
        return
    except (Exception, SystemExit) as error:
        answer({"error": f"reward {', '.join(f['spec'] for f in start['functions'])} cannot be loaded: {_explain(error)}"})
        return
    answer({"ready": True})
    while True:
        request = json.loads(lines.get())
        _limit_cpu(request["seconds"])
        answer(_call(functions[request["function"]], request["columns"]))


def _call(function: Callable[..., Any], columns: dict[str, Any]) -> dict[str, Any]:
    try:
        result = function(**columns)
        if inspect.isawaitable(result):
            result = asyncio.run(_wait(result))
        if hasattr(result, "tolist"):
            result = result.tolist()  # an array or a tensor
        if isinstance(result, str) or not isinstance(result, list | tuple):
            return {"bad": f"gave {_short(result)} instead of a list of scores"}
        return {"result": [_score(value) for value in result]}
    except (Exception, SystemExit) as error:
        return {"error": _explain(error)}


async def _wait(result: Any) -> Any:
    return await result


def _score(value: Any) -> float | dict[str, str] | None:
    if hasattr(value, "item"):
        value = value.item()
    if value is None:
        return None
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    return {"bad": _short(value)}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _explain(error: BaseException) -> str:
    """The exception and the last line of code it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _read(requests: TextIO, lines: queue.SimpleQueue[str]) -> None:
    """Hand on what the parent writes; when it closes the pipe or dies, end at once, even in the middle of a call."""
    for line in requests:
        lines.put(line)
    os._exit(0)


def _private_pipes() -> tuple[TextIO, TextIO]:
    """The pipes to the parent under new numbers, so that what rewards print or read cannot get between the messages.

    Standard output goes to standard error from here on, and standard input is empty.
    """
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def _limit(name: str, value: int | None) -> None:
    """Set a soft resource limit where the system has it."""
    try:
        import resource
    except ImportError:
        return  # Windows: the parent's time limit is what remains
    if value is None or (name == "RLIMIT_AS" and sys.platform != "linux"):
        return  # macOS refuses it
    if hasattr(resource, name):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _limit_cpu(seconds: float) -> None:
    """End a call that goes on computing after its parent could have killed it (a stopped parent cannot)."""
    used = math.ceil(sum(os.times()[:2]))
    _limit("RLIMIT_CPU", used + (math.ceil(seconds) + 5) * (os.cpu_count() or 1))


if __name__ == "__main__":
    main()
