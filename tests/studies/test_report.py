from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from synthetic import HOSTILE, MODEL, write_study

from crosstrain.studies.report import banner_texts, write_report
from crosstrain.studies.report_figures import as_json
from crosstrain.studies.report_text import _key_points, say_verdict
from crosstrain.studies.results import build_results

VOID = {"meta", "input", "br", "img", "path", "circle"}


class Page(HTMLParser):
    """Elements with their attributes, the text of the page, the rows of its tables, and whether every element was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.words.append(data)
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += " " + data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, *cells: str) -> list[str]:
        plain = [[" ".join(c.split()) for c in row] for row in self.rows]
        return next(row for row in plain if row[: len(cells)] == list(cells))

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("study")
    write_study(where, fail=[("hpt", 1)], hostile=True)
    assert write_report(where) == where / "report.html"
    return where


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_the_page_is_one_whole_file_that_asks_for_nothing(page: Page) -> None:
    assert page.open == []
    assert not page.having("link") and not page.having("iframe") and not page.having("img")
    assert not [a for _, a in page.elements if "src" in a or "href" in a]
    policies = [a["content"] for a in page.having("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies and "default-src 'none'" in str(policies[0])
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.having("meta")


def test_model_text_stays_text(page: Page) -> None:
    assert len(page.scripts) == 3
    assert page.text.count(" ".join(HOSTILE.split())) >= 7
    assert "step 8: the loss is NaN <b>here</b>" in page.text
    assert not page.having("b")


def test_json_in_the_page_cannot_end_its_script() -> None:
    assert json.loads(as_json({"a": HOSTILE})) == {"a": HOSTILE}
    assert "<" not in as_json({"a": HOSTILE})


def test_the_table_shows_the_numbers_of_results_json(page: Page, results: dict[str, Any]) -> None:
    found = next(m for m in results["measures"] if m["key"] == "accuracy")["arms"]["sft -> grpo"]
    shown = f"{found['mean'] * 100:.1f}% {found['low'] * 100:.1f} to {found['high'] * 100:.1f}"
    assert page.row("sft → grpo 3 seeds")[1] == shown
    assert page.row("hpt 2 seeds of 3")
    cells = [a for a in page.having("td") if a.get("data-value") == repr(found["mean"])]
    assert len(cells) == 1


def test_contrasts_show_difference_p_and_verdict(page: Page, results: dict[str, Any]) -> None:
    c = next(x for x in results["families"][0]["contrasts"] if (x["arm"], x["against"]) == ("luffy", "sft -> grpo"))
    row = page.row("luffy vs sft → grpo")
    ends = f"−{abs(c['low']) * 100:.1f} to −{abs(c['high']) * 100:.1f}"
    assert row[1:3] == [c["verdict"], f"−{abs(c['difference']) * 100:.1f} pts {ends}"]
    assert row[4:] == [f"{c['p']:.3f}", f"{c['p_holm']:.3f}", f"{c['smallest_detectable'] * 100:.1f} pts"]


def test_everything_promised_is_on_the_page(page: Page, results: dict[str, Any]) -> None:
    assert MODEL in page.text
    assert "1 of 19 runs failed" in page.text
    assert page.row("hpt", "1", "failed")
    assert page.row("luffy", *(f"{results['arms'][5]['cost'][u]:,.0f}" for u in ("processed_tokens", "generated_tokens")))
    for word in ("2.13.0", "config hash", "samples_per_question", "num_generations = 8", "-log pi", "Q4_1"):
        assert word in page.text, word
    plots = {a["id"] for a in page.having("div") if a.get("class") == "plot"}
    assert plots == {"fig-accuracy", "fig-forgetting", "fig-cost", "fig-pass", "fig-curves"}
    assert set(json.loads(page.scripts[0])) == plots


def test_charts_are_valid_and_show_the_numbers_of_results_json(page: Page, results: dict[str, Any]) -> None:
    figures = json.loads(page.scripts[0])
    for name in ("fig-accuracy", "fig-forgetting", "fig-pass"):
        go.Figure(figures[name])
    accuracy = next(m for m in results["measures"] if m["key"] == "accuracy")["arms"]
    forgetting = next(m for m in results["measures"] if m["key"] == "forgetting/nll")["arms"]
    for trace, arm in zip(figures["fig-forgetting"]["data"], results["arms"], strict=True):
        name = arm["name"]
        assert (trace["x"], trace["y"]) == ([forgetting[name]["mean"]], [accuracy[name]["mean"]])
        assert trace["y"][0] + trace["error_y"]["array"][0] == pytest.approx(accuracy[name]["high"])
    colours = [trace["marker"]["color"] for trace in figures["fig-forgetting"]["data"]]
    assert len(set(colours)) == 7
    costs = {t["name"]: t["costs"] for t in figures["fig-cost"]["data"]}
    assert costs["grpo"] == next(a["cost"] for a in results["arms"] if a["name"] == "grpo")


def test_curves_are_the_metrics_of_the_finished_runs(page: Page, folder: Path) -> None:
    curves = json.loads(page.scripts[0])["fig-curves"]["curves"]
    assert [run["seed"] for run in curves["hpt"]] == [0, 2]
    lines = [json.loads(x) for x in (folder / "runs/grpo/seed-1/metrics.jsonl").read_text().splitlines()]
    run = curves["grpo"][1]
    assert run["y"]["reward"] == pytest.approx([line["reward"] for line in lines], rel=1e-4)
    assert run["x"]["flops"] == [line["cost/flops"] for line in lines]
    assert "reward" not in curves["sft"][0]["y"]


# --- the verdict in words ---------------------------------------------------------------------------------------------


def said(results: dict[str, Any]) -> str:
    found = say_verdict(results)
    return f"{found.headline}. {found.lead}"


def test_a_tie_is_called_one(results: dict[str, Any]) -> None:
    assert said(results).startswith(
        "sft → grpo or luffy: cannot tell which is best. sft → grpo has the highest in-distribution"
    )
    assert "before the correction" in said(results)
    key = say_verdict(results).key
    assert any(line.startswith("Against sft: better: sft → grpo (+") and "worse: grpo (−" in line for line in key)
    assert any("would often be missed" in line for line in key)


def test_a_warning_names_the_arm_whose_seeds_vary_more(results: dict[str, Any]) -> None:
    assert not any("Careful" in line for line in say_verdict(results).key)
    changed = json.loads(json.dumps(results))
    accuracy = next(m for m in changed["measures"] if m["key"] == "accuracy")
    accuracy["unequal_seeds_p"] = 0.004
    accuracy["arms"]["grpo"]["seed_sd"] = 0.21
    [line] = [line for line in say_verdict(changed).key if "Careful" in line]
    assert "to grpo (21.0 pts) (Bartlett's p = 0.004)" in line and line.endswith(
        "verdicts of grpo are surer than they should be."
    )


def test_a_winner_is_named_with_its_lead(tmp_path: Path) -> None:
    write_study(tmp_path, arms=["sft", "grpo"])
    found = build_results(tmp_path)
    c = min(found["families"][0]["leader_against"], key=lambda x: x["difference"])
    assert said(found).startswith("sft won. It has the highest in-distribution accuracy")
    assert f"Its lead over grpo is {c['difference'] * 100:.1f} pts" in said(found)


def test_arms_no_better_than_the_base_are_not_called_winners(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=[0, 1], arms=["grpo"], seed_sd=2.5)
    assert said(build_results(tmp_path)).startswith("Cannot tell whether training helped.")


@pytest.mark.parametrize(("answer", "where"), [(0.0, "floor"), (1.0, "ceiling")])
def test_questions_that_all_models_answer_alike_have_no_winner(tmp_path: Path, answer: float, where: str) -> None:
    write_study(tmp_path, arms=["sft", "grpo"])
    for file in tmp_path.glob("runs/**/evaluation.json"):
        evaluation = json.loads(file.read_text())
        for one in evaluation["sets"].values():
            for question in one["questions"]:
                question["correct"] = [answer] * len(question["correct"])
        file.write_text(json.dumps(evaluation))
    found = build_results(tmp_path)
    family = found["families"][0]
    assert (family["leader"], family["tied"], family["leader_against"]) == (None, ["sft", "grpo"], [])
    assert all((c["low"], c["smallest_detectable"], c["verdict"]) == (None, None, "cannot tell") for c in family["contrasts"])
    assert said(found).startswith("Cannot tell: a tie at the top. sft and grpo have the same in-distribution accuracy, ")
    assert f"at their {where}: nothing about methods can be learned" in said(found)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "0.0 to 0.0" not in page.text and "100.0 to 100.0" not in page.text
    assert page.row("grpo vs base")[1] == "cannot tell"


def test_one_seed_and_quick_mode_are_said_at_the_top(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=[0], quick=True, arms=["sft", "grpo"])
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    top = page.text.split("Every arm and measure")[0]
    assert "Quick mode: a taste" in top
    assert "Cannot tell: one training seed" in top
    assert "about these very models" in top
    assert " won" not in top
    assert "better" not in page.row("sft vs base")[1]


def test_a_study_under_way_has_a_report_that_says_so(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=[0, 1], arms=["sft", "grpo"])
    study = json.loads((tmp_path / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps({**study, "status": "running", "budget": None, "finished_at": None}))
    for seed in (0, 1):
        for file in (tmp_path / f"runs/grpo/seed-{seed}").iterdir():
            file.unlink()
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "The study has not finished: 2 of 5 runs are still to come" in page.text
    assert "no finished run to compare" in page.row("grpo vs base")[1]
    assert page.row("grpo", "0", "not started")
    for file in (tmp_path / "runs").rglob("*.*"):
        file.unlink()
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Nothing to compare yet" in page.text


def test_unequal_budgets_are_said(tmp_path: Path) -> None:
    write_study(tmp_path, arms=["sft"])
    found = build_results(tmp_path)
    found["study"]["budget"]["equal"] = False
    assert any("Not every run spent the same budget" in text for text in banner_texts(found))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ((-0.2, 0.0), "What it forgot: nothing on average in any arm, from sft ("),
        ((-0.2, 0.1), "forgot least of the general answers it knew, grpo ("),
    ],
)
def test_an_arm_that_got_better_is_not_said_to_have_forgotten(
    results: dict[str, Any], changes: tuple[float, float], expected: str
) -> None:
    changed = copy.deepcopy(results)
    for measure in changed["measures"]:
        if measure["key"] == "forgetting/nll":
            measure["arms"] = {n: {**measure["arms"][n], "mean": c} for n, c in zip(("sft", "grpo"), changes, strict=True)}
    [line] = [point for point in _key_points(changed) if point.startswith("What it forgot")]
    assert expected in line


def test_corrections_of_a_started_study_are_on_the_page(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=(0,))
    file = tmp_path / "study.json"
    changed = {"setting": "title", "before": "", "after": HOSTILE}
    correction = {"at": "2026-01-01T00:00:00+00:00", "differences": [changed], "finished": ["runs/sft/seed-0"]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "corrections": [correction]}))
    page = Page(write_report(tmp_path).read_text())
    assert "Corrected" in page.words and correction["at"] in page.words
    assert f"title from '' to {HOSTILE!r}; runs finished before: 1" in page.words
