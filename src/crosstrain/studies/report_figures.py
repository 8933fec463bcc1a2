"""The report's charts, as plotly figures in JSON; report.js draws them in the reader's colours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from crosstrain.studies.report_style import Style, legend
from crosstrain.studies.report_text import UNITS, Results, measure_of, shown
from crosstrain.training.record import read_lines

MOST_POINTS = 200
"""Longer runs are thinned to this many points per curve."""

NOT_CURVES = ("step", "stage", "method", "epoch", "learning_rate", "skipped_steps", "step_time")
FIRST_CURVES = ("eval_accuracy", "reward", "loss", "entropy", "mean_token_accuracy", "grad_norm")


@dataclass(frozen=True)
class Chart:
    """A chart of the report: its id, heading, what it shows, the arms in it, plotly's figure, controls above it as HTML."""

    id: str
    title: str
    about: str
    arms: tuple[str, ...]
    figure: Mapping[str, Any]
    controls: str = ""
    wide: bool = False

    def html(self, looks: Mapping[str, Style]) -> str:
        """The place where it is drawn."""
        return (
            f'<figure class="chart{" wide" if self.wide else ""}"><figcaption><h3>{escape(self.title)}</h3>'
            f"<p>{escape(self.about)}</p></figcaption>{self.controls}{legend(self.arms, looks)}"
            f'<div class="plot" id="{self.id}" role="img" aria-label="{escape(self.title)}"></div></figure>'
        )


def charts(results: Results, folder: Path, looks: Mapping[str, Style]) -> list[Chart]:
    """Every chart that the study has the numbers for."""
    keys = {m["key"] for m in results["measures"]}
    found: list[Chart] = []
    if "accuracy" in keys:
        if "forgetting/nll" in keys:
            found.append(_forgetting_chart(results, looks))
        found.append(_cost_chart(results, looks))
    if results["pass_at_k"] and len(next(iter(results["pass_at_k"].values()))) > 1:
        found.append(_pass_chart(results, looks))
    curves = learning_curves(results, folder)
    if curves["curves"]:
        found.append(_curve_chart(results, curves, looks))
    return found


def accuracy_chart(results: Results, looks: Mapping[str, Style]) -> Chart | None:
    """Accuracy of every arm with its interval, best first; None when nothing was asked."""
    shown_keys = [m["key"] for m in results["measures"] if m["key"] in ("accuracy", "ood_accuracy")]
    if not shown_keys:
        return None
    first = measure_of(results, shown_keys[0])["arms"]
    names = sorted(first, key=lambda name: first[name]["mean"])
    data = []
    for k, key in enumerate(shown_keys):
        measure = measure_of(results, key)
        for i, name in enumerate(names):
            if name in measure["arms"]:
                trace = _points([measure["arms"][name]], "x", looks[name], filled=k == 0)
                trace |= {
                    "y": [i + (0.15 if k == 0 else -0.2) * (len(shown_keys) - 1)],
                    "name": f"{_text(name)}, {measure['label']}",
                }
                data.append(trace)
    layout = {
        "xaxis": {"tickformat": ".0%", "rangemode": "tozero", "title": {"text": "accuracy, 95% interval"}},
        "yaxis": {
            "tickvals": list(range(len(names))),
            "ticktext": [_text(name) for name in names],
            "range": [-0.6, len(names) - 0.4],
            "showgrid": False,
        },
        "height": 110 + 44 * len(names),
    }
    about = "Filled: in distribution. Hollow: out of distribution. Best in distribution on top."
    return Chart(
        "fig-accuracy", "Accuracy", about if len(shown_keys) > 1 else "", (), {"data": data, "layout": layout}, wide=True
    )


def _forgetting_chart(results: Results, looks: Mapping[str, Style]) -> Chart:
    accuracy, forgetting = measure_of(results, "accuracy")["arms"], measure_of(results, "forgetting/nll")["arms"]
    names = [a["name"] for a in results["arms"] if a["name"] in accuracy and a["name"] in forgetting]
    data = []
    for name in names:
        trace = _points([accuracy[name]], "y", looks[name])
        across = _points([forgetting[name]], "x", looks[name])
        data.append({**trace, "x": across["x"], "error_x": across["error_x"], "name": _text(name)})
    layout = {
        "xaxis": {"title": {"text": "forgetting (nats per token)"}, "zeroline": True},
        "yaxis": {"title": {"text": "accuracy"}, "tickformat": ".0%"},
    }
    about = "Up is better at the task, left is better at what the model knew before. Bars are 95% intervals."
    return Chart("fig-forgetting", "Accuracy against forgetting", about, tuple(names), {"data": data, "layout": layout})


def _cost_chart(results: Results, looks: Mapping[str, Style]) -> Chart:
    accuracy = measure_of(results, "accuracy")["arms"]
    arms = [a for a in results["arms"] if a["name"] in accuracy and a["cost"]]
    data = [
        {
            **_points([accuracy[arm["name"]]], "y", looks[arm["name"]]),
            "name": _text(arm["name"]),
            "x": [arm["cost"]["seconds"]],
            "costs": arm["cost"],
        }
        for arm in arms
    ]
    layout = {
        "xaxis": {"title": {"text": UNITS["seconds"]}},
        "yaxis": {"title": {"text": "accuracy"}, "tickformat": ".0%"},
    }
    held = UNITS[results["study"]["spec"]["budget"]["unit"]]
    about = f"Mean cost of a run. {held[0].upper()}{held[1:]} were held equal; the other axes show what that meant."
    controls = _select("cost-axis", "Cost", UNITS, "seconds")
    names = tuple(a["name"] for a in arms)
    return Chart("fig-cost", "Accuracy against cost", about, names, {"data": data, "layout": layout}, controls)


