"""Who may import whom: the objective and the methods stay pure, the loop knows no method, the package is cheap to import."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import crosstrain

SRC = Path(crosstrain.__file__).parent
PURE = {
    "__future__", "bisect", "collections", "contextlib", "dataclasses", "difflib", "enum", "fractions", "functools", "hashlib",
    "inspect", "itertools", "math", "numbers", "operator", "re", "statistics", "torch", "types", "typing",
}  # fmt: skip
OURS = {
    "objective": {"crosstrain.types", "crosstrain.errors", "crosstrain.objective"},
    "methods": {"crosstrain.types", "crosstrain.errors", "crosstrain.objective", "crosstrain.methods"},
}
# The registry alone may look at files: it loads `file.py:function`.
EXTRA = {"methods/registry.py": {"importlib", "pathlib"}}


def imports(file: Path) -> Iterator[str]:
    """Every module a file imports, also inside functions; `from a.b import c` gives a.b.c."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("package", sorted(OURS))
def test_objective_and_methods_import_only_pure_modules(package: str) -> None:
    files = sorted((SRC / package).rglob("*.py"))
    assert files
    for file in files:
        allowed = PURE | OURS[package] | EXTRA.get(file.relative_to(SRC).as_posix(), set())
        wrong = [module for module in imports(file) if not inside(module, allowed)]
        assert not wrong, f"{file.relative_to(SRC)} imports {wrong}"
        forbidden = [module for module in imports(file) if inside(module, {"torch.save", "torch.load", "torch.distributed"})]
        assert not forbidden, f"{file.relative_to(SRC)} imports {forbidden}"


def test_training_imports_no_method() -> None:
    for file in sorted((SRC / "training").rglob("*.py")):
        wrong = [module for module in imports(file) if inside(module, {"crosstrain.methods"})]
        assert not wrong, f"training/{file.name} imports {wrong}"


def test_nothing_of_ours_reads_or_writes_pickle() -> None:
    for file in sorted(SRC.rglob("*.py")):
        wrong = [
            m
            for m in imports(file)
            if inside(m, {"pickle", "cloudpickle", "dill", "shelve", "marshal", "torch.save", "torch.load"})
        ]
        assert not wrong, f"{file.relative_to(SRC)} imports {wrong}"
        calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            name = ast.unparse(call.func)
            assert name not in {"torch.load", "torch.save", "eval", "exec"}, (
                f"{file.relative_to(SRC)}:{call.lineno} calls {name}"
            )


def loaded_after(code: str) -> set[str]:
    printed = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(printed.stdout.split("\n"))


HEAVY = {"torch", "transformers", "datasets", "plotly", "scipy", "pandas", "pyarrow", "trl", "peft"}


@pytest.mark.parametrize(
    "code",
    [
        "import crosstrain; crosstrain.__version__; crosstrain.Recipe; crosstrain.UserError; dir(crosstrain)",
        "from crosstrain.cli import main; main(['--help'])",
        "from crosstrain.cli import main; main(['train', 'no-such-file.yaml'])",
    ],
)
def test_the_package_and_its_help_load_nothing_heavy(code: str) -> None:
    assert loaded_after(code) & HEAVY == set()


def test_every_public_name_is_there() -> None:
    for name in crosstrain.__all__:
        assert getattr(crosstrain, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = crosstrain.nonsense


def test_no_public_name_is_shadowed_by_a_subpackage() -> None:
    modules = {path.stem if path.is_file() else path.name for path in SRC.iterdir()}
    assert set(crosstrain.__all__) & modules == set()
    importlib.import_module("crosstrain.studies")
    importlib.import_module("crosstrain.training")
    assert callable(crosstrain.train)
    assert callable(crosstrain.study)
