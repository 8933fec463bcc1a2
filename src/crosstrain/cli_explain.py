"""What `crosstrain explain` prints: the weight that a method gives to every token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from crosstrain.config.files import load, override
from crosstrain.explain import GivenBatch, explain
from crosstrain.methods import load_method

UP, DOWN = "green", "red"
AUTHORS = {"expert": "demonstrations", "policy": "own answers", "tool": "tools' words", "prompt": "the prompt"}


def explain_batch(name: str, batch: Path, overrides: Sequence[str], *, as_json: bool, console: Console | None = None) -> None:
    """Print what the method `name`, with settings `key=value`, makes of the batch in a JSON file."""
    method = load_method(name, **override({}, overrides))
    given = load(GivenBatch, batch)
    found = explain(method, given)
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False))
        return
    _show(found, given, console or Console())


def _show(found: Mapping[str, Any], given: GivenBatch, out: Console) -> None:
    settings = ", ".join(f"{k}={v}" for k, v in found["settings"].items())
    out.print(f"[bold]{found['method']}[/bold]  {settings}", highlight=False)
    for term in found["terms"]:
        out.print(
            f"term {term['name']}: loss {term['loss']:.4g} on {term['tokens']} tokens, divided by {term['denominator']:g}",
            highlight=False,
        )
    largest = max((abs(w) for g in found["groups"] for t in g["trajectories"] for w in t["weights"]), default=0.0)
    for i, (group, shown) in enumerate(zip(given.groups, found["groups"], strict=True)):
        out.print(f"group {group.id or i}" + ("" if shown["selected"] else ": dropped"), highlight=False)
        for k, (one, t) in enumerate(zip(group.trajectories, shown["trajectories"], strict=True)):
            line = Text(
                f"  {k}  reward {one.reward if one.reward is not None else '-'}  advantage {_advantage(shown['advantage'][k])}  "
            )
            line.append_text(
                _weights(one.source, t["weights"], largest) if t["selected"] else Text("not selected", style="dim")
            )
            out.print(line)
    out.print(_sentence(found, given), highlight=False)


def _advantage(value: Any) -> str:
    return "-" if value is None else "per token" if isinstance(value, list) else f"{value:.3g}"


def _weights(source: Sequence[str], weights: Sequence[float], largest: float) -> Text:
    """Each token's author and weight, the brighter the larger."""
    line = Text()
    for s, w in zip(source, weights, strict=True):
        if s == "prompt" and not w:
            line.append("· ", style="dim")
            continue
        strong = largest > 0 and abs(w) > 0.5 * largest
        style = "dim" if w == 0 else (("bold " if strong else "") + (UP if w > 0 else DOWN))
        line.append(f"{'·' if s == 'prompt' else s[0]}{w:+.3g} ", style=style)
    return line


def _sentence(found: Mapping[str, Any], given: GivenBatch) -> str:
    """In one sentence what the step would teach."""
    up: dict[str, float] = {}
    down: dict[str, float] = {}
    for group, shown in zip(given.groups, found["groups"], strict=True):
        for one, t in zip(group.trajectories, shown["trajectories"], strict=True):
            for s, w in zip(one.source, t["weights"], strict=True):
                side = up if w > 0 else down
                side[s] = side.get(s, 0.0) + abs(w)
    total = sum(up.values()) + sum(down.values())
    moved = [v for g in found["groups"] for t in g["trajectories"] for v in t.get("value_weights", ()) if v]
    up_at, down_at = sum(v > 0 for v in moved), sum(v < 0 for v in moved)
    about = f" The value head's output would rise at {up_at} tokens and fall at {down_at}." if moved else ""
    if not total:
        return f"This step would make no token more or less likely.{about}" if about else _nothing(found, given)

    def say(side: Mapping[str, float]) -> str:
        return " and ".join(f"{AUTHORS[s]} ({w / total:.0%} of all weight)" for s, w in side.items() if w)

    parts = [f"make {say(up)} more likely"] * any(up.values()) + [f"make {say(down)} less likely"] * any(down.values())
    return f"This step would {', and '.join(parts)}.{about}"


def _nothing(found: Mapping[str, Any], given: GivenBatch) -> str:
    """Why no token has a weight."""
    if not any(group["selected"] for group in found["groups"]):
        return f"This step would teach nothing: {found['method']} leaves out every group."
    if any(term["tokens"] for term in found["terms"]):
        return "This step would teach nothing: no token has a weight."
    has = {source for g in given.groups for t in g.trajectories for source in t.source} - {"prompt"}
    there = [name for source, name in AUTHORS.items() if source in has]
    return (
        f"This step would teach nothing: no term of {found['method']} is on what the batch has, which is {' and '.join(there)}; "
        f"`crosstrain methods show {found['method']}` says what they are on."
    )
