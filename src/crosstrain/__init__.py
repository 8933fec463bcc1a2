"""crosstrain: SFT, preference optimisation, RL and their hybrids behind one objective, one data format and one loop.

    import crosstrain
    result = crosstrain.train("recipe.yaml", output_dir="runs/first")
    crosstrain.study("study.yaml", out="runs/study", quick=True)

Everything here is loaded on first use: `import crosstrain` itself imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosstrain.config import Recipe, StudySpec
    from crosstrain.errors import UserError
    from crosstrain.methods import load_method
    from crosstrain.run import train
    from crosstrain.types import Batch, Example, Group, Method, Plan, Scores, Term, Trajectory

__all__ = [
    "Batch",
    "Example",
    "Group",
    "Method",
    "Plan",
    "Recipe",
    "Scores",
    "StudySpec",
    "Term",
    "Trajectory",
    "UserError",
    "__version__",
    "load_method",
    "study",
    "train",
]

__version__ = metadata.version("crosstrain")

_HOME = {
    **dict.fromkeys(("Batch", "Example", "Group", "Method", "Plan", "Scores", "Term", "Trajectory"), "crosstrain.types"),
    **dict.fromkeys(("Recipe", "StudySpec"), "crosstrain.config"),
    "UserError": "crosstrain.errors",
    "load_method": "crosstrain.methods",
    "train": "crosstrain.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'crosstrain' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def study(
    spec: StudySpec | Mapping[str, Any] | str | Path, out: str | Path, *, quick: bool = False, tune: bool = False
) -> Path:
    """The path of a study's report, after training and evaluating every arm and seed.

    spec: a StudySpec, the same as a mapping, or the path of a YAML file. out: the study's folder; finished runs found there
    are kept. quick: apply the study's own `quick` settings. tune: search each arm's learning rate first.
    """
    from crosstrain.config import StudySpec, load_study, parse
    from crosstrain.studies.report import write_report
    from crosstrain.studies.runner import run_study

    if isinstance(spec, str | Path):
        spec = load_study(spec)
    elif not isinstance(spec, StudySpec):
        spec = parse(StudySpec, spec)
    run_study(spec, Path(out), quick=quick, tune=tune)
    return write_report(Path(out))
