"""report.html: a study in one file that needs no network, made from the files in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from crosstrain.page import document, part
from crosstrain.studies.report_figures import Chart, accuracy_chart, as_json, charts
from crosstrain.studies.report_samples import samples_section
from crosstrain.studies.report_style import Style, styles
from crosstrain.studies.report_tables import (
    contrasts_tables,
    costs_table,
    measures_guide,
    measures_table,
    methods_section,
    runs_table,
    settings_section,
)
from crosstrain.studies.report_text import UNITS, Results, quantity, say_verdict
from crosstrain.studies.results import write_results


def write_report(folder: Path) -> Path:
    """Write `results.json` and `report.html` into a study's folder, and return the path of the latter.

    Runs that failed or have not ended are shown as such. UserError when the folder holds no study.
    """
    folder = Path(folder)
    results = write_results(folder)
    path = folder / "report.html"
    temporary = path.with_name(".report.html.tmp")
    temporary.write_text(render(results, folder), encoding="utf-8")
    temporary.replace(path)
    return path


def render(results: Results, folder: Path) -> str:
    """The whole page."""
    looks = styles(results["arms"])
    accuracy = accuracy_chart(results, looks)
    others = charts(results, folder, looks)
    drawn = [chart for chart in (accuracy, *others) if chart is not None]
    body = "".join(
        [
            _header(results),
            _verdict(results),
            accuracy.html(looks) if accuracy else "",
            _section("Every arm and measure", _ABOUT_TABLE, measures_table(results, looks), measures_guide(results)),
            _section("Planned comparisons", _about_contrasts(results), contrasts_tables(results)),
            _section("Trade-offs and curves", "", _grid(others, looks)),
            _section("The same questions, side by side", _ABOUT_SAMPLES, samples_section(results, folder, looks)),
            _section("What it cost", _about_budget(results), costs_table(results, looks)),
            _section("What each arm is", "", methods_section(results, looks)),
            _section("Every run", "", runs_table(results, looks)),
            _section("Settings and versions", "", settings_section(results)),
            _section("How to read this, and what it cannot say", "", _caveats(results)),
        ]
    )
    return _page(str(results["study"]["title"]), body, {chart.id: chart.figure for chart in drawn})


def _page(title: str, body: str, figures: Mapping[str, object]) -> str:
    return document(
        title,
        body,
        styles=[part("crosstrain.studies", "report.css")],
        scripts=[
            f'<script type="application/json" id="figures">{as_json(figures)}</script>',
            f"<script>{get_plotlyjs()}</script><script>{part('crosstrain.studies', 'report.js')}</script>",
        ],
    )


def _section(title: str, about: str, *parts: str) -> str:
    said = f'<p class="about">{about}</p>' if about else ""
    return f"<section><h2>{escape(title)}</h2>{said}{''.join(parts)}</section>" if any(parts) else ""


def _grid(found: Sequence[Chart], looks: Mapping[str, Style]) -> str:
    return f'<div class="grid">{"".join(chart.html(looks) for chart in found)}</div>' if found else ""


def _header(results: Results) -> str:
    study = results["study"]
    trained = [arm for arm in results["arms"] if not arm["base"]]
    seeds = len(study["spec"]["seeds"])
    budget = study["spec"]["budget"]
    model = (results["setup"] or {}).get("model", study["spec"]["shared"]["model"]["name"])
    facts = (
        f"{len(trained)} arms x {seeds} training seed{'s' if seeds != 1 else ''}, each with a budget of "
        f"{quantity(budget['amount'])} {UNITS[budget['unit']]}"
    )
    when = str(study["finished_at"] or study["started_at"] or "")[:10]
    banners = "".join(f'<p class="banner" role="note">{escape(text)}</p>' for text in banner_texts(results))
    return (
        f'<header><p class="kicker">crosstrain study</p><h1>{escape(str(study["title"]))}</h1>'
        f'<p class="meta">{escape(str(model))}<br>{escape(facts)}<br>{escape(when)}</p>{banners}</header>'
    )


def banner_texts(results: Results) -> list[str]:
    """What a reader must know before anything else."""
    study, runs = results["study"], [run for arm in results["arms"] for run in arm["runs"]]
    texts = []
    if study["quick"]:
        texts.append("Quick mode: a taste with a fraction of the budget and the questions. Conclude nothing from it.")
    if study["status"] != "finished":
        waiting = sum(run["status"] not in ("finished", "failed") for run in runs)
        texts.append(
            f"The study has not finished: {waiting} of {len(runs)} runs are still to come, and the numbers will change."
        )
    if failed := sum(run["status"] == "failed" for run in runs):
        texts.append(f"{failed} of {len(runs)} runs failed; the numbers are about the others. See Every run.")
    if study["budget"] and not study["budget"]["equal"]:
        texts.append("Not every run spent the same budget within a step; see study.json, budget.")
    return texts


def _verdict(results: Results) -> str:
    said = say_verdict(results)
    points = "".join(f"<li>{escape(text)}</li>" for text in said.points)
    more = f"<details><summary>All findings in words</summary><ul>{points}</ul></details>" if points else ""
    key = "".join(f"<li>{escape(text)}</li>" for text in said.key)
    key = f"<ul>{key}</ul>" if key else ""
    return (
        f'<section class="answer"><h2>{escape(said.headline)}</h2><p class="lead">{escape(said.lead)}</p>{key}{more}</section>'
    )


_ABOUT_TABLE = (
    "Means over questions and seeds, with 95% intervals below. A column headed Δ is a change against the untrained model. "
    "Choose a heading to sort."
)
_ABOUT_SAMPLES = (
    "The first two questions of each set and the first two replies of each arm's first finished run: chosen by position, "
    "not by how they turned out."
)


def _about_contrasts(results: Results) -> str:
    once = (
        "" if results["scope"] == "method" else " With one seed per arm p is about these very models, so no verdict is given."
    )
    return (
        "Decided before the study ran: every arm against the untrained model, every RL or hybrid arm against the references. "
        "Differences are paired by question. p is two-sided; the verdict goes by p after Holm's correction over the table "
        f"({results['alpha']:g}). Intervals are not corrected. The last column is the true difference that the study would find "
        f"in 80 of 100 cases.{once}"
    )


def _about_budget(results: Results) -> str:
    budget = results["study"]["spec"]["budget"]
    return (
        f"Means over finished runs, training only. Held equal: {UNITS[budget['unit']]}, {quantity(budget['amount'])} per run, "
        "give or take one step per stage. FLOPs count 6 N per token through forward and backward and 2 N through forward only."
    )


def _caveats(results: Results) -> str:
    method = (
        "Intervals are about the method: over training seeds and over questions like these. The variance between seeds is pooled "
        "over all arms, so an arm that varies more than the others has an interval that is too narrow."
    )
    models = (
        "Each arm was trained with one seed, so intervals are about these very models: they say how the questions differ, not how "
        "training does."
    )
    items = [
        method if results["scope"] == "method" else models,
        "Evaluation sets are taken as given and their questions as drawn at random. Other tasks may rank the arms differently.",
        "This is one model of one size. What holds for a small model need not hold for a large one.",
        "Learning rates were "
        + (
            "searched for each arm on development questions (tuning.json)."
            if results["study"]["tune"]
            else "taken from the study file; an arm whose rate suits it better has an advantage that is not the method's."
        ),
        "Forward and reverse KL and entropy are estimated from samples.",
        "Every number can be computed again from the files in this folder: results.json says which, and crosstrain report "
        "rebuilds this page.",
    ]
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
