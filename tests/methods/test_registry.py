"""Methods by name, with their settings on record, and from a file of one's own."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from crosstrain.errors import UserError
from crosstrain.methods import METHODS, load_method


@pytest.mark.parametrize("name", METHODS)
def test_a_method_records_its_name_paper_and_every_setting(name: str) -> None:
    made, entry = load_method(name), METHODS[name]
    assert made.name == name and made.paper == entry.paper and entry.paper.partition(":")[0] in ("arXiv", "doi")
    assert made.settings == entry.settings
    assert all(
        p.kind is p.KEYWORD_ONLY or p.default is not p.empty for p in inspect.signature(entry.factory).parameters.values()
    )


def test_named_settings_of_grpo_record_their_own_name_and_settings() -> None:
    made = load_method("dapo", num_generations=4)
    assert made.name == "dapo"
    assert set(made.settings) == set(METHODS["dapo"].settings) and made.settings["num_generations"] == 4


def test_unknown_names_and_settings_are_met_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="unknown method 'grpoo'; did you mean 'grpo'"):
        load_method("grpoo")
    with pytest.raises(UserError, match="unknown setting 'num_generation'; did you mean 'num_generations'"):
        load_method("grpo", num_generation=4)


OWN = """
from crosstrain.methods.plans import demonstrations
from crosstrain.objective.terms import by, nll
from crosstrain.types import Method, Per, Source

def weighted_sft(coef: float) -> Method:
    return half_sft(coef)

def half_sft(coef: float = 0.5) -> Method:
    if coef <= 0:
        raise ValueError(f"coef: got {coef}; it must be positive")
    return Method(terms=(nll("demo", on=by(Source.EXPERT), per=Per(("own_tokens",)), coef=coef),), plan=demonstrations())
"""


def test_a_method_of_ones_own_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    made = load_method(f"{file}:half_sft", coef=0.25)
    assert made.name == f"{file}:half_sft" and made.settings == {"coef": 0.25}
    assert made.terms[0].coefficient(0) == 0.25
    assert load_method(f"{file}:half_sft").settings == {"coef": 0.5}, "a record has defaults too"
    with pytest.raises(UserError, match="coef: got -1"):
        load_method(f"{file}:half_sft", coef=-1)
    with pytest.raises(UserError, match="'cof'; did you mean 'coef'"):
        load_method(f"{file}:half_sft", cof=1)
    with pytest.raises(UserError, match="no function 'half_sf'; did you mean 'half_sft'"):
        load_method(f"{file}:half_sf")
    with pytest.raises(UserError, match="'coef' has no default"):
        load_method(f"{file}:weighted_sft")
    with pytest.raises(UserError, match="there is no file"):
        load_method(f"{tmp_path}/other.py:half_sft")
