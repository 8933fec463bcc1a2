"""Experiment trackers: a run's metrics sent on to where a team looks at them. Off unless `report_to` names one."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from crosstrain.errors import UserError

TRACKERS: Mapping[str, str] = {"trackio": "pip install 'crosstrain[track]'", "wandb": "pip install wandb"}
"""Trackers that can be reported to, and how each is installed. trackio keeps wandb's interface: init, log, finish."""

Log = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def trackers(names: Sequence[str], *, project: str, run: str, config: Mapping[str, Any]) -> Iterator[Log]:
    """A function that sends a metrics line to every tracker in `names`; they are told of the end when the block is left.

    What is not a finite number is left out. Raises UserError when a tracker is not installed. The run's own `metrics.jsonl` has
    every line whatever the trackers do; a resumed run is a further run there.
    """
    with contextlib.ExitStack() as stack:
        modules = [_load(name) for name in names]
        for module in modules:
            module.init(project=project, name=run, config=dict(config))
            stack.callback(module.finish)

        def log(line: Mapping[str, Any]) -> None:
            numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and math.isfinite(v)}
            for module in modules:
                module.log(numbers, step=int(line["step"]))

        yield log


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"report_to: {name} is not installed ({error}); {TRACKERS[name]}, or leave it out") from error
