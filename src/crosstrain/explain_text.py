"""A step that `explain_step` looked at, in words and in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crosstrain.errors import visible

Found = Mapping[str, Any]

UP, DOWN = "cyan", "red"
"""Told apart by the colour-blind too; the sign of each number says the same."""

PROMPT_LENGTH = 400
"""Characters of a prompt, counted from its end, that a terminal is shown."""


def sentence(found: Found) -> str:
    """In one plain sentence what the step would teach, from its numbers.

    Completions are right or wrong where rewards are 0 (or -1) and 1, else better or worse than the mean of their group.
    """
    parts = list(_parts(found))
    total = sum(size for _, _, size in parts)
    if not total:
        return f"This step {_nothing(found)}."
    up = Counter(label for label, net, _ in parts if net > 0)
    down = Counter(label for label, net, _ in parts if net < 0)
    said = " and ".join([f"raises {_listed(up)}"] * bool(up) + [f"lowers {_listed(down)}"] * bool(down))
    sizes: Counter[str] = Counter()
    for label, _, size in parts:
        sizes[label] += size
    where = ""
    [(label, size)] = sizes.most_common(1)
    if len(sizes) > 1 and size > 0.5 * total:
        number = sum(name == label and part > 0 for name, _, part in parts)
        where = f"; {size / total:.0%} of the weight is on the {_plural(label, number)}"
    dropped = sum(not g["selected"] for g in found["groups"])
    left = f"; {dropped} of {len(found['groups'])} groups are left out" if dropped else ""
    return f"This step {said}{where}{left}{_not_shown(found)}."


def _nothing(found: Found) -> str:
    if found["unseen"]:
        tokens = max(t["tokens"] for t in found["terms"] if t["name"] in found["unseen"]["terms"])
        return f"changes {_channels(found)} at {tokens} tokens, which a weight per token does not show"
    if not any(g["selected"] for g in found["groups"]):
        return "teaches nothing: the method leaves out every group"
    rewards = [{t["reward"] for t in g["trajectories"] if t["reward"] is not None} for g in found["groups"]]
    if all(len(known) == 1 for known in rewards):
        return "teaches nothing: the rewards are equal within every group"
    return "teaches nothing: no token has a weight"


def _not_shown(found: Found) -> str:
    unseen = found["unseen"]
    if not unseen:
        return ""
    return f"; {unseen['share_of_norms']:.0%} of the gradient acts on {_channels(found)}, which weights do not show"


def _channels(found: Found) -> str:
    """What terms act on beside log-probs."""
    channels = {c for t in found["terms"] for c in t["through"]} - {"logp"}
    names = ["the value head's output"] * ("value" in channels)
    return " and ".join([*names, *(["the whole next-token distribution"] if channels - {"value"} else [])])


def _parts(found: Found) -> Iterator[tuple[str, float, float]]:
    """What one author wrote of each trajectory: a label, the sum of its weights, and the sum of their sizes."""
    for group in found["groups"]:
        for t in group["trajectories"]:
            label = label_of(t, group, found)
            own = {"expert": "hint" if t["kind"].startswith("completion") else label, "policy": label, "tool": "tool's answer"}
            for source, name in own.items():
                weights = [w for w, s in zip(t["weights"], t["source"], strict=True) if s == source]
                if any(weights):
                    yield name, sum(weights), sum(map(abs, weights))


def label_of(t: Mapping[str, Any], group: Mapping[str, Any], found: Found) -> str:
    """What a trajectory is called in a sentence."""
    names = {"chosen": "chosen answer", "rejected": "rejected answer", "demonstration": "demonstration"}
    if t["kind"] in names:
        return names[t["kind"]]
    if t["reward"] is None:
        return "completion"
    every = {o["reward"] for g in found["groups"] for o in g["trajectories"] if "completion" in o["kind"]} - {None}
    if every <= {0.0, 1.0} or every <= {-1.0, 1.0}:
        return "right completion" if t["reward"] > 0 else "wrong completion"
    own = [o["reward"] for o in group["trajectories"] if "completion" in o["kind"] and o["reward"] is not None]
    return "better completion" if t["reward"] > sum(own) / len(own) else "worse completion"


def _listed(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{n} {_plural(label, n)}" for label, n in counts.items())


def _plural(label: str, n: int) -> str:
    return label if n == 1 else label + "s"


def notes(found: Found, *, old_given: bool) -> list[str]:
    """What a reader must know of the numbers beside the sentence."""
    said = []
    if found["updates"] > 1:
        said.append(
            f"Training takes {found['updates']} optimizer steps on these groups. Each is divided by its own counts; the model is "
            "shown as it is before the first."
        )
    if not old_given and any("old_logp" in t["reads"] for t in found["terms"]):
        said.append(
            "The old policy is the model itself, so that ratios are 1 and no clip acts; --old MODEL shows a later update."
        )
    unseen = found["unseen"]
    if unseen:
        names = ", ".join(unseen["terms"])
        part = " in part" if unseen["mixed"] else ""
        said.append(
            f"The term {names} acts{part} on {_channels(found)}, which a weight per token cannot show: "
            f"{unseen['share_of_norms']:.0%} of the terms' gradient norms."
        )
    return said


def show(found: Found, out: Console) -> None:
    """Print the step: terms, then every token with its weight, then the sentence."""
    settings = ", ".join(f"{k}={v}" for k, v in found["settings"].items())
    out.print(Text.assemble((found["method"], "bold"), f"  {settings}"))
    terms = Table("term", "tokens", "divided by", "loss", "share of weight", "acts on")
    for t in found["terms"]:
        share = f"{t['share']:.1%}" if any(o["share"] for o in found["terms"]) else "-"
        terms.add_row(t["name"], str(t["tokens"]), f"{t['denominator']:g}", f"{t['loss']:.4g}", share, _acts(t))
    out.print(terms)
    if found["sources"]:
        names = {"expert": "expert tokens", "policy": "own tokens", "tool": "tools' tokens"}
        by_author = ", ".join(f"{names[s]} {share:.1%}" for s, share in found["sources"].items())
        out.print(Text(f"weight by author: {by_author}"))
    largest = largest_weight(found)
    for group in found["groups"]:
        out.print(Text(f"\n{group['id']}" + ("" if group["selected"] else "  (left out)"), style="bold"))
        shown = group["prompt"][-PROMPT_LENGTH:]
        out.print(Text(("…" if len(shown) < len(group["prompt"]) else "") + one_line(shown), style="dim"))
        for k, t in enumerate(group["trajectories"]):
            same = same_weight(t)
            out.print(Text(f"  {k}  {headline(t)}" + ("" if same is None else f"  every token {same:+.2g}")))
            if t["selected"]:
                out.print(_tokens(t, largest))
    out.print()
    for note in found["notes"]:
        out.print(Text(note, style="dim"))
    out.print(Text(found["summary"], style="bold"))


def _acts(term: Mapping[str, Any]) -> str:
    known = {"logp": "log-probs", "value": "values"}
    names = [known.get(c, f"whole distribution ({c})") for c in term["through"]]
    return ", ".join(names) or "nothing"


def headline(t: Mapping[str, Any]) -> str:
    """A trajectory's kind, reward, advantage, and whether it counts."""
    reward = "-" if t["reward"] is None else f"{t['reward']:g}"
    a = t["advantage"]
    advantage = "-" if a is None else "per token" if isinstance(a, list) else f"{a:+.3g}"
    more = ("" if t["finished"] else "  cut at the limit") + ("" if t["selected"] else "  not selected")
    return f"{t['kind']}  reward {reward}  advantage {advantage}{more}"


