"""What a method is, as tables, pages and programs show it: read off the method itself."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from crosstrain.methods.docstring import said
from crosstrain.methods.proofs import CORES, PROOFS, PROVED
from crosstrain.methods.registry import METHODS, factory_of, load_method
from crosstrain.objective.words import words_of
from crosstrain.types import Batch, Method, Source, Term, Weights

WHAT_IS_NEEDED = {
    "ref_logp": "reference model",
    "value": "value head",
    "teacher_logp": "teacher",
    "behaviour_logp": "behaviour log-probs",
}
"""What a column that a term reads asks of a run."""


def record(name: str) -> dict[str, Any]:
    """A method as JSON holds it, for tables, pages and programs.

        name, family, direction, data, needs, paper, year, checked
        summary, idea, loss, weight, notes
                                        from its docstring (see `docstring`): what it is in a line and in more, the objective, the
                                        weight of a token, and the rest
        description                     all of the docstring
        settings, about                 of each setting its default, and what it is
        updates                         inner updates per collected batch
        terms                           of each: name, on, per, coefficient, loss, reads, and `estimator`: what it is in the unified
                                        estimator (arXiv:2509.04419), in words, None for a term that is no surrogate
        works, fails, deviates          when the literature finds that it helps and when not, and where this one differs
        core                            the method that it is a named setting or a close variant of, else None
        proofs                          how it was checked, see `proofs_of`

    UserError for an unknown name, with the nearest one; a method of a file of your own has no family, paper and year.

    >>> found = record("dapo")
    >>> found["data"], found["needs"], found["year"], found["checked"]
    ('online', ['verifier'], 2025, 'official source')
    >>> record("dft")["terms"][0]["estimator"]
    {'gate': '1', 'denominator': '1', 'advantage': '1', 'on': 'expert', 'within': '', 'per': 'own_tokens'}
    """
    made, factory = load_method(name), factory_of(name)
    entry = METHODS.get(name)
    text = said(factory, made.settings)
    return {
        "name": name,
        "family": None if entry is None else entry.family,
        "direction": None if entry is None else entry.direction,
        "data": data_of(made),
        "needs": needs_of(made),
        "paper": made.paper or None,
        "year": None if entry is None else entry.year,
        "checked": None if entry is None else entry.checked,
        "summary": text.summary,
        "idea": list(text.idea),
        "loss": text.loss,
        "weight": text.weight,
        "notes": list(text.notes),
        "description": inspect.getdoc(factory) or "",
        "settings": dict(made.settings),
        "about": {name: _sentence(text.settings.get(name, "")) for name in made.settings},
        "updates": {"epochs": made.updates.epochs, "minibatches": made.updates.minibatches},
        "terms": [
            {
                "name": term.name,
                "on": on_what(term),
                "per": str(term.per),
                "coefficient": coefficient_of(term, made),
                "loss": term.describe,
                "reads": sorted(term.needs),
                "estimator": estimator_of(term, made),
            }
            for term in made.terms
        ],
        "works": "" if entry is None else entry.works,
        "fails": "" if entry is None else entry.fails,
        "deviates": "" if entry is None else entry.deviates,
        "core": CORES.get(name),
        "proofs": proofs_of(name),
    }


def coefficient_of(term: Term, method: Method) -> float | str:
    """A term's coefficient; "schedule" where it follows from the step, and "state" where it follows from the method's state."""
    if method.coefs is not None:
        return "state"
    return "schedule" if callable(term.coef) else float(term.coef)


def proofs_of(name: str) -> list[dict[str, str | None]]:
    """Of each of the seven proofs what it is, and the test that holds it or the reason why there is none; nothing for a method of
    a file of your own.

    >>> proofs_of("gem")[2]["proof"], proofs_of("gem")[2]["reason"]
    ('the weight of a token in closed form', 'acts on the whole distribution: it has no weight on log pi alone')
    >>> proofs_of("dft")[0]["test"]
    'tests/methods/test_sft_dft.py::test_dft_by_hand'
    """
    found: list[dict[str, str | None]] = []
    for letter, proof in PROVED.get(name, {}).items():
        is_test = "::" in proof
        found.append(
            {
                "proof": PROOFS[letter],
                "test": f"tests/methods/{proof}" if is_test else None,
                "reason": None if is_test else proof,
            }
        )
    return found


def estimator_of(term: Term, method: Method) -> dict[str, str] | None:
    """The slots of the unified estimator and the normaliser, in words; None for a term that is no surrogate."""
    if "denominator" not in term.slots:
        return None
    return {
        "gate": term.slots["gate"],
        "denominator": term.slots["denominator"],
        "advantage": term.slots.get("advantage") or words_of(method.advantage),
        "on": on_what(term),
        "within": term.slots["within"],
        "per": str(term.per),
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
    """Whose tokens a term is on, and of which rows, found by asking it about rows with a token of each author: a group's best row
    and another, each with a reward above 0 and with a reward of 0.

    >>> on_what(load_method("sft").terms[0]), on_what(load_method("dpo_nll").terms[1]), on_what(load_method("nft").terms[1])
    ('expert', 'expert (best row)', 'policy (reward not above 0)')
    """
    probe = _probe()
    remembered = probe.with_columns(replayed=torch.ones_like(probe.reward))
    if not (found := _hit(term, probe)) and (found := _hit(term, remembered)):
        found += " (replayed)"
    return found or "none of these"


def _sentence(text: str) -> str:
    """The text with a capital, unless it starts with a formula."""
    return text[0].upper() + text[1:] if re.match(r"[a-z]{2,}\b", text) else text


def _hit(term: Term, probe: Batch) -> str:
    hit = term.on(probe)
    parts = []
    for source in (Source.EXPERT, Source.POLICY, Source.TOOL):
        rows = tuple(hit[:, source].tolist())
        if any(rows):
            parts.append(source.name.lower() + WHICH.get(rows, " (some rows)"))
    return ", ".join(parts)


WHICH = {
    (True, True, True, True): "",
    (True, True, False, False): " (best row)",
    (False, False, True, True): " (not the best row)",
    (True, False, True, False): " (reward above 0)",
    (False, True, False, True): " (reward not above 0)",
}
"""By which rows of the probe are hit: the best with and without a reward, another with and without."""


def _probe() -> Batch:
    source = torch.tensor([[int(s) for s in Source]] * 4)
    nan = torch.full(source.shape, float("nan"))
    return Batch(
        tokens=torch.zeros_like(source),
        source=source,
        trained=source != int(Source.PROMPT),
        group=torch.zeros(4, dtype=torch.long),
        rank=torch.tensor([0, 0, 1, 1]),
        reward=torch.tensor([1.0, 0.0, 1.0, 0.0]),
        advantage=nan,
        columns={},
        example_ids=("a", "b", "c", "d"),
        prompt_length=torch.ones(4, dtype=torch.long),
        length=torch.full((4,), source.shape[1]),
    )
