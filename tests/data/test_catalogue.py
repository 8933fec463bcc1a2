"""The list of what can be done to data: every setting there is stands in it, and all that stands in it is one."""

from __future__ import annotations

import json
import re
from typing import get_args

import pytest

from crosstrain.cli import main
from crosstrain.config import DataSpec, FilterSpec, OrderSpec, SelectSpec, TextTeacherSpec
from crosstrain.data.catalogue import DATA_METHODS

SPECS = {"teacher": TextTeacherSpec, "filter": FilterSpec, "select": SelectSpec, "order": OrderSpec, "mixture": DataSpec}


def test_every_setting_is_named_and_every_name_is_a_setting() -> None:
    named: dict[str, set[str]] = {}
    for one in DATA_METHODS:
        key, _, inside = one.key.partition(": ")
        assert key in DataSpec.model_fields
        words = set(re.findall(r"\w+", inside))
        named[key] = named.get(key, set()) | words
        allowed = set(SPECS[key].model_fields)
        if key == "select":
            allowed |= set(get_args(SelectSpec.model_fields["rule"].annotation))
        if key == "order":
            allowed |= set(get_args(OrderSpec.model_fields["pacing"].annotation))
        assert words <= allowed, f"{one.name}: {words - allowed}"
    assert set(get_args(SelectSpec.model_fields["rule"].annotation)) <= named["select"]
    assert set(get_args(OrderSpec.model_fields["pacing"].annotation)) <= named["order"]
    assert set(FilterSpec.model_fields) - named["filter"] == {"near_threshold"}


def test_years_are_those_of_the_papers() -> None:
    for one in DATA_METHODS:
        assert one.year == (2000 + int(one.paper.removeprefix("arXiv:")[:2]) if one.paper else None)
        assert one.does and not one.does.endswith(".") and "\n" not in one.does


def test_they_are_listed_below_the_methods(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    for one in DATA_METHODS:
        assert one.name in shown and one.key in shown
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in found["data"]] == [one.name for one in DATA_METHODS]
    assert found["methods"] and set(found) == {"methods", "data"}
