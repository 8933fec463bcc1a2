"""The command line: exit codes, one-line errors, what each command prints, and how `sample` talks."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from crosstrain import __version__
from crosstrain.cli import main
from crosstrain.errors import UserError
from crosstrain.methods import METHODS, load_method
from crosstrain.methods.describe import on_what, record

RECIPE = "data: rows.jsonl\nmethod: sft\nlearning_rate: 1e-5\nmax_steps: 1\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    return file


def raises(error: BaseException) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"crosstrain {__version__}\n"
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for command in ("train", "study", "eval", "sample", "report", "data", "methods"):
        assert command in listed
    for arguments in ([], ["data"]):
        assert main(arguments) == 0
        assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'? (see crosstrain --help)"),
        (["train"], "Missing argument 'RECIPE.yaml'"),
        (["train", "r.yaml", "--otu", "x"], "No such option: --otu"),
        (["train", "no.yaml"], "no.yaml: no such file"),
        (["study", "no.yaml"], "no.yaml: no such file"),
        (["methods", "show", "gropo"], "unknown method 'gropo'; did you mean 'grpo'?"),
        (["methods", "shwo"], "No such command 'shwo'. Did you mean 'show'?"),
        (["data", "chek"], "No such command 'chek'. Did you mean 'check'?"),
        (["sample", "m", "--temperature", "hot"], "Invalid value for '--temperature'"),
        (["eval", "nowhere"], "nowhere is no run, so it brings no evaluation"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_wrong_key_in_a_recipe_names_the_right_one(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--set", "batch_sise=4"]) == 2
    assert capsys.readouterr().err == f"error: {recipe}: unknown key 'batch_sise'; did you mean 'batch_size'?\n"


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (UserError("bad\ndata"), 2, "error: bad data\n"),
        (RuntimeError("a\nb"), 1, "error: internal error: RuntimeError: a b; --debug shows the traceback\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; the same command goes on from the last checkpoint\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, start: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("crosstrain.config.load_recipe", raises(error))
    assert main(["train", "r.yaml"]) == code
    assert capsys.readouterr().err == start


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("crosstrain.config.load_recipe", raises(UserError("bad")))
    assert main(["train", "r.yaml", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("error: bad\n")


def test_ctrl_c_ends_the_process_with_130() -> None:
    # whoever runs the tests in the background has them inherit an ignored SIGINT
    code = "import signal, sys, time, crosstrain.cli as cli\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "import crosstrain.config as c\nc.load_recipe = lambda *a: (print('up', flush=True), time.sleep(60))\n"
    code += "sys.exit(cli.main(['train', 'r.yaml']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == 130
    assert shown.startswith("error: interrupted")


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-m", "crosstrain.cli", "methods"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(write)
    assert ran.stderr == ""


def test_methods_lists_every_method_with_its_paper(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    for name, entry in METHODS.items():
        assert name in listed
        assert entry.paper in listed and entry.checked.split()[0] in listed
    assert main(["methods", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)["methods"]
    assert [r["name"] for r in records] == list(METHODS)


def test_a_methods_record_says_what_it_needs_and_where_it_is_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "show", "chord_phi", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = {"family": "hybrid", "direction": "SFT+RL", "data": "offline + online", "needs": ["demonstrations", "verifier"]}
    assert {k: found[k] for k in wanted} == wanted
    assert (found["paper"], found["year"], found["checked"]) == ("arXiv:2508.11408", 2025, "official source")
    assert [t["coefficient"] for t in found["terms"]] == ["schedule", "schedule"] and found["settings"]["mu"] == 0.1


@pytest.mark.parametrize(
    ("name", "data", "needs"),
    [
        ("sft", "offline", ["demonstrations"]),
        ("dpo", "offline", ["preferences", "reference model"]),
        ("simpo", "offline", ["preferences"]),
        ("grpo", "online", ["verifier", "reference model"]),
        ("reinforce", "online", ["verifier"]),
        ("replay", "online", ["verifier"]),
        ("srl", "offline + online", ["demonstrations"]),
    ],
)
def test_what_a_method_asks_of_a_run(name: str, data: str, needs: list[str]) -> None:
    found = record(name)
    assert (found["data"], found["needs"]) == (data, needs)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_shows_the_terms_and_settings_of_each(name: str) -> None:
    from crosstrain.cli_methods import print_one

    console = Console(width=200, record=True, file=io.StringIO())
    print_one(name, console)
    shown = console.export_text()
    made = load_method(name)
    for term in made.terms:
        assert term.name in shown
        assert str(term.per) in shown
    for key, value in made.settings.items():
        assert key in shown
        assert repr(value) in shown


@pytest.mark.parametrize(
    ("name", "on"),
    [
        ("sft", ["expert"]),
        ("grpo", ["policy", "policy"]),
        ("luffy", ["policy", "expert"]),
        ("raft", ["policy"]),
        ("replay", ["policy", "policy (replayed)"]),
        ("nft", ["policy (reward above 0)", "policy (reward not above 0)"]),
        ("srft", ["expert", "expert", "policy (reward above 0)", "policy (reward not above 0)"]),
        ("orpo", ["expert (best row)", "expert"]),
    ],
)
def test_whose_tokens_a_term_is_on(name: str, on: list[str]) -> None:
    assert [on_what(term) for term in load_method(name).terms] == on


class Scripted:
    """A tokenizer and a sampler in one: characters are tokens, the answer is the last message in capitals."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool, int, int]] = []

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: Any) -> list[int]:
        return [ord(c) for c in "|".join(f"{m['role'][0]}:{m['content']}" for m in messages)]

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(map(chr, tokens))

    def sample(self, prompts: Sequence[Any], sampling: Any, *, seed: int, step: int) -> list[list[Any]]:
        from crosstrain.rollout.sampler import Completion

        [prompt] = prompts
        text = self.decode(prompt.tokens)
        self.asked.append((text, prompt.greedy, seed, step))
        tokens = tuple(ord(c) for c in text.rsplit(":", 1)[1].upper())
        return [[Completion(tokens, (0.0,) * len(tokens), True)]]


