"""Markers of the studies' tests."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of tests that need Chromium and Playwright."""
    config.addinivalue_line("markers", "browser: needs Chromium and Playwright; run by make test-all")
