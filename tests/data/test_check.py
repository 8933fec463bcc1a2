"""`crosstrain data check`: what it says of a good file, and that a bad one ends with file:row and exit code 2."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from crosstrain.cli import main
from crosstrain.data.check import check, marked
from crosstrain.testing import save_tiny_model, tiny_tokenizer
from crosstrain.types import Source, Trajectory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def said(file: Path, model: str, **more: Any) -> str:
    out = io.StringIO()
    check(file, model, **{"max_prompt_length": 50, "max_length": 60, **more}, console=Console(file=out, width=200))
    return out.getvalue()


def test_demonstrations(tmp_path: Path, model: str) -> None:
    rows = [{"prompt": "a" * n, "completion": "b" * 9, "answer": "b"} for n in (2, 4, 4, 50)]
    shown = said(write(tmp_path, rows), model)
    assert "4 rows, plain text" in shown
    assert "type: prompt + completion: a demonstration each" in shown
    assert "columns for the reward: answer" in shown
    assert ["prompt", "2", "4", "43", "50"] in [line.split() for line in shown.splitlines()]
    assert ["answer", "10", "10", "10", "10"] in [line.split() for line in shown.splitlines()]
    assert "truncation: none" in shown
    assert f"duplicates: 1, first {tmp_path}/rows.jsonl:3" in shown
    assert "trained: 40 of 100 tokens (40.0%)" in shown
    assert f"aaaa[[{'b' * 9}<|im_end|>]]" in shown


def test_truncation_is_counted(tmp_path: Path, model: str) -> None:
    rows = [{"prompt": "a", "completion": "b" * n} for n in (3, 80, 90)]
    shown = said(write(tmp_path, rows), model)
    assert f"truncation: 2 of 3 answers are longer than max_length 60 and would be cut, first {tmp_path}/rows.jsonl:2" in shown


def test_prompts_alone_and_pairs(tmp_path: Path, model: str) -> None:
    shown = said(write(tmp_path, [{"prompt": "2+2=", "answer": "4"}]), model)
    assert "trained: completions that the model samples" in shown
    assert "[[" not in shown.split("first batch")[1].split("\n", 1)[1]
    shown = said(write(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}]), model)
    assert "rows.jsonl:1 (reward 1)\na[[b<|im_end|>]]" in shown
    assert "rows.jsonl:1 (reward 0)\na[[c<|im_end|>]]" in shown


def test_the_mask_is_in_colour_in_a_terminal() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("ab")["input_ids"]
    trajectory = Trajectory(tuple(tokens), (Source.PROMPT, Source.EXPERT))
    shown = marked(trajectory, tokenizer, coloured=True)
    assert [(str(s.style), shown.plain[s.start : s.end]) for s in shown.spans] == [("dim", "a"), ("bold green", "b")]


def test_long_texts_are_shortened_in_the_middle() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tuple(tokenizer("a" * 500)["input_ids"])
    shown = marked(Trajectory(tokens, (Source.PROMPT,) * 500), tokenizer, coloured=False).plain
    assert shown == "a" * 150 + " [... 200 characters ...] " + "a" * 150


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"', ":1: broken JSON"),
        ('{"promt": "a"}', ":1: column 'prompt' is missing"),
        ('{"prompt": ""}', ":1: column 'prompt' is empty"),
        ('{"prompt": 1}', ":1: column 'prompt' must be text"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', ":1: messages[0] has the unknown role 'bot'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', ":1: no assistant message, so no token would be supervised"),
        ('{"prompt": "aaaaaaaaaaa"}', ":1: the prompt has 11 tokens, more than max_prompt_length 10"),
        ("", ": the file has no rows"),
    ],
)
def test_a_bad_file_exits_with_2_and_names_the_row(
    tmp_path: Path, model: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    assert main(["data", "check", str(file), "--model", model, "--max-prompt-length", "10"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}{message}")


def test_every_bad_row_is_listed(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, [{"prompt": "a" * n} for n in (1, 11, 12)])
    assert main(["data", "check", str(file), "--model", model, "--max-prompt-length", "10"]) == 2
    shown = capsys.readouterr()
    assert [line.split(" ")[0] for line in shown.out.splitlines()] == [f"{file}:2:", f"{file}:3:"]
    assert "(and 1 more bad rows of 3)" in shown.err


def test_rows_that_cannot_be_read_and_rows_that_cannot_be_used_are_listed_together(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, [{"prompt": "a" * 11}, {"promt": "a"}, {"prompt": "a"}, {"prompt": "a" * 12}])
    assert main(["data", "check", str(file), "--model", model, "--max-prompt-length", "10"]) == 2
    assert [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()] == [f"{file}:{n}:" for n in (1, 2, 4)]


def test_a_single_bad_row_is_told_once(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, [{"promt": "a"}, {"prompt": "a"}])
    assert main(["data", "check", str(file), "--model", model]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("rows.jsonl:1")) == ("", 1)


def test_data_cannot_steer_the_terminal(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(write(tmp_path, [{"prompt": "a\x1b[2J", "completion": "b\x07\u200d"}]), model)
    assert "a\\x1b[2J[[b\\x07\u200d" in shown
    assert "\\x1b[2J, [/x]" in said(write(tmp_path, [{"prompt": "a", "\x1b[2J": 1, "[/x]": 1}]), model)
    for rows in (1, 2):
        wrong = write(tmp_path, [{"\x1b[2J": "a"}] * rows)
        assert main(["data", "check", str(wrong), "--model", model]) == 2
        shown = "".join(capsys.readouterr())
        assert "\\x1b[2J" in shown
        assert "\x1b" not in shown


def test_not_utf8(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    assert main(["data", "check", str(file), "--model", model]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}:2: not UTF-8")
