"""Files to rows: every format gives the same rows, and every mistake names its file and row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosstrain.data.rows import BadRows, Row, data_hash, parse_row, read_rows
from crosstrain.errors import UserError

ROWS = [{"prompt": "2+2=", "completion": "4", "answer": "4"}, {"prompt": "1+2=", "completion": "3", "answer": "3"}]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    elif name.endswith(".csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        from datasets import Dataset

        dataset = Dataset.from_list(rows)
        dataset.to_parquet(str(path)) if name.endswith(".parquet") else dataset.save_to_disk(str(path))
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "folder"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = read_rows(write(tmp_path, name, ROWS))
    assert [(r.kind, r.prompt, r.completion, r.columns) for r in rows] == [
        ("prompt_completion", "2+2=", "4", {"answer": "4"}),
        ("prompt_completion", "1+2=", "3", {"answer": "3"}),
    ]
    assert data_hash(rows) == data_hash(read_rows(write(tmp_path, "same.jsonl", ROWS)))


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"prompt": "a"}, "prompt"),
        ({"prompt": "a", "answer": "b", "level": 3}, "prompt"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "completion": "b", "answer": "b"}, "prompt_completion"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired"),
        ({"prompt": "a", "completion": None, "chosen": "b", "rejected": "c"}, "preference"),
    ],
)
def test_the_columns_say_what_a_row_is(record: dict[str, Any], kind: str) -> None:
    assert parse_row(record, "rows.jsonl:1").kind == kind


def test_other_columns_are_kept_for_the_reward() -> None:
    row = parse_row({"prompt": "a", "completion": "b", "answer": "4", "level": 2, "meta": {"x": 1, "y": None}}, "r:1")
    assert row.columns == {"answer": "4", "level": 2, "meta": {"x": 1}}


def test_an_implicit_prompt_is_what_chosen_and_rejected_share() -> None:
    ask, good, bad = ({"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("assistant", "c")))
    row = parse_row({"chosen": [ask, good], "rejected": [ask, bad]}, "r:1")
    assert (row.prompt, row.chosen, row.rejected) == ((ask,), (good,), (bad,))


CHAT = [{"role": "user", "content": "a"}]
BAD: dict[str, tuple[bytes, str]] = {
    "broken JSON": (b'{"prompt": "a"}\n{"prompt": "b"', ":2: broken JSON: Expecting ',' delimiter at character 15"),
    "no object": (b"[1, 2]\n", ":1: a row must be an object of columns; got list"),
    "missing column": (b'{"question": "a"}\n', ":1: column 'prompt' is missing; got question; allowed: prompt |"),
    "missing rejected": (b'{"prompt": "a", "chosen": "b"}\n', ":1: column 'rejected' is missing"),
    "label alone": (b'{"prompt": "a", "label": true}\n', ":1: column 'completion' is missing"),
    "empty column": (b'{"prompt": "a"}\n\n{"prompt": " "}\n', ":3: column 'prompt' is empty"),
    "null completion": (b'{"prompt": "a", "completion": null}\n', ":1: column 'completion' is empty"),
    "wrong type": (b'{"prompt": 3}\n', ":1: column 'prompt' must be text or a list of chat messages; got int"),
    "wrong label": (b'{"prompt": "a", "completion": "b", "label": 1}\n', ":1: column 'label' must be true or false; got 1"),
    "mixed forms": (
        json.dumps({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}).encode(),
        ":1: prompt is text, completion is chat messages; use one form for all",
    ),
    "unknown role": (
        json.dumps({"messages": [{"role": "human", "content": "a"}]}).encode(),
        ":1: messages[0] has the unknown role 'human'; allowed: system, developer, user, assistant, tool",
    ),
    "no content": (json.dumps({"messages": [{"role": "user"}]}).encode(), ":1: messages[0] needs text in 'content'"),
    "no role": (
        json.dumps({"messages": [{"content": "a"}]}).encode(),
        ":1: messages[0] must be an object with role and content",
    ),
    "empty answer": (
        json.dumps({"messages": [*CHAT, {"role": "assistant", "content": " "}]}).encode(),
        ":1: messages[1] is an assistant message without text",
    ),
    "same pair": (b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n', ":1: chosen and rejected are the same"),
    "no shared prompt": (b'{"chosen": "b", "rejected": "c"}\n', ":1: column 'prompt' is missing; it may only be left out"),
    "not UTF-8": (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', ":2: not UTF-8 (byte 13); save the file as UTF-8"),
    "empty file": (b"", ": the file has no rows"),
    "blank file": (b"\n \n", ": the file has no rows"),
    "mixed kinds": (b'{"prompt": "a"}\n{"prompt": "a", "completion": "b"}\n', ": rows of different kinds in one file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_names_the_row_and_the_fix(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_rows(file)
    assert f"{file}{message}" in str(caught.value)


def test_every_bad_row_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": ""}\n{"prompt": "a"}\n{"prompt": 1}\n{"promt": "a"}\n')
    with pytest.raises(BadRows) as caught:
        read_rows(file)
    assert [p.split(": ")[0] for p in caught.value.problems] == [f"{file}:1", f"{file}:3", f"{file}:4"]
    assert str(caught.value).endswith("(and 2 more bad rows of 4)")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"a", "unknown format '.txt'; allowed: .jsonl, .json, .csv, .parquet, or a `datasets` folder"),
        ("rows.json", b'{"prompt": "a"}', "a .json file must hold a list of rows; got dict"),
        ("rows.json", b'[{"prompt": "a"},', "broken JSON"),
        ("rows.json", b'[{"prompt": "\xff"}]', "rows.json:1: not UTF-8"),
        ("rows.csv", b"prompt,completion\na,b\nc\n", "rows.csv:3: the row has fewer fields than the header's 2"),
        ("rows.csv", b"prompt,completion\na,b,c\n", "rows.csv:2: the row has more fields than the header's 2"),
        ("rows.csv", b"prompt,completion\na,\n", "rows.csv:2: column 'completion' is empty"),
        ("rows.csv", b"prompt\n\xff\n", "rows.csv:2: not UTF-8"),
        ("rows.csv", b"", "the file has no rows"),
        ("rows.parquet", b"PAR1 and no more", "not a Parquet file that can be read"),
    ],
)
def test_bad_files_of_other_formats(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_rows(tmp_path / name)
    assert message in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="not one that `datasets` saved"):
        read_rows(tmp_path)
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match=r"holds several splits \(train, test\); name one, e\.g\. .*/splits/train"):
        read_rows(tmp_path / "splits")
    assert len(read_rows(tmp_path / "splits" / "train")) == 2


def test_byte_order_marks_and_windows_line_ends(tmp_path: Path) -> None:
    lines = '\ufeff{"prompt": "a"}\r\n{"prompt": "b"}\r\n'
    (tmp_path / "rows.jsonl").write_bytes(lines.encode())
    assert [r.prompt for r in read_rows(tmp_path / "rows.jsonl")] == ["a", "b"]
    (tmp_path / "rows.csv").write_bytes('\ufeffprompt,label,completion\r\na,true,"b, c"\r\n'.encode())
    [row] = read_rows(tmp_path / "rows.csv")
    assert (row.kind, row.prompt, row.completion, row.label) == ("unpaired", "a", "b, c", True)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_text_comes_back_unchanged(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = write(tmp_path_factory.mktemp("rows"), "rows.jsonl", [{"prompt": text, "answer": text}])
    assert read_rows(path) == [Row("prompt", text, columns={"answer": text}, where=f"{path}:1")]


def test_the_hash_sees_every_part_of_a_row() -> None:
    row = Row("prompt_completion", "a", completion="b", columns={"answer": "b"}, where="x:1")
    others = [
        Row("prompt_completion", "a", completion="c", columns={"answer": "b"}),
        Row("prompt_completion", "a", completion="b", columns={"answer": "c"}),
        Row("prompt", "a", columns={"answer": "b"}),
    ]
    assert len({data_hash([r]) for r in (row, *others)}) == 4
    assert data_hash([row]) == data_hash([Row("prompt_completion", "a", completion="b", columns={"answer": "b"}, where="y:9")])
    assert data_hash([row, others[0]]) != data_hash([others[0], row])
