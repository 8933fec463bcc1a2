"""The pages of docs/methods: one for each registered method and an index, all from the methods' own records.

python -m crosstrain.method_pages docs/methods
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosstrain.methods import METHODS
from crosstrain.methods.describe import record
from crosstrain.methods.registry import DIRECTIONS

MADE_BY = "<!-- Made by `python -m crosstrain.method_pages docs/methods` from the method's own record; edit that. -->"
"""The last line of a page, which tells it from one that somebody wrote."""

CHECKED = {
    "official source": "its authors' code and the paper",
    "port": "a framework's port of it",
    "paper": "the paper alone",
    "reconstructed": "descriptions by others: its source could not be established",
}

LEARNS = {
    "offline": "the rows alone; nothing is sampled",
    "online": "its own completions",
    "offline + online": "its own completions, and demonstrations",
}


def pages() -> dict[str, str]:
    """Every page's text by file name.

    >>> found = pages()
    >>> len(found) == len(METHODS) + 1, found["dft.md"].splitlines()[0]
    (True, '# dft')
    """
    records = [record(name) for name in METHODS]
    return {"README.md": index(records), **{f"{found['name']}.md": page(found) for found in records}}


def write(folder: Path) -> list[Path]:
    """Write all pages, and remove those made for methods that are gone; the paths of what changed."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted, changed = pages(), []
    for name, text in wanted.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    for path in folder.glob("*.md"):
        if path.name not in wanted and MADE_BY in path.read_text(encoding="utf-8"):
            path.unlink()
            changed.append(path)
    return changed


def index(records: Sequence[Mapping[str, Any]]) -> str:
    """All methods by family."""
    families = [family for family in DIRECTIONS if any(found["family"] == family for found in records)]
    parts = [
        "# The methods",
        f"{len(records)} methods, each a page with its objective, the weight that it gives to a token, its settings, and how far "
        "it was checked. `crosstrain methods show NAME` prints the same, `--json` for a program.",
    ]
    for family in families:
        rows = [
            (
                f"[{r['name']}]({r['name']}.md)",
                r["summary"],
                ", ".join(r["needs"]) or "nothing",
                _paper(r["paper"]),
                r["checked"],
            )
            for r in records
            if r["family"] == family
        ]
        parts += [
            f"## {family[0].upper()}{family[1:]}",
            _table(("method", "what it does", "needs", "paper", "written from"), rows),
        ]
    parts += ["### Left out", *LEFT_OUT]
    return "\n\n".join([*parts, MADE_BY]) + "\n"


LEFT_OUT = (
    "BRIDGE ([arXiv:2509.06948](https://arxiv.org/abs/2509.06948)): its code could not be obtained, and neither the weights of its "
    "fused gradient nor the schedule of its second set of adapters are stated where we could read them. What is left without these "
    "is a mixture of SFT and RL, which `chord_mu` is.",
)
"""What the survey or its field has and this does not, with the reason."""


def page(found: Mapping[str, Any]) -> str:
    """A method's page."""
    idea = [block for text in found["idea"] for block in _blocks(text)]
    parts = [f"# {found['name']}", found["summary"], *idea, _facts(found), "## Objective", *_formulas("Loss", found["loss"])]
    parts += [*_formulas("Weight of a token", found["weight"]), "## Terms", *_terms(found["terms"])]
    parts += ["## Settings", *_settings(found)]
    parts += ["## Notes", *(block for note in found["notes"] for block in _blocks(note))] if found["notes"] else []
    for title, key in (("When it helps", "works"), ("When it does not", "fails"), ("Where this one differs", "deviates")):
        parts += [f"## {title}", found[key]] if found[key] else []
    parts += how_checked(found)
    return "\n\n".join([*parts, "[All methods](README.md)", MADE_BY]) + "\n"


