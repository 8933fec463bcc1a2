"""What a method is, as tables, pages and programs show it: read off the method itself."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from crosstrain.methods.registry import METHODS, factory_of, load_method
from crosstrain.types import Batch, Method, Source, Term, Weights

WHAT_IS_NEEDED = {
    "ref_logp": "reference model",
    "value": "value head",
    "teacher_logp": "teacher",
    "behaviour_logp": "behaviour log-probs",
}
"""What a column that a term reads asks of a run."""


def record(name: str) -> dict[str, Any]:
    """A method as JSON holds it: name, family, direction, data, needs, paper, year, checked, summary, description, settings,
    updates and terms. UserError for an unknown name, with the nearest one; a method of a file of your own has no family, paper
    and year.

    >>> found = record("dapo")
    >>> found["data"], found["needs"], found["year"], found["checked"]
    ('online', ['verifier'], 2025, 'official source')
    """
    made = load_method(name)
    entry = METHODS.get(name)
    text = inspect.getdoc(factory_of(name)) or ""
    return {
        "name": name,
        "family": None if entry is None else entry.family,
        "direction": None if entry is None else entry.direction,
        "data": data_of(made),
        "needs": needs_of(made),
        "paper": made.paper or None,
        "year": None if entry is None else entry.year,
        "checked": None if entry is None else entry.checked,
        "summary": text.split("\n", 1)[0],
        "description": text,
        "settings": dict(made.settings),
        "updates": {"epochs": made.updates.epochs, "minibatches": made.updates.minibatches},
        "terms": [
            {
                "name": term.name,
                "on": on_what(term),
                "per": str(term.per),
                "coefficient": "schedule" if callable(term.coef) else float(term.coef),
                "loss": term.describe,
                "reads": sorted(term.needs),
            }
            for term in made.terms
        ],
    }


def data_of(method: Method) -> str:
    """What a method learns from: "offline", "online", or both."""
    if not method.plan.samples:
        return "offline"
    return "online" if method.plan.needs_expert is None else "offline + online"


def needs_of(method: Method) -> list[str]:
    """What a run has to bring for a method, beside a model and prompts."""
    plural = {"demonstration": "demonstrations", "pair": "preferences", "label": "labels"}
    needs = [plural[method.plan.needs_expert]] if method.plan.needs_expert else []
    needs += ["verifier"] if method.plan.asks_for_rewards else []
    models: dict[str, Weights] = {"ref_logp": "reference", "teacher_logp": "teacher"}
    read = method.needs | {column for column, weights in models.items() if method.reads(weights)}
    read -= {"ref_logp"} if method.reference == "previous" else set()  # which is the policy, a step ago
    read -= {"behaviour_logp"} if method.plan.samples else set()  # the sampler gives them
    return needs + [what for column, what in WHAT_IS_NEEDED.items() if column in read]


def on_what(term: Term) -> str:
    """Whose tokens a term is on, found by asking it about a pair of rows that hold a token of each author.

    >>> on_what(load_method("sft").terms[0])
    'expert'
    """
    probe = _probe()
    remembered = probe.with_columns(replayed=torch.ones_like(probe.reward))
    if not (found := _hit(term, probe)) and (found := _hit(term, remembered)):
        found += " (replayed)"
    return found or "none of these"


def _hit(term: Term, probe: Batch) -> str:
    hit = term.on(probe)
    parts = []
    for source in (Source.EXPERT, Source.POLICY, Source.TOOL):
        best, other = bool(hit[0, source]), bool(hit[1, source])
        if best or other:
            which = "" if best and other else " (best row)" if best else " (not the best row)"
            parts.append(source.name.lower() + which)
    return ", ".join(parts)


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
