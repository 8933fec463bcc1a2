"""What a study measures: how each quantity is read, question by question, out of an evaluation.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crosstrain.evaluate.pass_at_k import pass_at_k
from crosstrain.studies.statistics import Direction

Evaluation = Mapping[str, Any]
Format = Literal["share", "number"]
GROUPS = {
    "accuracy": "Accuracy",
    "sets": "Accuracy by set",
    "forgetting": "Forgetting",
    "divergence": "Divergence",
    "replies": "Replies",
}


@dataclass(frozen=True)
class Scores:
    """One number per question: its id, the set it belongs to, its value."""

    ids: tuple[str, ...]
    sets: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Measure:
    """A quantity of the report.

    key: its name in results.json. change: it is reported as the difference from the base on the same questions. direction: which
    way is better; None where neither is. bounds: values it cannot leave. format: a share is shown in percent.
    """

    key: str
    label: str
    group: str
    read: Callable[[Evaluation], Scores | None]
    unit: str = ""
    format: Format = "share"
    direction: Direction | None = None
    change: bool = False
    bounds: tuple[float, float] | None = None
    about: str = ""


def all_measures(evaluations: Sequence[Evaluation], ks: Sequence[int]) -> list[Measure]:
    """Every measure that at least one of the evaluations has; ks are the k of pass@k."""
    names = list(dict.fromkeys(name for e in evaluations for name in e.get("sets", {})))
    candidates = [
        *_accuracies([k for k in ks if k > 1]),
        *(_one_set(name) for name in names),
        *_FORGETTING,
        *_DIVERGENCE,
        *_REPLIES,
    ]
    return [m for m in candidates if any(m.read(e) is not None for e in evaluations)]


def _of_sets(evaluation: Evaluation, keep: Callable[[str, Any], bool], value: Callable[[Any], float]) -> Scores | None:
    found = [(name, q) for name, one in evaluation.get("sets", {}).items() if keep(name, one) for q in one["questions"]]
    if not found:
        return None
    return Scores(tuple(q["id"] for _, q in found), tuple(name for name, _ in found), tuple(value(q) for _, q in found))


def _kind(kind: str, value: Callable[[Any], float]) -> Callable[[Evaluation], Scores | None]:
    return lambda evaluation: _of_sets(evaluation, lambda _, one: one["kind"] == kind, value)


def _accuracy(question: Any) -> float:
    return _mean_of_samples(question["correct"])


def _mean_of_samples(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pass_at(k: int) -> Measure:
    """pass@k on the in-distribution questions; None for evaluations with fewer than 2k samples per question."""

    def read(evaluation: Evaluation) -> Scores | None:
        asked = [one for one in evaluation.get("sets", {}).values() if one["kind"] == "in_distribution"]
        if any(one["n"] < 2 * k for one in asked):
            return None
        return _of_sets(
            evaluation,
            lambda _, one: one["kind"] == "in_distribution",
            lambda q: pass_at_k(len(q["correct"]), round(sum(q["correct"])), k),
        )

    about = f"Chance that at least one of {k} samples is right (unbiased estimate)."
    return Measure(f"pass@{k}", f"pass@{k}", "accuracy", read, direction="higher", bounds=(0, 1), about=about)


def _accuracies(ks: Sequence[int]) -> list[Measure]:
    return [
        Measure(
            "accuracy",
            "Accuracy",
            "accuracy",
            _kind("in_distribution", _accuracy),
            direction="higher",
            bounds=(0, 1),
            about="Share of right answers to held-out questions like the training data; every question counts once.",
        ),
        Measure(
            "ood_accuracy",
            "OOD accuracy",
            "accuracy",
            _kind("out_of_distribution", _accuracy),
            direction="higher",
            bounds=(0, 1),
            about="The same on questions shifted away from the training data (out of distribution).",
        ),
        *(pass_at(k) for k in ks),
    ]


def _one_set(name: str) -> Measure:
    return Measure(
        f"accuracy/{name}",
        name,
        "sets",
        lambda evaluation: _of_sets(evaluation, lambda other, _: other == name, _accuracy),
        direction="higher",
        bounds=(0, 1),
        about=f"Accuracy on the questions of the set {name!r} alone.",
    )


def _listed(part: str, value: Callable[[Any], float]) -> Callable[[Evaluation], Scores | None]:
    def read(evaluation: Evaluation) -> Scores | None:
        found = evaluation.get("forgetting", {}).get(part)
        if not found:
            return None
        return Scores(tuple(q["id"] for q in found), (part,) * len(found), tuple(value(q) for q in found))

    return read


def _per_token(question: Any) -> float:
    return float(question["nll"]) / int(question["tokens"])


_FORGETTING = [
    Measure(
        "forgetting/nll",
        "Forgetting",
        "forgetting",
        _listed("questions", _per_token),
        unit="nats per token",
        format="number",
        direction="lower",
        change=True,
        about="Change, against the base, of the negative log-likelihood per token of the gold answers to general-knowledge "
        "questions; above 0 the model has become less sure of what it knew.",
    ),
    Measure(
        "forgetting/accuracy",
        "General accuracy",
        "forgetting",
        _listed("questions", lambda q: float(q["correct"])),
        direction="higher",
        change=True,
        about="Change, against the base, of the share of those questions answered right by greedy decoding.",
    ),
    Measure(
        "prose/nll",
        "Prose NLL",
        "forgetting",
        _listed("prose", _per_token),
        unit="nats per token",
        format="number",
        direction="lower",
        change=True,
        about="Change, against the base, of the negative log-likelihood per token of general prose.",
    ),
]


def _diverged(key: str) -> Callable[[Evaluation], Scores | None]:
    def read(evaluation: Evaluation) -> Scores | None:
        found = evaluation.get("divergence", {})
        values = found.get(key)
        return Scores(tuple(found["prompts"]), (key,) * len(values), tuple(values)) if values else None

    return read


_DIVERGENCE = [
    Measure(
        "forward_kl",
        "Forward KL",
        "divergence",
        _diverged("forward_kl"),
        unit="nats per reply",
        format="number",
        about="KL(base || model), estimated from the base's replies.",
    ),
    Measure(
        "reverse_kl",
        "Reverse KL",
        "divergence",
        _diverged("reverse_kl"),
        unit="nats per reply",
        format="number",
        about="KL(model || base), estimated from the model's own replies.",
    ),
    Measure(
        "entropy",
        "Entropy",
        "divergence",
        _diverged("entropy"),
        unit="nats per token",
        format="number",
        about="Entropy of the model's next token within its own replies: how undecided it is.",
    ),
]

_REPLIES = [
    Measure(
        "distinct_frac",
        "Distinct answers",
        "replies",
        _kind("in_distribution", lambda q: q["distinct"] / len(q["correct"])),
        bounds=(0, 1),
        about="Different parsable answers per sample of a question.",
    ),
    Measure(
        "response_length",
        "Reply length",
        "replies",
        _kind("in_distribution", lambda q: _mean_of_samples(q["lengths"])),
        unit="tokens",
        format="number",
        about="Mean length of the replies.",
    ),
    Measure(
        "unparsed_frac",
        "Unparsed",
        "replies",
        _kind("in_distribution", lambda q: 1 - _mean_of_samples(q["parsed"])),
        direction="lower",
        bounds=(0, 1),
        about="Share of replies in which no answer could be found.",
    ),
]
