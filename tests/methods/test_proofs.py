"""The catalogue of proofs is true: each test that it names exists, and is about the method."""

from __future__ import annotations

import ast
import functools
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from crosstrain.cli_methods import print_one
from crosstrain.method_pages import how_checked, page
from crosstrain.methods import METHODS
from crosstrain.methods.describe import record
from crosstrain.methods.proofs import CORES, PROOFS, PROVED

FOLDER = Path(__file__).parent
NODE = re.compile(r"test_\w+\.py::test_\w+")


@functools.cache
def definitions(file: str) -> dict[str, ast.AST]:
    """The functions, classes and constants of a test file, by name."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse((FOLDER / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node.value for t in targets if isinstance(t, ast.Name)}
    return found


@functools.cache
def methods_of(file: str, function: str) -> frozenset[str]:
    """The methods that a test names in its parameters, its body, or a constant or helper of its file that it uses; all, where its
    parameters are the registry."""
    known, seen, waiting, named = definitions(file), set(), [function], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in known:
            continue
        seen.add(name)
        for node in ast.walk(known[name]):
            if isinstance(node, ast.Constant) and node.value in METHODS:
                named.add(node.value)
            elif isinstance(node, ast.Name):
                waiting.append(node.id)
                named |= set(METHODS) if node.id == "METHODS" else set()
    return frozenset(named)


def is_test(proof: str) -> bool:
    return NODE.fullmatch(proof) is not None


def test_every_method_is_in_the_table_and_nothing_else() -> None:
    assert set(PROVED) == set(METHODS)
    assert set(CORES) <= set(METHODS) and set(CORES.values()) <= set(METHODS) - set(CORES)
    assert all(list(proofs) == list(PROOFS) for proofs in PROVED.values())


@pytest.mark.parametrize("name", METHODS)
def test_what_must_be_proved_is(name: str) -> None:
    """A core everything but c and f, a named setting a, d and what ties it to its core."""
    needed = "ade" if name in CORES else "abdeg"
    assert [letter for letter in needed if not is_test(PROVED[name][letter])] == []


@pytest.mark.parametrize("name", METHODS)
def test_every_test_exists_and_names_the_method(name: str) -> None:
    for letter, proof in PROVED[name].items():
        if not is_test(proof):
            assert " " in proof and "::" not in proof, f"{letter}: {proof!r} is neither a test nor a reason in words"
            continue
        file, function = proof.split("::")
        assert isinstance(definitions(file).get(function), ast.FunctionDef), f"{letter}: there is no {proof}"
        named = methods_of(file, function)
        assert name in named, f"{letter}: {proof} does not name {name}"
        core = CORES.get(name)
        assert letter != "e" or core is None or core in named, f"e: {proof} does not tie {name} to {core}"


def test_a_test_of_other_methods_is_not_taken_for_one_of_this() -> None:
    assert methods_of("test_dpo.py", "test_dpo_by_hand") == {"dpo"}
    assert methods_of("test_hybrid_family.py", "test_superrl_by_hand") == {"superrl"}
    assert methods_of("test_adaptive_hybrids.py", "test_amft_by_hand") == {"amft"}, "which a helper of its file names"
    assert {"raft", "rloo"} <= methods_of("test_learning.py", "test_rewards_alone_teach_what_sampling_can_find")
    assert "sft" not in methods_of("test_learning.py", "test_rewards_alone_teach_what_sampling_can_find")
    assert methods_of("test_contract.py", "test_every_method_keeps_the_contract") == set(METHODS)


def test_the_record_the_page_and_the_command_line_say_it() -> None:
    found = record("cdpo")
    assert found["core"] == "dpo" and [p["proof"] for p in found["proofs"]] == list(PROOFS.values())
    assert all((p["test"] is None) != (p["reason"] is None) for p in found["proofs"])
    for proof in found["proofs"]:
        assert proof["test"] is None or (FOLDER.parents[1] / proof["test"].split("::")[0]).is_file()
    text, file = "\n".join(how_checked(found)), io.StringIO()
    print_one("cdpo", Console(width=160, file=file))
    for part in ("test_preference_settings.py::test_a_named_setting_is_its_core", "none: a named setting of dpo"):
        assert part in text and part in file.getvalue()
    assert "A named setting or a close variant of [dpo](dpo.md)." in text
    assert "## How it was checked\n\n| proof | test |" in page(record("dft"))
    assert record(f"{FOLDER.parents[1]}/examples/my_method.py:focal")["proofs"] == [], "of a file of one's own nothing is known"
