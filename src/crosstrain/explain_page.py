"""explain.html: a step that `explain_step` looked at, every token coloured by its weight, in one file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from crosstrain.explain_text import Found, largest_weight, same_weight
from crosstrain.page import document, part

AUTHORS = {"expert": "expert tokens", "policy": "own tokens", "tool": "tools' tokens", "prompt": "prompt"}


def page(found: Found) -> str:
    """The whole page: the sentence first, then where the weight is, then every token."""
    largest = largest_weight(found)
    body = "".join(
        [
            _header(found),
            f'<section class="answer"><p class="lead">{escape(found["summary"])}</p>{_notes(found["notes"])}</section>',
            f'<section><h2>Where the weight is</h2><p class="about">{_ABOUT}</p>{_terms(found)}{_authors(found)}</section>',
            f"<section><h2>Every token</h2>{_legend(largest)}{''.join(_group(g, largest) for g in found['groups'])}</section>",
            '<p id="readout" role="status" hidden></p>',
        ]
    )
    return document(
        f"explain {found['method']}",
        body,
        styles=[part("crosstrain.studies", "report.css"), part("crosstrain", "explain.css")],
        scripts=[f"<script>{part('crosstrain', 'explain.js')}</script>"],
    )


_ABOUT = (
    "The weight of a token is how strongly the step pushes its log-probability: minus the derivative of the loss, divided as in "
    "training. The share is of the sizes of all weights."
)


def _header(found: Found) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in found["settings"].items())
    facts = "<br>".join(escape(text) for text in (f"model {found['model']}", *found["data"], settings) if text)
    return (
        f'<header><p class="kicker">crosstrain explain</p><h1>One step of {escape(found["method"])}</h1>'
        f'<p class="meta">{facts}</p></header>'
    )


def _notes(texts: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def _terms(found: Found) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(t["name"])}</th><td>{_bar(t["share"])}</td><td>{t["tokens"]}</td>'
        f"<td>{t['denominator']:g}</td><td>{t['loss']:.4g}</td><td>{escape(_acts(t))}</td></tr>"
        for t in found["terms"]
    )
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("term", "share of weight", "tokens", "divided by", "loss", "acts on"))
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _acts(term: Mapping[str, Any]) -> str:
    known = {"logp": "log-probs", "value": "values"}
    return ", ".join(known.get(c, "the whole distribution") for c in term["through"]) or "nothing"


def _bar(share: float) -> str:
    return f'<span class="share"><span style="width:{100 * share:.1f}%"></span></span><span class="part">{share:.1%}</span>'


def _authors(found: Found) -> str:
    rows = "".join(
        f'<tr><th scope="row">{AUTHORS[source]}</th><td>{_bar(share)}</td></tr>' for source, share in found["sources"].items()
    )
    return (
        '<div class="scroll" tabindex="0"><table><thead><tr><th scope="col">written by</th><th scope="col">share of weight</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
        if rows
        else ""
    )


def _legend(largest: float) -> str:
    if not largest:
        return ""
    samples = (
        '<span class="t up" style="--a:1">made more likely</span> blue, line below',
        '<span class="t down" style="--a:1">made less likely</span> orange, dotted line below',
        '<span class="t">no weight</span>',
    )
    return (
        f'<p class="about">{"; ".join(samples)}. The stronger the colour the larger the weight; the largest is {largest:.3g}. '
        "Point at a token, or tap it, for its numbers.</p>"
    )


def _group(group: Mapping[str, Any], largest: float) -> str:
    left = "" if group["selected"] else ' <span class="verdict">left out by the method</span>'
    where = f" <small>{escape(group['where'])}</small>" if group["where"] else ""
    cards = "".join(_trajectory(k, t, largest) for k, t in enumerate(group["trajectories"]))
    return (
        f'<article class="group"><h3>{escape(group["id"])}{where}{left}</h3>'
        f'<pre class="prompt">{escape(group["prompt"])}</pre>{cards}</article>'
    )


def _trajectory(k: int, t: Mapping[str, Any], largest: float) -> str:
    a = t["advantage"]
    facts = [
        f"reward {'unknown' if t['reward'] is None else format(t['reward'], 'g')}",
        f"advantage {'none' if a is None else 'per token' if isinstance(a, list) else format(a, '+.3g')}",
    ]
    same = same_weight(t)
    facts += [] if same is None else [f"every token {same:+.3g}"]
    facts += [] if t["finished"] else ["cut at the limit"]
    facts += [] if t["selected"] else ["not selected"]
    net = sum(t["weights"])
    mark = "better" if net > 0 else "worse" if net < 0 else ""
    word = {"better": "raised", "worse": "lowered", "": "no weight"}[mark]
    head = (
        f'<p class="facts-line"><strong>{k}&ensp;{escape(t["kind"])}</strong><span>{", ".join(facts)}</span>'
        f'<span class="verdict {mark}">{word}</span></p>'
    )
    return f'<div class="tokens{"" if t["selected"] else " out"}">{head}<p class="text">{_tokens(t, largest)}</p></div>'


def _tokens(t: Mapping[str, Any], largest: float) -> str:
    html, before = [], ""
    for i, (token, source, weight) in enumerate(zip(t["tokens"], t["source"], t["weights"], strict=True)):
        if source != before and (before or "hint" in t["kind"]):
            html.append(f'<small class="who">{AUTHORS[source]}</small>')
        before = source
        side = " up" if weight > 0 else " down" if weight < 0 else ""
        strength = f' style="--a:{math.sqrt(abs(weight) / largest):.3f}"' if side else ""  # small weights are to be seen too
        # a line end inside a token is shown, and still ends the line
        text = escape(token).replace("\n", "<i>⏎</i>\n") if token else "<i>·</i>"
        html.append(f'<span class="t{side}"{strength} title="{escape(_numbers(t, i), quote=True)}">{text}</span>')
    return "".join(html)


def _numbers(t: Mapping[str, Any], i: int) -> str:
    logp = t["logp"][i]
    said = [f"weight {t['weights'][i]:+.4g}" if t["weights"][i] else "no weight"]
    said += [f"{name} {values[i]:+.4g}" for name, values in t["by_term"].items() if values[i]]
    said += [] if logp is None else [f"log-prob {logp:.3f}"]
    return ", ".join([*said, AUTHORS[t["source"][i]]])
