"""What is kept between runs: converted models, and rows that were given from Python."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosstrain.errors import UserError


def cache_folder() -> Path:
    """Where it is kept: `CROSSTRAIN_CACHE`, or `~/.cache/crosstrain`."""
    return Path(os.environ.get("CROSSTRAIN_CACHE") or Path.home() / ".cache" / "crosstrain")


def keep_rows(rows: Sequence[Any]) -> Path:
    """The JSONL file of these rows in the cache, named by its content and written if it is not there.

    A recipe names its data and does not hold them: it is hashed, copied into every run's folder and printed on model cards.
    """
    try:
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    except (TypeError, ValueError) as error:
        raise UserError(f"rows must be JSON values: {error}; or save them as Parquet and give the path") from error
    place = cache_folder() / "rows" / f"{hashlib.sha256(text.encode()).hexdigest()}.jsonl"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=place.parent, suffix=".tmp", delete=False) as file:
            file.write(text)
        os.replace(file.name, place)
    return place