def _pass_chart(results: Results, looks: Mapping[str, Style]) -> Chart:
    data = []
    names = [a["name"] for a in results["arms"] if a["name"] in results["pass_at_k"]]
    for name in names:
        points = results["pass_at_k"][name]
        trace = _points(points, "y", looks[name])
        trace |= {"x": [p["k"] for p in points], "mode": "lines+markers", "name": _text(name)}
        data.append({**trace, "line": {"color": looks[name].colour, "width": 2, "dash": looks[name].dash}})
    ks = [p["k"] for p in results["pass_at_k"][names[0]]]
    layout = {
        "xaxis": {"title": {"text": "k, samples per question"}, "tickvals": ks if len(ks) <= 8 else None},
        "yaxis": {"title": {"text": "pass@k"}, "tickformat": ".0%"},
    }
    about = (
        "Chance that one of k samples is right; a lift at k = 1 alone is certainty more than ability. Bars are 95% intervals."
    )
    return Chart("fig-pass", "pass@k", about, tuple(names), {"data": data, "layout": layout})


def _curve_chart(results: Results, curves: Mapping[str, Any], looks: Mapping[str, Style]) -> Chart:
    unit = results["study"]["spec"]["budget"]["unit"]
    metrics = curves["metrics"]
    axis = _select("curve-axis", "Against", {**UNITS, "step": "steps"}, unit)
    metric = _select("curve-metric", "Show", {name: name for name in metrics}, metrics[0])
    drawn = {
        "unit": unit,
        "units": {**UNITS, "step": "steps"},
        "curves": curves["curves"],
        "looks": {
            name: {"colour": looks[name].colour, "dash": looks[name].dash, "label": _text(name)} for name in curves["curves"]
        },
    }
    about = (
        "One thin line per finished training seed, a thick one for their mean. Losses of different methods are different "
        "quantities; rewards are of training questions."
    )
    return Chart(
        "fig-curves",
        "Learning curves",
        about,
        tuple(curves["curves"]),
        drawn,
        f'{metric}{axis}<p class="note" id="curve-note"></p>',
        wide=True,
    )


def learning_curves(results: Results, folder: Path) -> dict[str, Any]:
    """The metrics of every run along the way: `{arm: [{"x": {unit: [...]}, "y": {metric: [...]}}, ...]}` and the metrics' names."""
    curves: dict[str, list[dict[str, Any]]] = {}
    seen: dict[str, None] = {}
    for arm in results["arms"]:
        # A run that failed would cut the mean short where it stopped.
        finished = [run for run in arm["runs"] if run["status"] == "finished"]
        for run in finished or arm["runs"]:
            lines = read_lines(folder / run["folder"] / "metrics.jsonl")
            lines = lines[:: math.ceil(len(lines) / MOST_POINTS)] if lines else []
            if arm["base"] or len(lines) < 2:
                continue
            names = [
                key
                for key in dict.fromkeys(key for line in lines for key in line)
                if key not in NOT_CURVES
                and not key.startswith(("cost/", "time/"))
                and any(_is_number(line.get(key)) for line in lines)
            ]
            seen |= dict.fromkeys(names)
            x = {unit: [line.get(f"cost/{unit}") for line in lines] for unit in UNITS} | {
                "step": [line["step"] for line in lines]
            }
            y = {name: [_short(line.get(name)) for line in lines] for name in names}
            curves.setdefault(arm["name"], []).append({"seed": run["seed"], "x": x, "y": y})
    first = [name for name in FIRST_CURVES if name in seen]
    return {"curves": curves, "metrics": first + sorted(name for name in seen if name not in first)}


def _points(values: Sequence[Mapping[str, Any]], axis: str, style: Style, *, filled: bool = True) -> dict[str, Any]:
    """A scatter trace with the values and their intervals on one axis."""
    means = [v["mean"] for v in values]
    up = [0 if v["high"] is None else v["high"] - v["mean"] for v in values]
    down = [0 if v["low"] is None else v["mean"] - v["low"] for v in values]
    return {
        "type": "scatter",
        "mode": "markers",
        axis: means,
        f"error_{axis}": {
            **{"type": "data", "symmetric": False, "array": up, "arrayminus": down},
            **{"color": style.colour, "thickness": 1.6, "width": 0},
        },
        "marker": {
            "color": style.colour,
            "symbol": style.marker + ("" if filled else "-open"),
            "size": 10,
            "line": {"width": 0 if filled else 1.8, "color": style.colour},
        },
    }


def _text(name: str) -> str:
    """A name as plotly takes it, whose texts are a little HTML."""
    return escape("untrained (base)" if name == "base" else shown(name), quote=False)


def _select(id_: str, label: str, options: Mapping[str, str], chosen: str) -> str:
    listed = "".join(
        f'<option value="{escape(key)}"{" selected" if key == chosen else ""}>{escape(text)}</option>'
        for key, text in options.items()
    )
    return f'<label class="control">{escape(label)} <select id="{id_}">{listed}</select></label>'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> float | None:
    return float(f"{value:.5g}") if _is_number(value) else None


def as_json(value: Any) -> str:
    """JSON that is safe inside a script element, whatever text is in it.

    >>> as_json("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
