"""Tables of `crosstrain methods`: what exists, and one method's objective, terms and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from crosstrain.data.catalogue import DATA_METHODS
from crosstrain.methods import METHODS
from crosstrain.methods.describe import record
from crosstrain.methods.registry import DIRECTIONS

WIDE = 150
"""Columns from which on a terminal is shown everything in one table."""

TESTS = "tests/methods/"
"""Where proofs are, left out where they are shown."""


def print_all(console: Console | None = None, *, as_json: bool = False) -> None:
    """Print one line per method, by family, as the survey's Table 1 has them, and what can be done to data; or the records of all
    as JSON, under `methods` and `data`."""
    records = [record(name) for name in METHODS]
    if as_json:
        print(json.dumps({"methods": records, "data": [one.record for one in DATA_METHODS]}, indent=1))
        return
    out = console or Console()
    if out.width >= WIDE:
        out.print(_everything(records), _data_table())
        return
    for family, found in _families(records).items():
        directions = " or ".join(d for d in dict.fromkeys(r["direction"] for r in found) if d != family)
        out.print(Text.assemble((family, "bold"), f"  {directions}"))
        out.print(_narrow(found))
    out.print(Text.assemble(("for any method", "bold"), "  settings of data.STREAM in a recipe"))
    out.print(_narrow_data_table())


def _families(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The records by family, in the survey's order."""
    families = {family: [r for r in records if r["family"] == family] for family in DIRECTIONS}
    return {family: found for family, found in families.items() if found}


def _everything(records: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        Column("method", no_wrap=True),
        Column("direction", no_wrap=True),
        Column("data", max_width=9),
        Column("needs", max_width=16),
        "year",
        "written from",
        "what it does",
    )
    for found in _families(records).values():
        table.add_section()
        for r in found:
            row = (r["direction"], r["data"], _needs(r), str(r["year"]), r["checked"], r["summary"])
            table.add_row(_named(r), *(Text(cell) for cell in row))
    return table


def _data_table() -> Table:
    """What a recipe can do to its data, with any method."""
    keys = Column("setting of data.STREAM", no_wrap=True)
    table = Table(
        "data", keys, Column("paper", no_wrap=True), "year", "what it does", title="for any method", title_justify="left"
    )
    for one in DATA_METHODS:
        table.add_row(one.name, one.key.replace("[", "\\["), one.paper, str(one.year or ""), one.does)
    return table


def _narrow(records: Sequence[Mapping[str, Any]]) -> Table:
    """Of each method its paper, its needs, and what it does."""
    width = max(len(text) for name, entry in METHODS.items() for text in (name, entry.paper))
    needs = Column("needs", width=len("reference model,"))
    table = Table(Column("method", width=width), needs, "what it does", box=box.SIMPLE_HEAD, pad_edge=False)
    for r in records:
        table.add_row(_named(r), Text(_needs(r)), Text(r["summary"]))
    return table


def _narrow_data_table() -> Table:
    """What a recipe can do to its data: each with its paper, the setting, and what it does."""
    table = Table(Column("data", no_wrap=True), "setting, and what it does", box=box.SIMPLE_HEAD, pad_edge=False)
    for one in DATA_METHODS:
        table.add_row(Text.assemble(one.name, "\n", (one.paper, "dim")), Text(f"{one.key}\n{one.does}"))
    return table


def _named(found: Mapping[str, Any]) -> Text:
    """A method's name, and its paper below it."""
    return Text.assemble(found["name"], "\n", (found["paper"], "dim"))


def _needs(found: Mapping[str, Any]) -> str:
    return ", ".join(found["needs"]) or "nothing"


def print_one(name: str, console: Console | None = None, *, as_json: bool = False) -> None:
    """Print a method's objective, terms and settings and what is known of it, or its record as JSON; UserError for an unknown name,
    with the nearest one."""
    found = record(name)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    out = console or Console()
    out.print(Text.assemble((name, "bold"), f"  {found['paper'] or ''}  {found['data']}; needs {_needs(found)}"))
    if found["checked"]:
        kind = ", ".join(dict.fromkeys((found["family"], found["direction"])))
        out.print(Text(f"{kind}; written from: {found['checked']}"))
    out.print(Text(found["summary"]))
    for text in found["idea"]:
        out.print(Text(text))
    for title, text in (("loss", found["loss"]), ("weight of a token", found["weight"])):
        if text:
            _say(out, title, text)
    _terms(out, found["terms"])
    _settings(out, found)
    for text in found["notes"]:
        out.print(Padding(Text(text), (1, 0, 0, 0)))
    for title, key in (("helps", "works"), ("does not help", "fails"), ("differs from its source", "deviates")):
        if found[key]:
            _say(out, title, found[key])
    _proofs(out, found)


def _proofs(out: Console, found: Mapping[str, Any]) -> None:
    if not found["proofs"]:
        return
    variant = f", a named setting or a close variant of {found['core']}" if found["core"] else ""
    proofs = Table("proof", Column("test", overflow="fold"), title=f"how it was checked{variant}", title_justify="left")
    for one in found["proofs"]:
        proofs.add_row(Text(one["proof"]), Text(one["test"].removeprefix(TESTS) if one["test"] else f"none: {one['reason']}"))
    out.print(Padding(proofs, (1, 0, 0, 0)))
    out.print(Text(f"tests are in {TESTS}"))


def _say(out: Console, title: str, text: str) -> None:
    out.print()
    out.print(Text(title, style="italic"))
    out.print(Padding(Text(text), (0, 0, 0, 2)))


def _terms(out: Console, found: Sequence[Mapping[str, Any]]) -> None:
    terms = Table("term", "on", "divided per", "coefficient", "loss", title="terms", title_justify="left")
    for term in found:
        coefficient = term["coefficient"] if isinstance(term["coefficient"], str) else f"{term['coefficient']:g}"
        terms.add_row(*(Text(cell) for cell in (term["name"], term["on"], term["per"], coefficient, term["loss"])))
    out.print(Padding(terms, (1, 0, 0, 0)))
    surrogates = [(term["name"], term["estimator"]) for term in found if term["estimator"] is not None]
    if surrogates:
        out.print(Text("weight on grad log pi: gate (pi / denominator) advantage", style="italic"))
        slots = Table("term", "gate", "denominator", "advantage", "averaged")
        for name, slot in surrogates:
            cells = (name, slot["gate"], slot["denominator"], slot["advantage"], slot["within"] or "no")
            slots.add_row(*(Text(cell) for cell in cells))
        out.print(slots)


def _settings(out: Console, found: Mapping[str, Any]) -> None:
    default = Column("default", max_width=20 if out.width < WIDE else None, overflow="fold")
    settings = Table(Column("setting", no_wrap=True), default, "what it is", title="settings", title_justify="left")
    for key, value in found["settings"].items():
        settings.add_row(*(Text(cell) for cell in (key, repr(value), found["about"][key])))
    out.print(settings if found["settings"] else Text("no settings"))
