"""Rows in a file, for tests that read them back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """The file, with a row on each line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
