"""Configuration: what a recipe and a study file may say, how they are read, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crosstrain.config.data import DataSpec, FilterSpec, OrderSpec, SelectSpec, TextTeacherSpec
from crosstrain.config.evaluation import EvalSetSpec, EvaluationSpec
from crosstrain.config.files import config_hash, load, parse, read_mapping, to_yaml
from crosstrain.config.recipe import BudgetSpec, LoraSpec, ModelSpec, Recipe, SamplingSpec, SaveSpec
from crosstrain.config.rewards import RewardSpec, RewardsSpec
from crosstrain.config.stages import MethodSpec, Repeat, Stage, SwitchSpec
from crosstrain.config.study import ArmSpec, ContrastsSpec, SharedSpec, StudySpec, TuneSpec
from crosstrain.errors import UserError

__all__ = [
    "ArmSpec",
    "BudgetSpec",
    "ContrastsSpec",
    "DataSpec",
    "EvalSetSpec",
    "EvaluationSpec",
    "FilterSpec",
    "LoraSpec",
    "MethodSpec",
    "ModelSpec",
    "OrderSpec",
    "Recipe",
    "Repeat",
    "RewardSpec",
    "RewardsSpec",
    "SamplingSpec",
    "SaveSpec",
    "SelectSpec",
    "SharedSpec",
    "Stage",
    "StudySpec",
    "SwitchSpec",
    "TextTeacherSpec",
    "TuneSpec",
    "config_hash",
    "load_recipe",
    "load_study",
    "parse",
    "to_yaml",
]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML or JSON file, with `a.b=value` overrides; UserError names the key that is wrong."""
    if "arms" in read_mapping(path):
        raise UserError(f"{path} is a study: it has `arms`; run it with `crosstrain study`")
    return load(Recipe, path, overrides)


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
    """The study in a YAML or JSON file, with `a.b=value` overrides; UserError names the key that is wrong."""
    keys = read_mapping(path).keys()
    if "arms" not in keys and keys & {"method", "stages"}:
        raise UserError(f"{path} is a recipe for one run: it has no `arms`; run it with `crosstrain train`")
    return load(StudySpec, path, overrides)
