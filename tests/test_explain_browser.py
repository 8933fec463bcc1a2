"""The page of `explain` in a real browser: quiet, offline, no wider than a phone, and each token's numbers at a tap."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crosstrain.explain_page import page

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (for example: apt-get install chromium)"),
]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
HOSTILE = "<img src=x onerror='window.hacked=1'>"


def trajectory(**more: Any) -> dict[str, Any]:
    tokens = ["a" * 80, HOSTILE, "\n", "", "</script><script>window.hacked=1</script>"]
    return {
        "kind": "completion",
        "reward": 1.0,
        "finished": True,
        "selected": True,
        "advantage": 0.5,
        "tokens": tokens,
        "source": ["expert", "policy", "policy", "policy", "tool"],
        "logp": [-0.5, -1.0, -2.0, -3.0, None],
        "weights": [0.25, -0.5, 1e-4, 0.125, 0.0],
        "by_term": {},
    } | more


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    term = {"name": "rl", "tokens": 4, "denominator": 8.0, "loss": -0.5, "share": 1.0, "through": ["logp"], "reads": []}
    group = {"id": HOSTILE, "where": "rows.jsonl:1", "stream": "train", "prompt": f"{HOSTILE}{'x' * 300}", "selected": True}
    found = {
        "method": "grpo",
        "settings": {f"setting_{i}": i for i in range(12)},
        "model": HOSTILE,
        "data": ["train: " + "long/" * 40 + "rows.jsonl"],
        "summary": "This step raises 1 right completion.",
        "notes": [HOSTILE],
        "terms": [term],
        "sources": {"policy": 0.8, "expert": 0.2},
        "groups": [{**group, "trajectories": [trajectory(), trajectory(selected=False, advantage=None, reward=None)]}],
    }
    path = tmp_path_factory.mktemp("page") / "explain.html"
    path.write_text(page(found), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_it_is_quiet_offline_and_fits(browser: Any, file: Path, width: int, scheme: str) -> None:
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(file.as_uri())
    assert said == [] and asked == [file.as_uri()]
    assert opened.evaluate("window.hacked") is None
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.locator("#readout").is_hidden()
    opened.locator(".tokens .t.down").first.click()
    assert "weight -0.5" in opened.locator("#readout").inner_text()
    opened.close()
