"""Files to rows: what a row is follows from its columns, which are TRL's."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from crosstrain.errors import UserError

Kind = Literal["prompt", "prompt_completion", "messages", "preference", "unpaired"]
Text = str | tuple[Mapping[str, Any], ...]
"""Plain text, or chat messages."""

ROLES = ("system", "developer", "user", "assistant", "tool")
FORMATS = (".jsonl", ".json", ".csv", ".parquet")
SHAPES = (
    "prompt | prompt, completion | messages | prompt, chosen, rejected | chosen, rejected | prompt, completion, label; "
    "any further columns go to the reward function"
)


@dataclass(frozen=True)
class Row:
    """One row of data before tokenization.

    kind: which columns it has. columns: every column that is not text to train on; reward functions get them as keywords.
    where: `file:row`, counted from 1 (the line, in JSONL and CSV).
    """

    kind: Kind
    prompt: Text = ""
    completion: Text | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    chosen: Text | None = None
    rejected: Text | None = None
    label: bool | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


class BadRows(UserError):
    """Several rows that cannot be used; `problems` has a message for each."""

    def __init__(self, problems: Sequence[str], total: int) -> None:
        self.problems = tuple(problems)
        more = f" (and {len(problems) - 1} more bad rows of {total})" if len(problems) > 1 else ""
        super().__init__(f"{problems[0]}{more}")


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a JSONL, JSON, CSV or Parquet file, or of a `datasets` folder.

    Raises UserError (BadRows, with every message) naming file:row for what cannot be used: a missing, empty or unknown file, text
    that is not UTF-8, broken JSON, a missing or empty column, a wrong type, an unknown role, rows of different kinds.
    """
    return usable(look_at_rows(path), str(path))


def look_at_rows(path: str | Path) -> list[Row | UserError]:
    """Every row of a file, or why it cannot be used. Raises UserError when the file itself cannot."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    found: list[Row | UserError] = []
    for where, record in _records(path):
        try:
            found.append(parse_row(record() if callable(record) else record, where))
        except UserError as error:
            found.append(error)
    if not found:
        raise UserError(f"{path}: the file has no rows")
    return found


def usable(found: Sequence[Row | UserError], name: str) -> list[Row]:
    """The rows, when all can be used and are of one kind; else BadRows with every message. name: where they come from."""
    rows, problems = [r for r in found if isinstance(r, Row)], [str(r) for r in found if isinstance(r, UserError)]
    kinds = {row.kind: row.where for row in reversed(rows)}
    if len(kinds) > 1 and not problems:
        shown = "; ".join(f"{kind} from {where}" for kind, where in sorted(kinds.items(), key=lambda item: item[1]))
        problems.append(f"{name}: rows of different kinds in one file: {shown}. Use one file for each kind")
    if problems:
        raise BadRows(problems, len(found))
    return rows


def parse_row(record: Any, where: str) -> Row:
    """A row from a mapping of columns; columns that are None (as Arrow fills them in) count as absent.

    >>> parse_row({"prompt": "2+2=", "answer": "4"}, "rows.jsonl:1").columns
    {'answer': '4'}
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a row must be an object of columns; got {type(record).__name__}")
    given = {key: value for key, value in record.items() if value is not None}
    kind = _kind(set(given), where, empty=sorted(set(record) - set(given)))
    text = {"prompt", "completion", "messages", "chosen", "rejected", "label"}
    columns = {key: _without_none(value) for key, value in given.items() if key not in text}
    if kind == "messages":
        return Row("messages", messages=_messages(given["messages"], "messages", where), columns=columns, where=where)
    parts = {name: _text(given[name], name, where) for name in ("prompt", "completion", "chosen", "rejected") if name in given}
    if kind == "preference":
        if "prompt" not in parts:
            parts |= _split_shared_prompt(parts["chosen"], parts["rejected"], where)
        _same_format(parts, where)
        if parts["chosen"] == parts["rejected"]:
            raise UserError(f"{where}: chosen and rejected are the same; a pair must differ")
        return Row(
            "preference", parts["prompt"], chosen=parts["chosen"], rejected=parts["rejected"], columns=columns, where=where
        )
    _same_format(parts, where)
    label = None
    if kind == "unpaired":
        label = given["label"]
        if not isinstance(label, bool):
            raise UserError(f"{where}: column 'label' must be true or false; got {label!r}")
    return Row(kind, parts["prompt"], completion=parts.get("completion"), label=label, columns=columns, where=where)


