"""Tables of `crosstrain methods`: what exists, and one method's terms and settings."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Column, Table

from crosstrain.data.catalogue import DATA_METHODS
from crosstrain.methods import METHODS
from crosstrain.methods.describe import record


def print_all(console: Console | None = None, *, as_json: bool = False) -> None:
    """Print one line per method, by family, as the survey's Table 1 has them, and what can be done to data; or the records of all
    as JSON, under `methods` and `data`."""
    records = [record(name) for name in METHODS]
    if as_json:
        print(json.dumps({"methods": records, "data": [one.record for one in DATA_METHODS]}, indent=1))
        return
    table = Table(
        Column("method", no_wrap=True),
        Column("direction", no_wrap=True),
        "data",
        "needs",
        Column("paper", no_wrap=True),
        "year",
        "written from",
        "what it does",
    )
    for family in dict.fromkeys(found["family"] for found in records):
        table.add_section()
        for found in (r for r in records if r["family"] == family):
            cells = (
                found["direction"],
                found["data"],
                ", ".join(found["needs"]) or "nothing",
                found["paper"],
                str(found["year"]),
            )
            table.add_row(found["name"], *cells, found["checked"], found["summary"])
    (console or Console()).print(table, _data_table())


def _data_table() -> Table:
    """What a recipe can do to its data, with any method."""
    keys = Column("setting of data.STREAM", no_wrap=True)
    table = Table(
        "data", keys, Column("paper", no_wrap=True), "year", "what it does", title="for any method", title_justify="left"
    )
    for one in DATA_METHODS:
        table.add_row(one.name, one.key.replace("[", "\\["), one.paper, str(one.year or ""), one.does)
    return table


def print_one(name: str, console: Console | None = None, *, as_json: bool = False) -> None:
    """Print a method's description, terms and settings, or its record as JSON; UserError for an unknown name, with the nearest
    one."""
    found = record(name)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    out = console or Console()
    needs = ", ".join(found["needs"]) or "nothing"
    out.print(f"[bold]{name}[/bold]  {found['paper'] or ''}  {found['data']}; needs {needs}", highlight=False)
    if found["checked"]:
        out.print(f"{found['family']}, {found['direction']}; written from: {found['checked']}", highlight=False, markup=False)
    out.print(found["description"], markup=False, highlight=False, soft_wrap=True)
    terms = Table("term", "on", "divided per", "coefficient", "loss", title="terms", title_justify="left")
    for term in found["terms"]:
        coefficient = term["coefficient"] if isinstance(term["coefficient"], str) else f"{term['coefficient']:g}"
        terms.add_row(term["name"], term["on"], term["per"], coefficient, term["loss"])
    out.print(terms)
    settings = Table("setting", "default", title="settings", title_justify="left")
    for key, value in found["settings"].items():
        settings.add_row(key, repr(value))
    if found["settings"]:
        out.print(settings)
    else:
        out.print("no settings")
