"""What every test runs with: one thread per process, no network, an empty model cache, no time limit per example, imports that the
garbage collector does not walk again."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Set before anything imports torch or huggingface_hub, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

settings.register_profile("crosstrain", deadline=None)
settings.load_profile("crosstrain")

_CACHE = tempfile.TemporaryDirectory(prefix="crosstrain-test-cache-")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, which is not there yet."""
    monkeypatch.setenv("CROSSTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pytest_collection_finish(session: pytest.Session) -> None:
    """An empty cache, unless a selected test needs the real model: that one is converted once, in the user's cache.

    A run collects garbage several times, and each time would walk the millions of objects that torch, transformers and TRL leave
    behind on import: half of the time of a whole run of a tiny model.
    """
    gc.collect()
    gc.freeze()
    if not any(item.get_closest_marker("real_model") for item in session.items):
        os.environ["CROSSTRAIN_CACHE"] = _CACHE.name