def how_checked(found: Mapping[str, Any]) -> list[str]:
    """The seven proofs of a page: of each the test, or why there is none."""
    core = found["core"]
    about = [f"A named setting or a close variant of [{core}]({core}.md)."] if core else []
    rows = [(p["proof"], f"`{p['test']}`" if p["test"] else f"none: {p['reason']}") for p in found["proofs"]]
    return ["## How it was checked", *about, _table(("proof", "test"), rows)]


def _facts(found: Mapping[str, Any]) -> str:
    steps = found["updates"]["epochs"] * found["updates"]["minibatches"]
    rows = [
        ("family", ", ".join(dict.fromkeys((found["family"], found["direction"])))),
        ("learns from", LEARNS[found["data"]]),
        ("needs", ", ".join(found["needs"]) or "nothing beside a model and prompts"),
        ("paper", f"{_paper(found['paper'])}, {found['year']}"),
        ("written from", CHECKED[found["checked"]]),
        ("optimizer steps per batch", f"{steps} by default"),
    ]
    return _table(("", ""), rows)


def _terms(terms: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        (
            f"`{t['name']}`",
            t["on"],
            t["per"],
            t["coefficient"] if isinstance(t["coefficient"], str) else f"{t['coefficient']:g}",
            f"`{t['loss']}`",
        )
        for t in terms
    ]
    parts = [_table(("term", "on", "divided per", "coefficient", "loss"), rows)]
    slots = [(t["name"], t["estimator"]) for t in terms if t["estimator"] is not None]
    if slots:
        parts.append(
            "In the unified estimator (arXiv:2509.04419) the weight of a token on the gradient of `log pi` is the product of the "
            "gate, `pi / denominator` and A; it is averaged within a sequence or group where the table says so, and divided by "
            "the term's count:"
        )
        filled = [
            (f"`{name}`", f"`{s['gate']}`", f"`{s['denominator']}`", f"`{s['advantage']}`", s["within"] or "no")
            for name, s in slots
        ]
        parts.append(_table(("term", "gate", "denominator", "A", "averaged"), filled))
    others = [f"`{t['name']}`" for t in terms if t["estimator"] is None]
    if others and slots:
        parts.append(
            f"{' and '.join(others)} {'is' if len(others) == 1 else 'are'} no such product: the first table has the loss."
        )
    return parts


def _settings(found: Mapping[str, Any]) -> list[str]:
    name, settings = found["name"], found["settings"]
    if not settings:
        return [f"None. In a recipe: `method: {name}`."]
    first, value = next(iter(settings.items()))
    rows = [(f"`{key}`", f"`{default!r}`", found["about"][key]) for key, default in settings.items()]
    return [
        f"Defaults are {_whose(found['checked'])}, where a line does not say otherwise. In a recipe: "
        f"`method: {name}`, or `method: {{{name}: {{{first}: {_yaml(value)}}}}}`.",
        _table(("setting", "default", "what it is"), rows),
    ]


def _whose(checked: str) -> str:
    told = checked == "reconstructed"
    return "those of the descriptions that it was written from" if told else "the published ones, from the source named above"


def _yaml(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else f"{value}"


def _formulas(title: str, text: str) -> list[str]:
    first, *rest = _blocks(text)
    return [f"**{title}:** {first}", *rest]


def _blocks(text: str) -> list[str]:
    """Paragraphs, with lines that are set in as blocks of their own."""
    blocks: list[str] = []
    formulas: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.startswith("    "):
            formulas.append(line[4:])
            continue
        if formulas:
            blocks.append("\n".join(["```text", *formulas, "```"]))
            formulas = []
        if line:
            blocks.append(line)
    return blocks


def _paper(paper: str) -> str:
    kind, _, number = paper.partition(":")
    return f"[{paper}]({'https://arxiv.org/abs' if kind == 'arXiv' else 'https://doi.org'}/{number})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def main(arguments: Sequence[str]) -> int:
    """Write the pages into the folder given."""
    if len(arguments) != 1:
        print("usage: python -m crosstrain.method_pages FOLDER", file=sys.stderr)
        return 2
    changed = write(Path(arguments[0]))
    print("\n".join(map(str, changed)) if changed else "nothing to do: every page is as its method has it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
