"""The report's tables: measures, planned contrasts, costs, methods, runs, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from crosstrain.studies.measures import GROUPS
from crosstrain.studies.report_style import Style, arm_name
from crosstrain.studies.report_text import UNITS, Results, interval, measure_of, number, quantity, shown

Looks = Mapping[str, Style]


def scrolling(table: str) -> str:
    """A table in its own scrolling box, reachable with the keyboard."""
    return f'<div class="scroll" tabindex="0">{table}</div>'


def measures_table(results: Results, looks: Looks) -> str:
    """Arms x measures with 95% intervals; every column can be sorted, arms filtered, groups of columns chosen."""
    measures = results["measures"]
    groups = [g for g in GROUPS if any(m["group"] == g for m in measures)]
    boxes = "".join(
        f'<label><input type="checkbox" data-group="{g}"{" checked" if g != "sets" else ""}> {escape(GROUPS[g])}</label>'
        for g in groups
    )
    controls = (
        '<div class="controls"><label class="control">Filter arms <input id="arm-filter" type="search" '
        f'placeholder="for example grpo" autocomplete="off"></label><fieldset><legend>Columns</legend>{boxes}</fieldset></div>'
    )
    head = "".join(
        f'<th scope="col" data-group="{m["group"]}" aria-sort="none"><button type="button" title="{escape(m["about"])}">'
        f"{escape(_heading(m))}</button></th>"
        for m in measures
    )
    rows = "".join(_measure_row(arm, measures, looks) for arm in results["arms"])
    table = (
        '<table id="measures" class="sortable"><thead><tr><th scope="col" aria-sort="none"><button type="button">Arm</button>'
        f"</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )
    return controls + scrolling(table)


def _heading(measure: Mapping[str, Any]) -> str:
    label = ("Δ " if measure["change"] else "") + str(measure["label"])
    return f"{label}, {measure['unit']}" if measure["unit"] else label


def _measure_row(arm: Mapping[str, Any], measures: Sequence[Mapping[str, Any]], looks: Looks) -> str:
    cells = []
    for m in measures:
        found = m["arms"].get(arm["name"])
        if found is None:
            cells.append(f'<td data-group="{m["group"]}" class="missing">not measured</td>')
            continue
        ends = interval(found["low"], found["high"], m)
        cells.append(
            f'<td data-group="{m["group"]}" data-value="{found["mean"]!r}">{escape(number(found["mean"], m))}'
            f"<small>{escape(ends)}</small></td>"
        )
    name = escape(f"{arm['name']} {shown(arm['name'])}", quote=True)
    runs = "" if arm["base"] else f"<small>{_seeds(arm)}</small>"
    head = f'<th scope="row" data-value="{name}">{arm_name(arm["name"], looks)}{runs}</th>'
    return f'<tr data-name="{name}">{head}{"".join(cells)}</tr>'


def _seeds(arm: Mapping[str, Any]) -> str:
    done, planned = len(arm["seeds"]), len(arm["runs"])
    return f"{done} seed{'s' if done != 1 else ''}" + (f" of {planned}" if done != planned else "")


def measures_guide(results: Results) -> str:
    """What each column is."""
    items = "".join(f"<dt>{escape(_heading(m))}</dt><dd>{escape(m['about'])}</dd>" for m in results["measures"])
    return f"<details><summary>What the columns are</summary><dl>{items}</dl></details>"


def contrasts_tables(results: Results) -> str:
    """One table per family of planned contrasts."""
    return "".join(_contrasts_table(results, family) for family in results["families"])


def _contrasts_table(results: Results, family: Mapping[str, Any]) -> str:
    measure = measure_of(results, family["measure"])
    ends = [c[end] for c in family["contrasts"] for end in ("low", "high") if c[end] is not None]
    scale = max((abs(e) for e in ends), default=1.0) or 1.0
    rows = "".join(_contrast_row(c, measure, scale) for c in family["contrasts"])
    unit = "percentage points" if measure["format"] == "share" else measure["unit"]
    head = "".join(
        f'<th scope="col">{text}</th>'
        for text in ("Comparison", "Verdict", "Difference", "Interval", "p", "p, Holm", "Detectable difference")
    )
    return (
        f'<h3 class="family">{escape(family["label"])} <small>{family["role"]}, in {escape(unit)}; {family["direction"]} is '
        f"better</small></h3>"
        + scrolling(f'<table class="contrasts"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>')
    )


def _contrast_row(c: Mapping[str, Any], measure: Mapping[str, Any], scale: float) -> str:
    names = f'<th scope="row">{escape(shown(c["arm"]))} <span class="vs">vs</span> {escape(shown(c["against"]))}</th>'
    if c["difference"] is None:
        return f'<tr>{names}<td colspan="6" class="missing">no finished run to compare</td></tr>'
    word = c["verdict"]
    least = c["smallest_detectable"]
    detectable = "unknown" if least is None else number(least, measure, signed=True).lstrip("+")
    ends = interval(c["low"], c["high"], measure, signed=True)
    return (
        f'<tr>{names}<td><span class="verdict {word.replace(" ", "-")}">{word}</span></td>'
        f"<td>{escape(number(c['difference'], measure, signed=True))}<small>{escape(ends)}</small></td>"
        f"<td>{_bar(c, scale, word)}</td><td>{_p(c['p'])}</td><td>{_p(c['p_holm'])}</td><td>{escape(detectable)}</td></tr>"
    )


def _bar(c: Mapping[str, Any], scale: float, word: str) -> str:
    """The interval as a small picture, zero in the middle."""

    def x(value: float) -> float:
        return round(60 + 56 * value / scale, 1)

    ends = "" if c["low"] is None else f'<path class="range" d="M{x(c["low"])} 8H{x(c["high"])}"/>'
    return (
        f'<svg class="bar {word.replace(" ", "-")}" viewBox="0 0 120 16" role="img" aria-label="interval">'
        f'<path class="zero" d="M60 1v14"/>{ends}'
        f'<circle cx="{x(c["difference"])}" cy="8" r="3.4"/></svg>'
    )


def _p(value: float | None) -> str:
    if value is None:
        return "unknown"
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def costs_table(results: Results, looks: Looks) -> str:
    """What a run of each arm spent, the mean over its finished runs."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in UNITS.values())
    rows = ""
    for arm in results["arms"]:
        cost = arm["cost"]
        cells = "".join(
            f"<td>{quantity(cost[u]) if cost else '<span class=missing>no finished run</span>'}</td>" for u in UNITS
        )
        rows += f'<tr><th scope="row">{arm_name(arm["name"], looks)}</th>{cells}</tr>'
    return scrolling(f'<table><thead><tr><th scope="col">Arm</th>{head}</tr></thead><tbody>{rows}</tbody></table>')