def data_hash(rows: Iterable[Row]) -> str:
    """sha256 of the rows' content, whatever file they came from."""
    digest = hashlib.sha256()
    for row in rows:
        content = [row.kind, row.prompt, row.completion, row.messages, row.chosen, row.rejected, row.label, dict(row.columns)]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:row, columns or a function that gives them) for every row."""
    if path.is_dir():
        yield from _dataset_folder(path)
    elif path.suffix == ".parquet":
        yield from ((f"{path}:{i + 1}", record) for i, record in enumerate(_parquet(path)))
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
            if line.strip():
                yield (
                    f"{path}:{number}",
                    lambda line=line, number=number: _json(_utf8(line, f"{path}:{number}"), f"{path}:{number}"),
                )
    elif path.suffix == ".json":
        content = _json(_utf8_file(path), str(path))
        if not isinstance(content, list):
            raise UserError(
                f"{path}: a .json file must hold a list of rows; got {type(content).__name__} (one per line is .jsonl)"
            )
        yield from ((f"{path}:{i + 1}", record) for i, record in enumerate(content))
    elif path.suffix == ".csv":
        yield from _csv(path)
    else:
        raise UserError(f"{path}: unknown format {path.suffix!r}; allowed: {', '.join(FORMATS)}, or a `datasets` folder")


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.lib.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file that can be read: {str(error).splitlines()[0]}") from error
    return rows


def _dataset_folder(path: Path) -> Iterator[tuple[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: the folder is not one that `datasets` saved (save_to_disk)") from error
    if isinstance(dataset, DatasetDict):
        raise UserError(
            f"{path}: the folder holds several splits ({', '.join(dataset)}); name one, e.g. {path / next(iter(dataset))}"
        )
    yield from ((f"{path}:{i + 1}", dict(record)) for i, record in enumerate(dataset))


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(_utf8_file(path), newline=""))
    for record in reader:
        where = f"{path}:{reader.line_num}"
        if None in record or None in record.values():
            more = "more" if None in record else "fewer"
            message = f"{where}: the row has {more} fields than the header's {len(reader.fieldnames or ())}"
            yield where, lambda message=message: _refuse(message)
        else:
            label = {"true": True, "false": False}.get(record.get("label", "").lower())
            yield where, record | ({"label": label} if label is not None else {})


def _refuse(message: str) -> None:
    raise UserError(message)


def _utf8(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error


def _utf8_file(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON: {error.msg} at character {error.pos + 1}") from error


def _kind(given: set[str], where: str, empty: Sequence[str]) -> Kind:
    hint = f" (empty: {', '.join(empty)})" if empty else ""
    if "messages" in given:
        return "messages"
    if {"chosen", "rejected"} <= given:
        return "preference"
    if given & {"chosen", "rejected"}:
        missing = ({"chosen", "rejected"} - given).pop()
        raise UserError(f"{where}: column '{missing}' is missing{hint}; a preference row has both chosen and rejected")
    if "label" in given and "completion" not in given:
        raise UserError(f"{where}: column 'completion' is missing{hint}; a row with a label has prompt, completion and label")
    if "prompt" not in given:
        raise UserError(
            f"{where}: column 'prompt' is missing{hint}; got {', '.join(sorted(given)) or 'nothing'}; allowed: {SHAPES}"
        )
    if "completion" not in given:
        if "completion" in empty:
            raise UserError(f"{where}: column 'completion' is empty")
        return "prompt"
    return "unpaired" if "label" in given else "prompt_completion"


def _text(value: Any, column: str, where: str) -> Text:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: column '{column}' is empty")
        return value
    return _messages(value, column, where)


def _messages(value: Any, column: str, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: column '{column}' must be text or a list of chat messages; got {type(value).__name__}")
    if not value:
        raise UserError(f"{where}: column '{column}' is empty")
    result = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or "role" not in message:
            raise UserError(f"{where}: {column}[{i}] must be an object with role and content; got {message!r:.80}")
        role = message["role"]
        if role not in ROLES:
            raise UserError(f"{where}: {column}[{i}] has the unknown role {role!r}; allowed: {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise UserError(f"{where}: {column}[{i}] needs text in 'content'; got {type(content).__name__}")
        if role == "assistant" and not message.get("tool_calls") and not str(content).strip():
            raise UserError(f"{where}: {column}[{i}] is an assistant message without text; nothing could be learned from it")
        result.append(_without_none(dict(message)))
    return tuple(result)


def _same_format(parts: Mapping[str, Text], where: str) -> None:
    kinds = {name: "text" if isinstance(value, str) else "chat messages" for name, value in parts.items()}
    if len(set(kinds.values())) > 1:
        raise UserError(f"{where}: {', '.join(f'{name} is {kind}' for name, kind in kinds.items())}; use one form for all")


def _split_shared_prompt(chosen: Text, rejected: Text, where: str) -> dict[str, Text]:
    """The prompt that chosen and rejected message lists share, and what is left of each (TRL's implicit prompt)."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UserError(
            f"{where}: column 'prompt' is missing; it may only be left out when chosen and rejected are chat messages"
        )
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    n = min(n, len(chosen) - 1, len(rejected) - 1)
    if n == 0:
        raise UserError(f"{where}: chosen and rejected share no first message, so they have no prompt")
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def _without_none(value: Any) -> Any:
    """Nested Nones dropped from objects: Arrow adds every key of a column to every object in it."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_none(v) for v in value]
    return value
