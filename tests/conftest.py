"""What every test runs with: one thread per process, no network, an empty model cache, no time limit per example."""

from __future__ import annotations

import os
import tempfile

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


def pytest_collection_finish(session: pytest.Session) -> None:
    """An empty cache, unless a selected test needs the real model: that one is converted once, in the user's cache."""
    if not any(item.get_closest_marker("real_model") for item in session.items):
        os.environ["CROSSTRAIN_CACHE"] = _CACHE.name
