"""Replies side by side: the same questions, answered by every arm."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from crosstrain.studies.report_style import Style, arm_name
from crosstrain.studies.report_text import Results
from crosstrain.training.record import read_lines

QUESTIONS = 2
REPLIES = 2
LONGEST = 600

Key = tuple[str, str]


def read_samples(results: Results, folder: Path) -> dict[str, dict[Key, list[Mapping[str, Any]]]]:
    """The samples of each arm's first finished run, by (set, question)."""
    found: dict[str, dict[Key, list[Mapping[str, Any]]]] = {}
    for arm in results["arms"]:
        run = next((run for run in arm["runs"] if run["status"] == "finished" and run["evaluated"]), None)
        for line in read_lines(folder / run["folder"] / "samples.jsonl") if run else []:
            found.setdefault(arm["name"], {}).setdefault((line["set"], line["id"]), []).append(line)
    return found


def samples_section(results: Results, folder: Path, looks: Mapping[str, Style]) -> str:
    """The first questions of every set with each arm's first replies; chosen by position, not by how they turned out."""
    samples = read_samples(results, folder)
    keys = list(dict.fromkeys(key for asked in samples.values() for key in asked))
    if not keys:
        return '<p class="missing">No samples were recorded.</p>'
    chosen: list[Key] = []
    for name in dict.fromkeys(name for name, _ in keys):
        chosen += [key for key in keys if key[0] == name][:QUESTIONS]
    return "".join(_question(key, samples, looks, opened=i == 0) for i, key in enumerate(chosen))


def _question(
    key: Key, samples: Mapping[str, Mapping[Key, list[Mapping[str, Any]]]], looks: Mapping[str, Style], *, opened: bool
) -> str:
    prompt = next(asked[key][0]["prompt"] for asked in samples.values() if key in asked)
    cards = "".join(_card(name, asked[key], looks) for name, asked in samples.items() if key in asked)
    return (
        f'<details class="question"{" open" if opened else ""}><summary><span class="set">{escape(key[0])}</span> '
        f'{escape(_cut(prompt))}</summary><div class="cards">{cards}</div></details>'
    )


def _card(name: str, replies: list[Mapping[str, Any]], looks: Mapping[str, Style]) -> str:
    right = sum(r["correct"] >= 1 for r in replies)
    said = "".join(_reply(r) for r in replies[:REPLIES])
    return f'<div class="card">{arm_name(name, looks)}<small>{right} of {len(replies)} right</small>{said}</div>'


def _reply(reply: Mapping[str, Any]) -> str:
    kind, mark = ("right", "✓ right") if reply["correct"] >= 1 else ("wrong", "✗ wrong")
    return (
        f'<div class="reply {kind}"><span>{mark}</span><pre>{escape(_cut(reply["completion"])) or "<i>empty</i>"}</pre></div>'
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."
