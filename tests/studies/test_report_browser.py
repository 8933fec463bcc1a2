"""The report in a real browser: drawn, quiet, offline, sortable, and narrow enough for a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import write_study

from crosstrain.studies.report import write_report

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (for example: apt-get install chromium)"),
]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, fail=[("hpt", 1)], hostile=True)
    return write_report(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


class Visit:
    """A page opened at some width, with all that it said and asked for."""

    def __init__(self, browser: Any, report: Path, width: int, scheme: str = "light") -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(report.as_uri())
        self.page.wait_for_selector("#fig-curves .main-svg")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_it_draws_everything_quietly_and_offline(browser: Any, report: Path, width: int, scheme: str) -> None:
    visit = Visit(browser, report, width, scheme)
    page = visit.page
    assert visit.said == []
    assert visit.asked == [report.as_uri()]
    assert page.evaluate("window.hacked") is None
    drawn = page.evaluate(
        "[...document.querySelectorAll('.plot')].map("
        "p => [p.id, p.querySelectorAll('.scatterlayer .trace').length, p.clientHeight])"
    )
    assert {name for name, _, _ in drawn} == {"fig-accuracy", "fig-forgetting", "fig-cost", "fig-pass", "fig-curves"}
    for name, traces, height in drawn:
        assert traces >= 7 or name == "fig-curves", (name, traces)
        assert traces > 0 and height >= 280, (name, traces, height)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('.plot') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"
    )
    assert outside == []
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_labels_of_arms_do_not_overlap(browser: Any, report: Path, width: int) -> None:
    page = Visit(browser, report, width).page
    overlaps = page.evaluate(
        """() => {
          const boxes = [...document.querySelectorAll('#fig-accuracy .ytick text')].map(t => t.getBoundingClientRect());
          return boxes.some((a, i) => boxes.some((b, j) => i < j && a.bottom > b.top + 1 && b.bottom > a.top + 1));
        }"""
    )
    assert overlaps is False
    page.close()


def shown_arms(page: Any) -> list[str]:
    found: list[str] = page.evaluate(
        "[...document.querySelectorAll('#measures tbody tr')].filter(r => r.offsetParent)"
        ".map(r => r.querySelector('.arm').textContent)"
    )
    return found


def test_sorting_orders_by_the_numbers_both_ways(browser: Any, report: Path) -> None:
    page = Visit(browser, report, 1280).page
    heading = page.locator("#measures th[data-group] button").first
    for direction in ("descending", "ascending"):
        heading.click()
        values = page.evaluate(
            "[...document.querySelectorAll('#measures tbody tr')].map(r => Number(r.cells[1].dataset.value))"
        )
        assert values == sorted(values, reverse=direction == "descending")
        assert page.locator("#measures th[data-group]").first.get_attribute("aria-sort") == direction
    assert shown_arms(page)[0] == "untrained (base)"
    page.close()


def test_the_filter_and_the_column_boxes_hide_and_show(browser: Any, report: Path) -> None:
    page = Visit(browser, report, 1280).page
    assert len(shown_arms(page)) == 7
    page.fill("#arm-filter", "GRPO")
    assert shown_arms(page) == ["grpo", "sft → grpo"]
    page.fill("#arm-filter", "")
    assert len(shown_arms(page)) == 7
    assert not page.is_visible("#measures th[data-group=sets]")
    page.check("input[data-group=sets]")
    assert page.is_visible("#measures th[data-group=sets]")
    page.uncheck("input[data-group=accuracy]")
    assert not page.is_visible("#measures th[data-group=accuracy]")
    page.close()


def test_cost_axes_and_curves_can_be_chosen(browser: Any, report: Path) -> None:
    visit = Visit(browser, report, 1280)
    page = visit.page
    before = page.evaluate("document.getElementById('fig-cost').data.map(t => t.x[0])")
    page.select_option("#cost-axis", "generated_tokens")
    after = page.evaluate("document.getElementById('fig-cost').data.map(t => t.x[0])")
    assert before != after and after[1] == 0
    assert page.text_content("#fig-cost .xtitle") == "tokens generated"
    assert page.text_content("#curve-note") == "Not logged by: sft, dft."
    page.select_option("#curve-metric", "loss")
    page.select_option("#curve-axis", "seconds")
    assert page.text_content("#curve-note") == ""
    assert page.text_content("#fig-curves .ytitle") == "loss"
    names = page.evaluate("document.getElementById('fig-curves').data.map(t => t.name)")
    assert names.count("sft") == 4 and names.count("hpt") == 3  # a thin line per finished seed, and the mean
    assert visit.said == []
    page.close()
