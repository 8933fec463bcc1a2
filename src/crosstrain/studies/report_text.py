"""What a report says in words: numbers as people read them, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]

UNITS = {
    "processed_tokens": "tokens processed",
    "generated_tokens": "tokens generated",
    "flops": "FLOPs",
    "demonstrations": "demonstrations used",
    "seconds": "seconds of training",
}


def shown(name: str) -> str:
    """An arm's name as it is shown.

    >>> shown("sft -> grpo")
    'sft → grpo'
    """
    return name.replace("->", "→")


def number(value: float | None, measure: Mapping[str, Any], *, signed: bool = False) -> str:
    """A value of a measure: shares in percent (their changes in points), others with 2 or 3 decimals.

    >>> share = {"format": "share", "unit": "", "change": False}
    >>> number(0.1234, share), number(None, share), number(-0.051, share | {"change": True})
    ('12.3%', 'unknown', '−5.1 pts')
    """
    if value is None:
        return "unknown"
    signed = signed or bool(measure["change"])
    points = measure["format"] == "share"
    digits = 1 if points else 3 if measure["unit"] == "nats per token" else 2
    text = f"{abs(value) * (100 if points else 1):.{digits}f}"
    minus = value < 0 and float(text) != 0
    sign = "−" if minus else "+" if signed and float(text) != 0 else ""
    return sign + text + ((" pts" if signed else "%") if points else "")


def interval(low: float | None, high: float | None, measure: Mapping[str, Any], *, signed: bool = False) -> str:
    """The two ends of an interval, the unit said once.

    >>> interval(0.1, 0.25, {"format": "share", "unit": "", "change": False})
    '10.0 to 25.0'
    """
    if low is None or high is None:
        return ""
    ends = [number(end, measure, signed=signed).removesuffix("%").removesuffix(" pts") for end in (low, high)]
    return " to ".join(ends)


def quantity(value: float) -> str:
    """A cost.

    >>> quantity(3.04e13), quantity(52310.0), quantity(8.25)
    ('3.04e13', '52,310', '8.2')
    """
    if value >= 1e9:
        return f"{value:.3g}".replace("e+", "e")
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def listing(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listing(["a", "b", "c"])
    'a, b and c'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


@dataclass(frozen=True)
class Verdict:
    """The report's first words: a headline, a sentence or two on it, what matters most beside it, and all findings in words."""

    headline: str
    lead: str
    key: tuple[str, ...] = ()
    points: tuple[str, ...] = ()


def measure_of(results: Results, key: str) -> Mapping[str, Any]:
    """A measure by its key."""
    found: Mapping[str, Any] = next(m for m in results["measures"] if m["key"] == key)
    return found


def say_verdict(results: Results) -> Verdict:
    """Which arm won, by how much and how surely, in plain words."""
    families = results["families"]
    if not families or (families[0]["leader"] is None and not families[0]["tied"]):
        return Verdict("Nothing to compare yet", "No run of a trained arm has finished, so there is no verdict.")
    first = families[0]
    measure = measure_of(results, first["measure"])
    what = _what(measure)
    key = tuple(_key_points(results))
    points = tuple(text for family in families for text in _points(results, family))
    if first["leader"] is None:
        return Verdict("Cannot tell: a tie at the top", _tie(first["tied"], measure, what), key, points)
    leader, values = first["leader"], measure["arms"][first["leader"]]
    ends = interval(values["low"], values["high"], measure)
    score = number(values["mean"], measure) + (f" ({ends})" if ends else "")
    rivals = [c["against"] for c in first["leader_against"] if c["verdict"] != "better"]
    if results["scope"] != "method":
        lead = (
            f"{shown(leader)} has the highest {what}, {score}, but each arm was trained only once. Whether another seed would "
            "end the same way cannot be known; the intervals are about these very models."
        )
        return Verdict("Cannot tell: one training seed", lead, key, points)
    if not rivals:
        return Verdict(f"{shown(leader)} won", f"It has the highest {what}: {score}.{_ahead(first, measure)}", key, points)
    if "base" in rivals:
        lead = (
            f"{shown(leader)} has the highest {what} of the trained arms, {score}, and that cannot be told apart from the "
            "untrained model."
        )
        return Verdict("Cannot tell whether training helped", lead, key, points)
    near = [shown(name) for name in rivals]
    lead = (
        f"{shown(leader)} has the highest {what}, {score}, but with {_power(results)} it cannot be told apart from "
        f"{listing(near)}.{_ahead(first, measure)}"
    )
    headline = (
        f"{' or '.join([shown(leader), *near])}: cannot tell which is best" if len(near) < 3 else "Cannot tell which is best"
    )
    return Verdict(headline, lead, key, points)


def _tie(tied: Sequence[str], measure: Mapping[str, Any], what: str) -> str:
    """Which arms are equally good, and whether the questions could have told them apart."""
    value = measure["arms"][tied[0]]["mean"]
    said = f"{listing([shown(name) for name in tied])} have the same {what}, {number(value, measure)}."
    if measure["format"] == "share" and not measure["change"] and value in (0.0, 1.0):
        where, remedy = ("floor", "easier questions or more training") if value == 0 else ("ceiling", "harder questions")
        said += f" The questions are at their {where}: nothing about methods can be learned from them. Try {remedy}."
    return said