def methods_section(results: Results, looks: Looks) -> str:
    """What each arm is: its stages, their settings and their objectives."""
    return "".join(_method(arm, looks) for arm in results["arms"] if not arm["base"])


def _method(arm: Mapping[str, Any], looks: Looks) -> str:
    rates = arm["learning_rates"] or []
    body = "" if arm["methods"] else '<p class="missing">No run has started, so its method is not recorded.</p>'
    for i, method in enumerate(arm["methods"]):
        facts = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in method["settings"].items()]
        rate = f"learning rate {rates[i]:g}" if i < len(rates) else ""
        said = "; ".join(text for text in (rate, method["paper"], *facts) if text)
        rows = "".join(
            f'<tr><th scope="row">{escape(t["name"])}</th><td>{escape(t["loss"])}</td><td>{escape(t["per"])}</td>'
            f"<td>{escape(str(t['coef']))}</td></tr>"
            for t in method["terms"]
        )
        stage = f"Stage {i + 1}: " if len(arm["methods"]) > 1 else ""
        body += f"<h4>{stage}{escape(method['name'])}</h4><p>{escape(said)}</p>" + scrolling(
            '<table><thead><tr><th scope="col">Term</th><th scope="col">Loss</th><th scope="col">Divided per</th>'
            f'<th scope="col">Coefficient</th></tr></thead><tbody>{rows}</tbody></table>'
        )
    return f"<details><summary>{arm_name(arm['name'], looks)}</summary>{body}</details>"


def runs_table(results: Results, looks: Looks) -> str:
    """How every run ended."""
    rows = ""
    for arm in results["arms"]:
        for run in arm["runs"]:
            told = [run["error"] or "", *(run["warnings"] or [])]
            seconds = f"{run['cost']['seconds']:,.0f}" if run["cost"] else ""
            rows += (
                f'<tr class="{escape(run["status"].replace(" ", "-"))}"><th scope="row">{arm_name(arm["name"], looks)}</th>'
                f"<td>{'' if run['seed'] is None else run['seed']}</td><td>{escape(run['status'])}</td>"
                f"<td>{'' if run['steps'] is None else run['steps']}</td><td>{seconds}</td>"
                f'<td class="words">{escape("; ".join(t for t in told if t))}</td></tr>'
            )
    head = "".join(f'<th scope="col">{t}</th>' for t in ("Arm", "Seed", "Status", "Steps", "Seconds"))
    head += '<th scope="col" class="words">Error or warning</th>'
    return scrolling(f'<table id="runs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>')


def settings_section(results: Results) -> str:
    """Versions, hardware and every setting."""
    study, setup = results["study"], results["setup"] or {}
    data = {f"data {name}": f"{d['rows']} rows, sha256 {d['hash']}" for name, d in (setup.get("data") or {}).items()}
    model = {
        k.replace("_", " "): setup[k] for k in ("model", "parameters", "precision", "sampler", "template_hash") if setup.get(k)
    }
    lists = [
        ("Model and data", {**model, **data}),
        ("Versions", study["versions"] or {}),
        ("Hardware", {k: v for k, v in (study["hardware"] or {}).items() if v is not None}),
        ("Corrected", {c["at"]: _corrected(c) for c in study.get("corrections") or []}),
        ("Study", {"config hash": study["config_hash"], "started": study["started_at"], "finished": study["finished_at"]}),
    ]
    facts = "".join(f"<div><h3>{title}</h3>{_facts(values)}</div>" for title, values in lists if values)
    spec = yaml.safe_dump(study["spec"], sort_keys=False, allow_unicode=True, width=100)
    return f'<div class="facts">{facts}</div><details><summary>Every setting</summary><pre>{escape(spec)}</pre></details>'


def _corrected(correction: Mapping[str, Any]) -> str:
    """What changed in a study that had been started, and how many runs had finished before."""
    changed = [f"{one['setting']} from {one['before']!r} to {one['after']!r}" for one in correction["differences"]]
    return f"{'; '.join(changed)}; runs finished before: {len(correction['finished'])}"


def _facts(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in values.items() if v is not None)
    return f"<dl>{rows}</dl>"
