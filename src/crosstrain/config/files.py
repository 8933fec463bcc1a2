"""Reading configuration: YAML with YAML 1.2 scalars, `--set` overrides, and errors that name the key and the fix."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from crosstrain.config.fields import FOR_HASH
from crosstrain.errors import UserError, nearest

Model = TypeVar("Model", bound=BaseModel)

SHOWN = 8
"""Mistakes that one message lists."""

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 numbers and booleans, and an error for a key written twice.

    PyYAML follows YAML 1.1, where `1e-5` is a string, `on` is true and `010` is 8.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag.rsplit(":", 1)[-1] not in {"bool", "int", "float"}]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is written twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` says, by YAML 1.2 rules for numbers and booleans.

    >>> parse_yaml("{learning_rate: 1e-5, schedule: on, size: 1_000}", "here")
    {'learning_rate': 1e-05, 'schedule': 'on', 'size': 1000}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def parse_json(text: str, where: str) -> Any:
    """The value that `text` says as JSON, with an error for a key written twice.

    >>> parse_json('{"learning_rate": 1e-5}', "here")
    {'learning_rate': 1e-05}
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise UserError(f"{where}: not valid JSON: the key {twice!r} is written twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        problem = error.msg[:1].lower() + error.msg[1:]
        raise UserError(f"{where}:{error.lineno}:{error.colno}: not valid JSON: {problem}") from error


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a file: JSON where its name ends in .json, else YAML."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file (looked in {Path.cwd()})") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder; give the YAML or JSON file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    data = (parse_json if file.suffix == ".json" else parse_yaml)(text, str(file))
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected keys and values at the top level, got {_say(data)}")
    return data


def set_path(data: Any, path: Sequence[str], value: Any, *, where: str) -> Any:
    """A copy of nested mappings and lists with the entry at `path` set; list entries are named by their index.

    >>> set_path({"stages": [{"seed": 0}]}, ["stages", "0", "seed"], 7, where="--set")
    {'stages': [{'seed': 7}]}
    """
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(data, list):
        if not re.fullmatch(r"-?[0-9]+", head) or not -len(data) <= int(head) < len(data):
            raise UserError(f"{where}: {head!r} is no index of a list of {len(data)}; use 0 to {len(data) - 1}")
        copy = list(data)
        copy[int(head)] = set_path(data[int(head)], rest, value, where=where)
        return copy
    if data is not None and not isinstance(data, Mapping):
        raise UserError(f"{where}: {head!r} is inside {_say(data)}, which has no keys; write that part out in full first")
    return {**(data or {}), head: set_path((data or {}).get(head), rest, value, where=where)}


def override(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The mapping with each `a.b=value` applied in order; values are read as YAML.

    >>> override({"seed": 0}, ["seed=3", "data.path=rows.jsonl"])
    {'seed': 3, 'data': {'path': 'rows.jsonl'}}
    """
    for text in overrides:
        dotted, equals, value = text.partition("=")
        if not equals or not dotted.strip():
            raise UserError(f"--set {text}: expected key=value, for example --set seed=1")
        path = dotted.strip().split(".")
        data = set_path(data, path, parse_yaml(value, f"--set {dotted}"), where=f"--set {text}")
    return data


def parse(model: type[Model], data: Any, *, where: str = "") -> Model:
    """A validated `model`; every mistake becomes one UserError with the full key, what was got and what is allowed."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # Unknown keys first: what is missing is often what was misspelt.
        ordered = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        mistakes = list(dict.fromkeys(_explain(model, data, dict(one)) for one in ordered))
        more = f" (and {len(mistakes) - SHOWN} more mistakes)" if len(mistakes) > SHOWN else ""
        raise UserError(f"{where + ': ' if where else ''}{'; '.join(mistakes[:SHOWN])}{more}") from error


def load(model: type[Model], path: str | Path, overrides: Sequence[str] = ()) -> Model:
    """The validated `model` in a YAML or JSON file, with `--set` overrides applied."""
    return parse(model, override(read_mapping(path), overrides), where=str(path))


def config_hash(config: BaseModel) -> str:
    """SHA-256 (hex) of the configuration's canonical JSON: equal for equal settings, however they were written, and whatever says
    only how a server is reached."""
    content = config.model_dump(mode="json", context=FOR_HASH)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def to_yaml(config: BaseModel) -> str:
    """The configuration as YAML that loads to an equal one; settings left at their default are left out."""
    data = config.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def _say(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", int: "a whole number", float: "a number"}
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kinds.get(type(value), type(value).__name__)})"


def _explain(model: type[BaseModel], data: Any, error: dict[str, Any]) -> str:
    """One mistake as pydantic reports it, in our words, at the key as the user wrote it."""
    key = _as_written(data, error["loc"], missing=error["type"] == "missing")
    if error["type"] == "extra_forbidden":
        options = _allowed_keys(model, error["loc"][:-1], _at(data, key[:-1]))
        return f"unknown key {_dotted(key)!r}; {nearest(str(key[-1]), options)}"
    if error["type"] == "missing":
        return f"missing key {_dotted(key)!r}"
    place = f"{_dotted(key)}: " if key else ""
    if error["type"] == "value_error":
        return f"{place}{error['ctx']['error']}"
    allowed = error["msg"].replace("Input should be", "must be")
    if error["type"] == "model_type":
        allowed = "must be a mapping of keys to values"
    return f"{place}{allowed}, got {_say(error['input'])}"


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in path)


def _at(data: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        data = data[part]
    return data


def _as_written(data: Any, loc: Sequence[str | int], *, missing: bool) -> list[str | int]:
    """The parts of `loc` that the user's own data have: shorthands such as a flat stage have no `stages.0`."""
    key: list[str | int] = []
    for i, part in enumerate(loc):
        listed = isinstance(data, list) and isinstance(part, int) and part < len(data)
        inside = part in data if isinstance(data, Mapping) else listed
        if inside:
            data = data[part]  # type: ignore[index]
            key.append(part)
        elif missing and i == len(loc) - 1:
            key.append(part)
    return key


def _allowed_keys(model: type[BaseModel], loc: Sequence[str | int], written: Any) -> list[str]:
    """The keys allowed in the part of `model` at `loc`; with those of a stage where one may be written flat."""
    at: Any = model
    kinds: dict[str, Any] = {}
    for part in loc:
        if part in kinds:  # one of several things that may stand here, such as a stage or a repetition
            at = kinds[str(part)]
        elif _is_model(at) and part in at.model_fields:
            inside = _models(at.model_fields[part].annotation)
            kinds, at = {one.__name__: one for one in inside}, next(iter(inside), None)
    options = list(at.model_fields) if _is_model(at) else []
    if "stages" in options and not (isinstance(written, Mapping) and "stages" in written):
        options += list(_inner(at.model_fields["stages"].annotation).model_fields)
    return options


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _inner(annotation: Any) -> Any:
    """The first model inside an annotation such as `list[Stage]`, `dict[str, DataSpec]` or `LoraSpec | None`."""
    return next(iter(_models(annotation)), None)


def _models(annotation: Any) -> list[Any]:
    """All models inside an annotation."""
    return [annotation] if _is_model(annotation) else [found for arg in get_args(annotation) for found in _models(arg)]