def _ahead(family: Mapping[str, Any], measure: Mapping[str, Any]) -> str:
    """How far the leader is ahead of the next arm."""
    near = min(family["leader_against"], key=lambda c: abs(c["difference"]), default=None)
    if near is None:
        return ""
    name = "the untrained model" if near["against"] == "base" else shown(near["against"])
    ends = interval(near["low"], near["high"], measure, signed=True)
    unsure = near["verdict"] != "better" and near["low"] is not None and near["low"] > 0
    return (
        f" Its lead over {name} is {number(near['difference'], measure, signed=True).lstrip('+')}"
        + (f" ({ends}" + (", before the correction for comparing all pairs of arms)" if unsure else ")") if ends else "")
        + "."
    )


def _key_points(results: Results) -> list[str]:
    """The few findings that stand beside the verdict."""
    first = results["families"][0]
    measure = measure_of(results, first["measure"])
    lines = []
    if results["scope"] == "method":
        against = {c["against"]: [x for x in first["contrasts"] if x["against"] == c["against"]] for c in first["contrasts"]}
        lines = [_against(name, found, measure) for name, found in against.items()]
        lines += _detectable(first, measure)
    lines += _unequal(measure)
    forgotten: Mapping[str, Any] = next((m["arms"] for m in results["measures"] if m["key"] == "forgetting/nll"), {})
    trained = sorted((name for name in forgotten if name != "base"), key=lambda name: float(forgotten[name]["mean"]))
    if len(trained) > 1:
        m = measure_of(results, "forgetting/nll")
        least, most = (f"{shown(n)} ({number(forgotten[n]['mean'], m)} {m['unit']})" for n in (trained[0], trained[-1]))
        if float(forgotten[trained[-1]]["mean"]) <= 0:  # the gold answers became no less likely
            lines.append(f"What it forgot: nothing on average in any arm, from {least} to {most}.")
        else:
            lines.append(f"What it forgot: {least} forgot least of the general answers it knew, {most} most.")
    return lines


def _what(measure: Mapping[str, Any]) -> str:
    return {"accuracy": "in-distribution accuracy", "ood_accuracy": "out-of-distribution accuracy"}.get(
        measure["key"], str(measure["label"]).lower()
    )


def _power(results: Results) -> str:
    seeds = max(len(a["seeds"]) for a in results["arms"])
    questions = measure_of(results, results["families"][0]["measure"])["questions"]
    return f"{seeds} seeds and {questions} questions"


def _points(results: Results, family: Mapping[str, Any]) -> list[str]:
    """Sentences for a family of planned contrasts; none where each arm has one seed."""
    if results["scope"] != "method":
        return []
    measure = measure_of(results, family["measure"])
    lines = []
    for reference in dict.fromkeys(c["against"] for c in family["contrasts"]):
        lines.append(_against(reference, [c for c in family["contrasts"] if c["against"] == reference], measure))
    return [f"{family['label']}. {line}" for line in (*lines, *_detectable(family, measure))]


def _unequal(measure: Mapping[str, Any]) -> list[str]:
    """A warning where the arms' seeds clearly do not vary alike, which the intervals take for granted."""
    spreads = {name: found["seed_sd"] for name, found in measure["arms"].items() if found["seed_sd"] is not None}
    p = measure["unequal_seeds_p"]
    if p is None or p >= 0.05:
        return []
    low, high = min(spreads, key=lambda name: spreads[name]), max(spreads, key=lambda name: spreads[name])
    least, most = (f"{shown(n)} ({number(spreads[n], measure, signed=True).lstrip('+')})" for n in (low, high))
    return [
        f"Careful: seeds do not vary alike in all arms, with standard deviations from {least} to {most} (Bartlett's p "
        f"{'below 0.001' if p < 0.001 else f'= {p:.3f}'}). Intervals and verdicts of {shown(high)} are surer than they should be."
    ]


def _against(reference: str, contrasts: Sequence[Mapping[str, Any]], measure: Mapping[str, Any]) -> str:
    whom = "the untrained model" if reference == "base" else shown(reference)
    said = [_group(contrasts, word, measure) for word in ("better", "worse", "cannot tell")]
    return f"Against {whom}: {'; '.join(text for text in said if text)}."


def _detectable(family: Mapping[str, Any], measure: Mapping[str, Any]) -> list[str]:
    found = [c["smallest_detectable"] for c in family["contrasts"] if c["smallest_detectable"]]
    if not found:
        return []
    least, most = (number(v, measure, signed=True).lstrip("+").removesuffix(" pts") for v in (min(found), max(found)))
    unit = "points" if measure["format"] == "share" else measure["unit"]
    ends = least if least == most else f"{least} to {most}"
    return [f"A true difference smaller than about {ends} {unit} would often be missed (80% power, after the correction)."]


def _group(contrasts: Sequence[Mapping[str, Any]], word: str, measure: Mapping[str, Any]) -> str:
    named = [_named(c, word, measure) for c in contrasts if c["verdict"] == word]
    if not named:
        return ""
    return f"{word}{' for' if word == 'cannot tell' else ':'} {listing(named)}"


def _named(c: Mapping[str, Any], word: str, measure: Mapping[str, Any]) -> str:
    if c["difference"] is None:
        return f"{shown(c['arm'])} (no finished run)"
    return shown(c["arm"]) + ("" if word == "cannot tell" else f" ({number(c['difference'], measure, signed=True)})")
