"""Tables of `crosstrain methods`: what exists, and one method's terms and settings."""

from __future__ import annotations

import inspect

import torch
from rich.console import Console
from rich.table import Column, Table

from crosstrain.methods import METHODS, load_method
from crosstrain.types import Batch, Method, Source, Term


def print_all(console: Console | None = None) -> None:
    """Print one line per method, by family: name, data it needs, paper, what it does."""
    table = Table(Column("method", no_wrap=True), "needs", Column("paper", no_wrap=True), "what it does")
    for family in dict.fromkeys(entry.family for entry in METHODS.values()):
        table.add_section()
        for entry in (e for e in METHODS.values() if e.family == family):
            made = load_method(entry.name)
            table.add_row(entry.name, _needs(made), entry.paper, _first_line(entry.factory))
    (console or Console()).print(table)


def print_one(name: str, console: Console | None = None) -> None:
    """Print a method's description, terms and settings; UserError for an unknown name, with the nearest one."""
    out = console or Console()
    made = load_method(name)
    factory = METHODS[name].factory if name in METHODS else None
    out.print(f"[bold]{name}[/bold]  {made.paper}  needs {_needs(made)}", highlight=False)
    if factory is not None:
        out.print(inspect.getdoc(factory) or "", markup=False, highlight=False, soft_wrap=True)
    terms = Table("term", "on", "divided per", "coefficient", "loss", title="terms", title_justify="left")
    for term in made.terms:
        terms.add_row(term.name, on_what(term), str(term.per), _coefficient(term), term.describe)
    out.print(terms)
    settings = Table("setting", "default", title="settings", title_justify="left")
    for key, value in made.settings.items():
        settings.add_row(key, repr(value))
    if made.settings:
        out.print(settings)
    else:
        out.print("no settings")


def on_what(term: Term) -> str:
    """Whose tokens a term is on, found by asking it about a pair of rows that hold a token of each author.

    >>> on_what(load_method("sft").terms[0])
    'expert'
    """
    hit = term.on(_probe())
    parts = []
    for source in (Source.EXPERT, Source.POLICY, Source.TOOL):
        best, other = bool(hit[0, source]), bool(hit[1, source])
        if best or other:
            which = "" if best and other else " (best row)" if best else " (not the best row)"
            parts.append(source.name.lower() + which)
    return ", ".join(parts) or "none of these"


def _probe() -> Batch:
    source = torch.tensor([[int(s) for s in Source]] * 2)
    nan = torch.full(source.shape, float("nan"))
    return Batch(
        tokens=torch.zeros_like(source),
        source=source,
        trained=source != int(Source.PROMPT),
        group=torch.zeros(2, dtype=torch.long),
        rank=torch.tensor([0, 1]),
        reward=torch.tensor([1.0, 0.0]),
        advantage=nan,
        columns={},
        example_ids=("a", "b"),
        prompt_length=torch.ones(2, dtype=torch.long),
        length=torch.full((2,), source.shape[1]),
    )


def _needs(method: Method) -> str:
    needs = [method.plan.needs_expert] if method.plan.needs_expert else []
    return ", ".join([*needs, *(["reward"] if method.plan.samples else [])]) or "nothing"


def _coefficient(term: Term) -> str:
    return "schedule" if callable(term.coef) else f"{term.coef:g}"


def _first_line(factory: object) -> str:
    return (inspect.getdoc(factory) or "").split("\n", 1)[0]