def largest_weight(found: Found) -> float:
    """The size of the largest weight of the step, 0 where there is none."""
    return max((abs(w) for g in found["groups"] for t in g["trajectories"] for w in t["weights"]), default=0.0)


def one_line(text: str) -> str:
    """Text of a model or a file on one line, unable to steer a terminal."""
    return visible(text).replace("\n", "⏎").replace("\t", "⇥")


def same_weight(t: Mapping[str, Any]) -> float | None:
    """The weight that every token of a trajectory has; None where they differ, or none has any."""
    weights = t["weights"]
    alike = bool(weights) and max(weights) - min(weights) <= 1e-6 * abs(weights[0])
    return weights[0] if alike and weights[0] else None


def _tokens(t: Mapping[str, Any], largest: float) -> Text:
    """The tokens in colour, each with its number unless all have the same."""
    line, before, same = Text("     "), "", same_weight(t) is not None
    for token, source, weight in zip(t["tokens"], t["source"], t["weights"], strict=True):
        if source != before and (before or source != "policy"):
            line.append(f"[{source}] ", style="italic dim")
        before = source
        text = one_line(token) or "·"
        if not weight:
            line.append(text, style="dim")
            continue
        strong = abs(weight) > 0.5 * largest
        line.append(text, style=("bold " if strong else "") + (UP if weight > 0 else DOWN))
        if not same:
            line.append(f"‹{weight:+.2g}› ", style="dim")
    return line
