"""Which mistakes in the mathematics would no test notice? Mutants of the objective and the methods, one at a time.

    nice -n 19 python -m benchmarks.mutate src/crosstrain/objective/*.py --out mutants.json
    python -m benchmarks.mutate src/crosstrain/methods/nft.py --list

A mutant is one small change: a flipped sign, a mask that is not applied, min for max, another denominator, a factor left out, a
comparison off by one, a gradient that is not stopped. The quick tests that have to do with the file run until one fails. A mutant
that no test kills is either equivalent (nothing can tell it apart) or a gap.

Tests are collected once per file. Every mutant is tried in a fork of that process, in which the functions of the module get the
code that they would have: a mutant costs its tests and nothing else. What is no function's (defaults, a module's constants) is
listed as untried.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

SLOW = {"test_against_trl.py", "test_learning.py"}
"""Test files of tests/methods that train or load a peer: what quick tests do not see is not worth their minutes here."""

OTHER_COUNT = {
    "own_tokens": "sequences",
    "all_tokens": "own_tokens",
    "sequences": "groups",
    "pairs": "sequences",
    "groups": "sequences",
}
OTHER_NAME = {
    "seq_mean": "token_sum",
    "token_sum": "seq_mean",
    "group_mean": "seq_mean",
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
}
COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
}


@dataclass(frozen=True)
class Mutant:
    """One change: where, of what kind, and what stands there before and after. outcome: killed, survived, timeout or untried."""

    file: str
    line: int
    kind: str
    before: str
    after: str
    index: int
    outcome: str = ""
    killed_by: str = ""
    seconds: float = 0.0


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in place of a node, with the kind of mistake that it is."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield "sign", node.operand
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield "mask", node.operand
    elif isinstance(node, ast.BinOp):
        if type(node.op) in ARITHMETIC:
            kind = "sign" if isinstance(node.op, ast.Add | ast.Sub) else "denominator"
            yield kind, ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
        elif isinstance(node.op, ast.Mult):
            yield "factor", node.right
            yield "factor", node.left
        elif isinstance(node.op, ast.BitAnd | ast.BitOr):
            yield "mask", node.left
            yield "mask", node.right
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARE:
        yield "comparison", ast.Compare(node.left, [COMPARE[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "mask", ast.BoolOp(other, node.values)
    elif (
        isinstance(node, ast.IfExp) and not isinstance(node.body, ast.JoinedStr) and not isinstance(node.orelse, ast.JoinedStr)
    ):
        yield "mask", node.body
        yield "mask", node.orelse
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
    if name == "where" and len(node.args) == 3:
        yield "mask", node.args[1]
        yield "mask", node.args[2]
    if name == "detach" and isinstance(node.func, ast.Attribute):
        yield "detach", node.func.value
    if name == "clamp" and isinstance(node.func, ast.Attribute):
        yield "bound", node.func.value
    if name in ("min", "max", "minimum", "maximum"):
        func = copy.copy(node.func)
        if isinstance(func, ast.Attribute):
            func.attr = OTHER_NAME[name]
        elif isinstance(func, ast.Name):
            func.id = OTHER_NAME[name]
        yield "bound", ast.Call(func, node.args, node.keywords)
    for i, keyword in enumerate(node.keywords):
        if keyword.arg == "coef" and not (isinstance(keyword.value, ast.Constant) and keyword.value.value == 1.0):
            yield "factor", _with_keyword(node, i, ast.Constant(1.0))
        if keyword.arg == "normalise" and isinstance(keyword.value, ast.Name) and keyword.value.id in OTHER_NAME:
            yield "denominator", _with_keyword(node, i, ast.Name(OTHER_NAME[keyword.value.id], ast.Load()))
        if keyword.arg in ("gate", "corrected", "logged") and name in ("surrogate", "clipped", "Term"):
            yield keyword.arg, ast.Call(node.func, node.args, [k for k in node.keywords if k is not keyword])
    if name == "Per" and node.args and isinstance(node.args[0], ast.Tuple):
        for i, item in enumerate(node.args[0].elts):
            if isinstance(item, ast.Constant) and item.value in OTHER_COUNT:
                names = [*node.args[0].elts]
                names[i] = ast.Constant(OTHER_COUNT[str(item.value)])
                yield "denominator", ast.Call(node.func, [ast.Tuple(names, ast.Load()), *node.args[1:]], node.keywords)


def _with_keyword(node: ast.Call, at: int, value: ast.expr) -> ast.Call:
    keywords = [ast.keyword(k.arg, value) if i == at else k for i, k in enumerate(node.keywords)]
    return ast.Call(node.func, node.args, keywords)


def sites(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, str]]:
    """Every place that holds an expression to change: parent, field, index in it, and "check: " inside what raises errors.

    Annotations, decorators, texts and messages are left alone.
    """
    stack: list[tuple[ast.AST, str]] = [(tree, "")]
    while stack:
        parent, mark = stack.pop()
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list") or isinstance(parent, ast.JoinedStr | ast.Raise):
                continue
            inner = mark
            if isinstance(parent, ast.If) and field == "test" and isinstance(parent.body[0], ast.Raise):
                inner = "check: "
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST):
                    if isinstance(child, ast.expr):
                        yield parent, field, i if isinstance(value, list) else None, inner
                    if not _is_alias(child):
                        stack.append((child, inner))


def _is_alias(node: ast.AST) -> bool:
    """A module's `Name = Callable[...]` or `Name = A | B`, which is a type."""
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript)