def scripted_chat(system: str | None = None) -> tuple[Any, Scripted]:
    from crosstrain.cli_model import Chat
    from crosstrain.rollout.sampler import Sampling

    model = Scripted()
    return Chat(model, model, system, Sampling(), greedy=False, seed=3), model


def test_sample_answers_one_prompt_with_the_system_message_first() -> None:
    from crosstrain.cli_model import talk

    chat, model = scripted_chat("be brief")
    said: list[str] = []
    talk(chat, "hello", say=said.append)
    assert said == ["HELLO"]
    assert model.asked == [("s:be brief|u:hello", False, 3, 1)]


def test_sample_answers_each_piped_line_on_its_own() -> None:
    from crosstrain.cli_model import talk

    chat, model = scripted_chat()
    said: list[str] = []
    talk(chat, None, lines=["one\n", "\n", "two\n"], interactive=False, say=said.append)
    assert said == ["ONE", "TWO"]
    assert [text for text, *_ in model.asked] == ["u:one", "u:two"]


def test_sample_remembers_a_conversation_until_an_empty_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from crosstrain.cli_model import talk

    typed = iter(["one", "two", "", "three"])

    def read(mark: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat, model = scripted_chat()
    talk(chat, None, interactive=True, say=lambda text: None)
    assert [text for text, *_ in model.asked] == ["u:one", "u:one|a:ONE|u:two", "u:three"]


def test_an_unfinished_run_has_no_model_yet(tmp_path: Path) -> None:
    from crosstrain.cli_model import model_of

    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match="no model/ folder yet"):
        model_of(str(tmp_path))
    (tmp_path / "model").mkdir()
    assert model_of(str(tmp_path)) == str(tmp_path / "model")
    assert model_of("smollm2-135m-instruct") == "smollm2-135m-instruct"
