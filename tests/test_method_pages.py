"""docs/methods is what the methods say of themselves, and every method says what it must."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from crosstrain.cli_methods import print_all, print_one
from crosstrain.method_pages import MADE_BY, main, page, pages, write
from crosstrain.methods import METHODS
from crosstrain.methods.describe import record
from crosstrain.methods.docstring import said
from crosstrain.methods.registry import DIRECTIONS

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
AGAIN = "run: python -m crosstrain.method_pages docs/methods"


def test_every_page_is_there_and_as_its_method_has_it() -> None:
    wanted = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*")}
    assert sorted(there) == sorted(wanted), AGAIN
    stale = [name for name, text in wanted.items() if there[name] != text]
    assert not stale, AGAIN


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_a_page_needs(name: str) -> None:
    """Its docstring has the shape that `methods.docstring` describes, and each part of a surrogate has words."""
    found = record(name)
    assert found["loss"], "its docstring has no part that starts with `Loss`"
    assert found["weight"], "its docstring has no part that starts with `Weight`"
    silent = [key for key, text in found["about"].items() if not text]
    assert not silent, f"its docstring does not say what {silent} are"
    for term in found["terms"]:
        assert term["loss"], f"term {term['name']} has no `describe`"
        slots = term["estimator"]
        assert slots is None or all(slots[key] for key in ("gate", "denominator", "advantage", "on", "per")), (
            f"a part of term {term['name']} has no words; mark it with `says`"
        )


@pytest.mark.parametrize("name", METHODS)
def test_what_is_said_of_evidence_is_sourced(name: str) -> None:
    entry = METHODS[name]
    for text in (entry.works, entry.fails, entry.deviates):
        assert not text or text.endswith("."), text
    for text in (entry.works, entry.fails):
        assert not text or re.search(r"arXiv:\d{4}\.\d{5}", text), f"no source: {text}"


def shape(number: float = 0.5, other: int = 2, flag: bool = False) -> None:
    """One line.

    With x a number. Loss, summed over both:
        own    -A r
        demo   -p
    divided by N. Weight on
    grad log pi: r A.

    number: what it is. It may
    be 0. other,
    flag: both.

    The rest: with a colon that is no head.
    """


def test_a_docstring_is_read_by_its_parts() -> None:
    found = said(shape, ("number", "other", "flag"))
    assert found.summary == "One line."
    assert found.loss == "summed over both:\n    own    -A r\n    demo   -p\ndivided by N."
    assert found.weight == "r A."
    assert found.settings == {"number": "what it is. It may be 0.", "other": "both.", "flag": "both."}
    assert found.idea == ("With x a number.",) and found.notes == ("The rest: with a colon that is no head.",)


def test_a_page_is_whole() -> None:
    found = page(record("luffy"))
    for part in (
        "# luffy",
        "## Objective",
        "**Weight of a token:**",
        "`(p + 0.1)^2 / 0.1`",
        "```text\nown tokens",
        "## When it does not",
    ):
        assert part in found
    assert "[arXiv:2504.14945](https://arxiv.org/abs/2504.14945), 2025" in found
    rows = [line for line in page(record("kl_cov")).splitlines() if line.startswith("| `kl`")]
    assert rows and all(line.replace("\\|", "").count("|") == 6 for line in rows), "a bar in a formula is no cell's end"


def test_a_page_says_where_a_coefficient_and_a_default_are_from() -> None:
    found = page(record("amft"))
    assert "| `rl` | policy | own_tokens | state |" in found and "those of the descriptions" in found
    found = page(record("cdpo"))
    assert "| family | preference |" in found and "the published ones" in found
    assert "`-0.9 log sigmoid(0.1 D) - 0.1 log sigmoid(-0.1 D), D = d_chosen - d_rejected" in found


def test_the_index_has_the_families_in_the_surveys_order() -> None:
    heads = [line.removeprefix("## ").lower() for line in pages()["README.md"].splitlines() if line.startswith("## ")]
    assert heads == list(DIRECTIONS)


def test_writing_again_changes_nothing_and_clears_what_is_gone(tmp_path: Path) -> None:
    assert len(write(tmp_path)) == len(METHODS) + 1
    assert write(tmp_path) == []
    (tmp_path / "gone.md").write_text(f"# gone\n\n{MADE_BY}\n")
    (tmp_path / "mine.md").write_text("# by hand\n")
    (tmp_path / "sft.md").write_text("stale")
    assert {path.name for path in write(tmp_path)} == {"gone.md", "sft.md"}
    assert (tmp_path / "mine.md").is_file()
    assert main([]) == 2


@pytest.mark.parametrize("width", [80, 100, 200])
def test_tables_fit_and_break_no_name(width: int) -> None:
    file = io.StringIO()
    print_all(Console(width=width, file=file))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for name, entry in METHODS.items():
        assert any(line.strip("│ ").startswith(f"{name} ") for line in lines), name
        assert any(entry.paper in line for line in lines), entry.paper
    assert len(lines) < 5 * len(METHODS), "a method takes a few lines, not a column of letters"


def test_one_method_is_told_in_full() -> None:
    file = io.StringIO()
    print_one("chord_phi", Console(width=100, file=file))
    told = file.getvalue()
    for part in ("weight of a token", "1 / (1 - p)", "demonstration_share", "helps", "2508.11408"):
        assert part in told