def mutants(file: Path) -> list[tuple[Mutant, CodeType]]:
    """Every mutant of a file, with its module's code."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: list[tuple[Mutant, CodeType]] = []
    for parent, field, at, mark in sites(tree):
        held = getattr(parent, field)
        node = held if at is None else held[at]
        for kind, changed in list(changes(node)):
            put = _put(parent, field, at)
            put(_instead(node, changed))
            code = compile(ast.fix_missing_locations(tree), str(file.resolve()), "exec")
            put(node)
            one = Mutant(_name(file), node.lineno, mark + kind, ast.unparse(node), ast.unparse(changed), len(found))
            found.append((one, code))
    return sorted(found, key=lambda pair: (pair[0].line, pair[0].index))


def _instead(node: ast.expr, changed: ast.AST) -> ast.expr:
    """`[changed, lambda: node][0]`: a function in which it stands closes over the same names, so that its code can be exchanged."""
    nobody = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    unused = ast.Lambda(nobody, node, lineno=1, col_offset=0, end_lineno=1, end_col_offset=0)
    pair = ast.List([changed, unused], ast.Load())
    return ast.copy_location(ast.Subscript(pair, ast.Constant(0), ast.Load()), node)


def _put(parent: ast.AST, field: str, at: int | None) -> Callable[[ast.AST], None]:
    def put(node: ast.AST) -> None:
        if at is None:
            setattr(parent, field, node)
        else:
            getattr(parent, field)[at] = node

    return put


def _name(file: Path) -> str:
    return file.resolve().relative_to(ROOT).as_posix()


CONTRACT = "tests/methods/test_contract.py"
"""What every method is held to: the slowest of the tests, and run only where it is asked for."""


def tests_for(file: Path, *, own: bool = False) -> list[str]:
    """What runs on a mutant of the file: its own tests first, then those of the methods it has or serves unless `own`."""
    first = [f"tests/{file.parent.name}/test_{file.stem}.py"]
    texts = {p: p.read_text(encoding="utf-8") for p in sorted((ROOT / "tests/methods").glob("test_*.py")) if p.name not in SLOW}
    if file.parent.name == "objective":
        named = sorted((ROOT / "tests/objective").glob("test_*.py"))
        about = [p for p in texts if p.name != "test_contract.py" and not own]
    else:
        names = registered(file)
        words = re.compile(r"\b(" + "|".join([*map(re.escape, names), re.escape(file.stem)]) + r")\b")
        named = []
        about = [p for p, text in texts.items() if words.search(text) and p.name != "test_contract.py"]
    listed = [*first, *(_name(p) for p in (*named, *about))]
    return [p for p in dict.fromkeys(listed) if (ROOT / p).is_file()]


def registered(file: Path) -> list[str]:
    """The methods that a file registers."""
    return re.findall(r"^@method\(.*?^def (\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def exchange(code: CodeType) -> bool:
    """Give every function of a loaded module, closures that exist among them, its code in `code`; whether any differs."""
    new: dict[tuple[str, int], CodeType] = {}
    waiting = [code]
    while waiting:
        inner = [c for c in waiting.pop().co_consts if isinstance(c, CodeType)]
        waiting += inner
        new |= {(c.co_qualname, c.co_firstlineno): c for c in inner}
    differs, terms = False, sys.modules["crosstrain.objective.terms"]
    gc.unfreeze()  # tests/conftest.py freezes what imports left, and what is frozen is not listed
    for function in [o for o in gc.get_objects() if isinstance(o, FunctionType) and o.__code__.co_filename == code.co_filename]:
        wanted = new.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
        if wanted is not None and wanted.co_freevars == function.__code__.co_freevars:
            differs |= wanted.co_code != function.__code__.co_code or wanted.co_consts != function.__code__.co_consts
            function.__code__ = wanted
            for name in OTHER_NAME:  # a mutant may call what its file does not import: no test sees more in a NameError
                if hasattr(terms, name):
                    function.__globals__.setdefault(name, getattr(terms, name))
    return differs


class Trials:
    """A pytest plugin that runs what was collected once for every mutant, each time in a fork of its own."""

    def __init__(self, wanted: Sequence[tuple[Mutant, CodeType]], timeout_s: float, told: Callable[[Mutant], None]) -> None:
        self.wanted, self.timeout_s, self.told = wanted, timeout_s, told

    def pytest_runtestloop(self, session: Any) -> bool:
        """Try every mutant; first of all the tests as they are, which must pass."""
        started = time.monotonic()
        outcome, by = self._try(session, None)
        print(f"\n{len(session.items)} tests, {time.monotonic() - started:.0f} s without a change", flush=True)
        if outcome != "survived":
            raise SystemExit(f"the tests fail without any change: {by or outcome}")
        for one, code in self.wanted:
            started = time.monotonic()
            outcome, by = self._try(session, code)
            self.told(replace(one, outcome=outcome, killed_by=by, seconds=round(time.monotonic() - started, 2)))
        return True

    def _try(self, session: Any, code: CodeType | None) -> tuple[str, str]:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            if code is not None and not exchange(code):
                os.write(write, b"untried")
                os._exit(0)
            for item, following in zip_longest(session.items, session.items[1:]):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.testsfailed:
                    os.write(write, item.nodeid.encode())
                    break
            os._exit(0)
        os.close(write)
        until = time.monotonic() + self.timeout_s
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > until:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "timeout", ""
            time.sleep(0.02)
        with os.fdopen(read) as pipe:
            by = pipe.read()
        return ("untried", "") if by == "untried" else ("killed", by) if by else ("survived", "")


def main(argv: list[str] | None = None) -> int:
    """Print a line per survivor and a table per file; write all mutants as JSON where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="JSON with every mutant")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds after which a mutant counts as caught")
    parser.add_argument("--contract", action="store_true", help="run the contract that every method keeps, too (slow)")
    parser.add_argument("--own", action="store_true", help="run the tests of the file's own folder alone")
    parser.add_argument("--kind", default="", help="only kinds that match this expression")
    parser.add_argument("--survivors", type=Path, help="only those that survived in this JSON, of an earlier --out")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    given = parser.parse_args(argv)
    done: list[Mutant] = []
    unseen: list[str] = []
    earlier = json.loads(given.survivors.read_text()) if given.survivors else []
    left = {(m["file"], m["kind"], m["before"], m["after"]) for m in earlier if m["outcome"] == "survived"}
    for file in given.files:
        wanted = [pair for pair in mutants(file) if re.search(given.kind, pair[0].kind)]
        if given.survivors:
            wanted = [pair for pair in wanted if (pair[0].file, pair[0].kind, pair[0].before, pair[0].after) in left]
        if given.list:
            for one, _ in wanted:
                print(_line(one))
        elif wanted:
            tests = [*tests_for(file, own=given.own), *([CONTRACT] if given.contract else [])]
            found = _tried(file, wanted, given.timeout, tests)
            done += found
            if all(m.outcome == "untried" for m in found):
                unseen.append(f"{_name(file)}: none of its {len(wanted)} mutants was tried")
            if given.out:
                given.out.write_text(json.dumps([asdict(m) for m in done], indent=1))
    if done:
        _table(done)
    for line in unseen:
        print(
            f"error: {line}: its tests fail as they are (see above), or `exchange` found no function to change", file=sys.stderr
        )
    return 1 if unseen else 0


