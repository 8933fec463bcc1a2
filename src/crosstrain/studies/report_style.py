"""How arms look: one colour, marker and line per arm in every chart, safe for colour-blind readers, and the legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from crosstrain.studies.report_text import shown

# Okabe and Ito's palette without black and yellow, which vanish on dark and on white; markers tell repeated colours apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = {
    "circle": "M6 1a5 5 0 1 0 .01 0z",
    "square": "M1.5 1.5h9v9h-9z",
    "diamond": "M6 0l6 6-6 6-6-6z",
    "triangle-up": "M6 1l5.5 10H.5z",
    "triangle-down": "M6 11L.5 1h11z",
    "star": "M6 0l1.6 4 4.4.3-3.4 2.8 1.1 4.3L6 9 2.3 11.4l1.1-4.3L0 4.3 4.4 4z",
    "pentagon": "M6 .5l5.7 4.2-2.2 6.8h-7L.3 4.7z",
}
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Style:
    """An arm's colour, plotly marker symbol and plotly dash."""

    colour: str
    marker: str
    dash: str


def styles(arms: Sequence[Mapping[str, Any]]) -> dict[str, Style]:
    """A style for every arm; the base is grey."""
    found: dict[str, Style] = {}
    markers = list(MARKERS)
    trained = [arm["name"] for arm in arms if not arm["base"]]
    for i, name in enumerate(trained):
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        found[name] = Style(COLOURS[i % len(COLOURS)], markers[i % len(markers)], dash)
    return {"base": Style("#8A8A8A", "circle", "solid"), **found} if len(trained) < len(arms) else found


def swatch(style: Style) -> str:
    """The arm's marker as a small picture."""
    path = MARKERS[style.marker]
    return f'<svg class="swatch" viewBox="0 0 12 12" aria-hidden="true"><path d="{path}" fill="{style.colour}"/></svg>'


def arm_name(name: str, looks: Mapping[str, Style]) -> str:
    """An arm's marker and name, as HTML."""
    label = "untrained (base)" if name == "base" else shown(name)
    return f'<span class="arm">{swatch(looks[name])}{escape(label)}</span>'


def legend(names: Sequence[str], looks: Mapping[str, Style]) -> str:
    """The arms of a chart, as HTML."""
    return f'<p class="legend">{"".join(arm_name(name, looks) for name in names)}</p>'
