"""Every code block of the documentation is checked; the language of a block says how.

- `console`: lines after `$ ` are commands. `make X` needs the target; `crosstrain ...` must parse, with the files it names;
  with a recipe or study it is also run with `--dry-run` (in `make test-all`: that loads the model).
- `python`: the blocks of a page run in order in one program, in a folder with a copy of examples/.
- `yaml`: a recipe, a study, or a part of one. `json`, `jsonl`, `toml`: parsed. `pycon`: run by doctest.
- `text`, `mermaid`, `html`, `diff`: not checked.

`<!-- test: real_model -->` anywhere in a page keeps its python blocks for `make test-all`. A block without a language is an
error.
"""

from __future__ import annotations

import doctest
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from crosstrain.cli import app, main
from crosstrain.config import Recipe, StudySpec, load_recipe, load_study, parse
from crosstrain.config.files import parse_yaml
from crosstrain.config.stages import Stage

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
FENCE = re.compile(r"^ *```([^\n`]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
UNCHECKED = {"text", "mermaid", "html", "diff"}
OTHER_COMMANDS = {"git", "cd", "export", "pip", "python", "ls", "cat", "open", "source"}


@dataclass(frozen=True)
class Block:
    """One fenced block: where it is, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1].strip(), m[2]) for m in FENCE.finditer(text)]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(*languages: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.language in languages]


def commands(block: Block) -> list[str]:
    joined = block.text.replace("\\\n", " ")
    return [line.strip()[2:] for line in joined.split("\n") if line.strip().startswith("$ ")]


def crosstrain_commands() -> list[Any]:
    found = [(block, c) for block in BLOCKS if block.language == "console" for c in commands(block)]
    return [pytest.param(c, id=f"{b} {c}") for b, c in found if is_ours(shlex.split(c, comments=True))]


def is_ours(words: list[str]) -> bool:
    return bool(words) and Path(words[0]).name == "crosstrain"


def test_every_block_has_a_known_language() -> None:
    known = UNCHECKED | {"console", "python", "pycon", "yaml", "json", "jsonl", "toml"}
    assert [f"{b}: {b.language!r}" for b in BLOCKS if b.language not in known] == []


@pytest.mark.parametrize("block", of("console"))
def test_commands_exist(block: Block) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert commands(block), f"{block}: a console block needs a line that starts with `$ `"
    for command in commands(block):
        words = shlex.split(command, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words[0] == "make":
            assert {w for w in words[1:] if "=" not in w} <= targets, command
        else:
            assert is_ours(words) or Path(words[0]).name in OTHER_COMMANDS, f"{block}: cannot check {command!r}"


def parse_only(arguments: list[str]) -> dict[str, Any]:
    """The parameters a command line gives, parsed as the real one but not run; raises where it would be refused."""
    command: Any = typer.main.get_command(app)
    name = "crosstrain"
    while getattr(command, "commands", None) and arguments and arguments[0] in command.commands:
        name, *arguments = arguments
        command = command.commands[name]
    assert not getattr(command, "commands", None) or arguments in (["--help"], ["--version"]), f"no such command: {arguments}"
    if arguments in (["--help"], ["--version"]):
        return {}
    return dict(command.make_context(name, arguments).params)


@pytest.mark.parametrize("command", crosstrain_commands())
def test_crosstrain_commands_parse_and_their_files_load(command: str) -> None:
    given = parse_only(shlex.split(command, comments=True)[1:])
    if (ROOT / str(given.get("recipe"))).is_file():
        load_recipe(ROOT / str(given["recipe"]), given["overrides"] or [])
    if (ROOT / str(given.get("spec"))).is_file():
        load_study(ROOT / str(given["spec"]), given["overrides"] or [])
    for key in ("recipe", "spec", "config", "file", "batch"):
        named = str(given.get(key) or "")
        assert not named.startswith("examples/") or (ROOT / named).exists(), f"{command}: there is no {named}"


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("command", crosstrain_commands())
def test_crosstrain_commands_dry_run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command, comments=True)[1:]
    if words[:1] not in (["train"], ["study"]) or not (ROOT / words[1]).is_file():
        pytest.skip("only train and study of a file in the repository have a dry run")
    monkeypatch.chdir(ROOT)
    assert main([*words, "--dry-run"]) == 0


def python_pages() -> list[Any]:
    pages = [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))]
    marks = {p: [pytest.mark.real_model] if "<!-- test: real_model -->" in p.read_text(encoding="utf-8") else [] for p in pages}
    return [pytest.param(page, id=str(page.relative_to(ROOT)), marks=marks[page]) for page in pages]


@pytest.mark.parametrize("page", python_pages())
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    code = "\n".join(b.text for b in blocks_of(page) if b.language == "python")
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, f"{page}:\n{code}\n{ran.stderr}"


@pytest.mark.parametrize("block", of("pycon"))
def test_python_sessions_show_what_they_print(block: Block) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, {}, str(block), str(block.page), block.line)
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


MINIMAL: dict[str, Any] = {"data": "rows.jsonl", "method": "sft", "learning_rate": 1e-5, "max_steps": 1}


def check_yaml(data: Any) -> None:
    """A study has arms, a recipe has data and a method or stages; anything else is a part, put into a minimal recipe."""
    assert isinstance(data, dict)
    if "arms" in data:
        parse(StudySpec, data)
        return
    base = {k: v for k, v in MINIMAL.items() if "stages" not in data or k not in Stage.model_fields}
    parse(Recipe, {**base, **data})


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_blocks_are_valid(block: Block) -> None:
    check_yaml(parse_yaml(block.text, str(block)))


@pytest.mark.parametrize("block", of("json", "jsonl", "toml"))
def test_data_blocks_parse(block: Block) -> None:
    if block.language == "toml":
        tomllib.loads(block.text)
    else:
        for text in block.text.strip().split("\n") if block.language == "jsonl" else [block.text]:
            json.loads(text)


@pytest.mark.parametrize("file", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda f: f.name)
def test_bundled_recipes_and_studies_are_valid(file: Path) -> None:
    check_yaml(parse_yaml(file.read_text(encoding="utf-8"), str(file)))


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: broken link {target}"


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        (["train", "r.yaml", "--set", "a=1", "--dry-run"], True),
        (["data", "check", "f.jsonl", "--model", "m"], True),
        (["--version"], True),
        (["train", "r.yaml", "--lr", "1"], False),
        (["trian", "r.yaml"], False),
        (["train"], False),
    ],
)
def test_the_checker_itself_tells_right_from_wrong(arguments: list[str], fits: bool) -> None:
    if fits:
        parse_only(arguments)
    else:
        with pytest.raises((typer.TyperException, AssertionError)):
            parse_only(arguments)