def _tried(file: Path, wanted: Sequence[tuple[Mutant, CodeType]], timeout_s: float, tests: Sequence[str]) -> list[Mutant]:
    """The mutants of a file with their outcomes, from a process of its own."""
    print(_name(file), flush=True)
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as lines:
        child = os.fork()
        if child == 0:
            import pytest

            sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
            os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = tempfile.mkdtemp(prefix="hypothesis-")
            from crosstrain.testing import tiny_model

            tiny_model()  # what it imports is there before the first fork

            def told(one: Mutant) -> None:
                with open(lines.name, "a") as out:
                    out.write(json.dumps(asdict(one)) + "\n")
                if one.outcome == "survived":
                    print(f"survived  {_line(one)}", flush=True)

            # a test's own time limit would fail it while the process is paused, which is no mistake that it saw
            options = ["-q", "-s", "--no-header", "-p", "no:cacheprovider", "--timeout=0", "--rootdir", str(ROOT)]
            pytest.main([*options, *(str(ROOT / test) for test in tests)], plugins=[Trials(wanted, timeout_s, told)])
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        return [Mutant(**json.loads(line)) for line in lines]


def _line(one: Mutant) -> str:
    return f"{one.file}:{one.line} [{one.kind}] {one.before}  ->  {one.after}"


def _table(found: list[Mutant]) -> None:
    print(f"\n{'file':45} {'mutants':>8} {'killed':>8} {'timeout':>8} {'untried':>8} {'survived':>9}")
    for file in dict.fromkeys(m.file for m in found):
        by = Counter(m.outcome for m in found if m.file == file)
        print(f"{file:45} {by.total():8} {by['killed']:8} {by['timeout']:8} {by['untried']:8} {by['survived']:9}")


if __name__ == "__main__":
    sys.exit(main())
