"""Recipes and studies: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crosstrain.config import Recipe, StudySpec, config_hash, load_recipe, load_study, parse, to_yaml
from crosstrain.config.files import override, parse_yaml
from crosstrain.config.stages import Stage
from crosstrain.errors import UserError

FLAT: dict[str, Any] = {"data": "rows.jsonl", "method": "sft", "learning_rate": 1e-5, "max_steps": 3}
STUDY: dict[str, Any] = {
    "name": "s",
    "shared": {"data": {"task": "sums"}},
    "budget": {"amount": 1e5},
    "arms": [
        {"method": "sft", "learning_rate": 1e-5},
        {
            "stages": [
                {"method": "sft", "learning_rate": 1e-5, "budget_share": 0.5},
                {"method": {"grpo": {"beta": 0}}, "learning_rate": 1e-6, "budget_share": 0.5},
            ]
        },
    ],
}


def refusal(model: type[Any], data: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse(model, data)
    return str(caught.value)


def test_a_flat_recipe_is_the_same_as_its_one_stage_written_out() -> None:
    full = {
        "data": {"train": {"path": "rows.jsonl"}},
        "stages": [{"method": {"name": "sft", "settings": {}}, "learning_rate": 1e-5, "max_steps": 3}],
    }
    assert parse(Recipe, FLAT) == parse(Recipe, full)


@pytest.mark.parametrize(
    ("short", "name", "settings"),
    [
        ("grpo", "grpo", {}),
        ({"grpo": {"beta": 0.0}}, "grpo", {"beta": 0.0}),
        ({"grpo": None}, "grpo", {}),
        ({"name": "grpo", "settings": {"beta": 0.0}}, "grpo", {"beta": 0.0}),
        ({"name": "grpo"}, "grpo", {}),
        ("mine.py:make", "mine.py:make", {}),
    ],
)
def test_every_way_to_write_a_method(short: Any, name: str, settings: dict[str, Any]) -> None:
    method = parse(Recipe, {**FLAT, "method": short}).stages[0].method
    assert (method.name, method.settings) == (name, settings)


def test_other_shorthands() -> None:
    recipe = parse(Recipe, {**FLAT, "model": "folder", "rewards": ["task", {"name": "f.py:g", "weight": 0.5}]})
    assert recipe.model.name == "folder"
    assert recipe.rewards is not None
    assert [(r.name, r.weight) for r in recipe.rewards.functions] == [("task", 1.0), ("f.py:g", 0.5)]
    streams = parse(Recipe, {**FLAT, "data": {"rl": {"task": "sums"}, "demos": "d.jsonl"}}).data
    assert (streams["rl"].task, streams["demos"].path) == ("sums", "d.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lerning_rate": 1}, "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"presicion": "fp32"}, "unknown key 'presicion'; did you mean 'precision'?"),
        ({"model": {"nam": "x"}}, "unknown key 'model.nam'; did you mean 'name'?"),
        ({"data": {"path": "a", "tsk": "b"}}, "unknown key 'data.tsk'; did you mean 'task'?"),
        ({"data": {"train": {"path": "a", "tsk": "b"}}}, "unknown key 'data.train.tsk'; did you mean 'task'?"),
        ({"rewards": ["a", {"name": "b", "wight": 1}]}, "unknown key 'rewards.1.wight'; did you mean 'weight'?"),
        ({"model": {"lora": {"rank": 8}}}, "unknown key 'model.lora.rank'; allowed: alpha, dropout, r, target_modules"),
        ({"until": {"metrc": "x"}}, "unknown key 'until.metrc'; did you mean 'metric'?"),
        ({"precision": "fp16"}, "precision: must be 'auto', 'fp32', 'mixed' or 'bf16', got 'fp16' (text)"),
        ({"batch_size": "x"}, "batch_size: must be a valid integer, got 'x' (text)"),
        ({"batch_size": 0}, "batch_size: must be greater than or equal to 1, got 0 (a whole number)"),
        ({"learning_rate": True}, "learning_rate: must be a valid number, got True (true/false)"),
        ({"learning_rate": -1e-5}, "learning_rate: must be greater than 0, got -1e-05 (a number)"),
        ({"seed": True}, "seed: must be a valid integer, got True (true/false)"),
        ({"log_completions": "yes"}, "log_completions: must be a valid boolean, got 'yes' (text)"),
        ({"data": {"path": "a", "task": "b"}}, "needs exactly one of 'path', 'task' and 'mixture', got path='a' and task='b'"),
        ({"data": {"train": {"size": 3}}}, "needs exactly one of 'path', 'task' and 'mixture', got none"),
        ({"data": ["a.jsonl", "b.jsonl"]}, "data: got the list ['a.jsonl', 'b.jsonl']; a stream is one file each"),
        ({"data": [{"prompt": {1, 2}}]}, "data: rows must be JSON values: Object of type set is not JSON serializable"),
        ({"data": {"path": "a", "task_config": {"x": 1}}}, "'task_config' has no effect beside 'path'"),
        ({"data": {"path": "a", "split": "test"}}, "'split' has no effect beside 'path'"),
        ({"evaluation": {"samples_per_question": 4}}, "pass@4 needs at least 8"),
        ({"evaluation": {"eval_steps": 5}}, "'eval_steps' is 5 but there is no 'dev' set"),
        ({"sampling": {"truncation_penalty": 1.0}}, "go together"),
        ({"sampling": {"truncated": "penalise"}}, "go together"),
        ({"sampling": {"overlong_buffer": 4}}, "'overlong_buffer' has no effect with truncated='score'"),
        ({"sampling": {"truncated": "penalise", "truncation_penalty": 1.0, "overlong_buffer": 99}}, "more than the 64 tokens"),
        ({"max_prompt_length": 2000}, "leaves no room for an answer"),
        ({"evaluation": {"forgetting": False, "forgetting_questions": 9}}, "'forgetting_questions' has no effect"),
        ({"rewards": {"name": "exact_match", "wieght": 2.0}}, "unknown key 'rewards.wieght'; did you mean 'weight'?"),
        ({"rewards": [5]}, "rewards.0: must be a mapping of keys to values, got 5 (a whole number)"),
        ({"warmup_steps": 4}, "'warmup_steps' (4) is more than 'max_steps' (3)"),
        ({"budget_share": 0.5}, "has a 'budget_share' but the recipe has no 'budget'"),
        ({"max_steps": None}, "never ends"),
        ({"init_from": "best"}, "'save.best_metric' is not set"),
        ({"save": {"best_metric": "accuracy"}}, "'save.best_metric' needs 'evaluation.eval_steps'"),
        ({"stages": []}, "stands beside 'stages'"),
        ({"method": {"a": 1, "b": 2}}, "unknown key 'method.a'"),
    ],
)
def test_a_mistake_names_the_key_what_was_got_and_what_is_allowed(change: dict[str, Any], message: str) -> None:
    assert message in refusal(Recipe, {**FLAT, **change})


def test_a_missing_key_is_named_as_it_would_be_written() -> None:
    assert refusal(Recipe, {k: v for k, v in FLAT.items() if k != "learning_rate"}) == "missing key 'learning_rate'"
    staged = {"data": "a", "stages": [{"method": "sft", "max_steps": 1}]}
    assert refusal(Recipe, staged) == "missing key 'stages.0.learning_rate'"


def test_shares_of_the_budget_must_fit() -> None:
    stage = {"method": "sft", "learning_rate": 1e-5, "budget_share": 0.6}
    assert "add up to 1.2" in refusal(Recipe, {"data": "a", "budget": {"amount": 10}, "stages": [stage, stage]})
    assert "stage 1 (sft) never ends" in refusal(
        Recipe, {"data": "a", "budget": {"amount": 10}, "stages": [stage, {"method": "sft", "learning_rate": 1e-5}]}
    )


@pytest.mark.parametrize("key", sorted({*Recipe.model_fields, *Stage.model_fields} - {"stages"}))
def test_any_key_with_a_letter_doubled_gets_its_right_spelling(key: str) -> None:
    assert f"did you mean '{key}'?" in refusal(Recipe, {**FLAT, key + key[-1]: 1})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2e+3", -2e3),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000_000", 1_000_000),
        ("010", "010"),
        ("1:30", "1:30"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("1e5x", "1e5x"),
        ("'1e-5'", "1e-5"),
    ],
)
def test_yaml_scalars_mean_what_they_look_like(text: str, value: Any) -> None:
    got = parse_yaml(text, "here")
    assert got == value
    assert type(got) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_back_as_written(number: float) -> None:
    assert parse_yaml(f"x: {number!r}", "here") == {"x": number}


def test_bad_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("data: a\nmodel: [1, 2\nseed: 3\n")
    with pytest.raises(UserError, match=r"r\.yaml:3:\d+: not valid YAML"):
        load_recipe(file)
    file.write_text("seed: 1\ndata: a\nseed: 2\n")
    with pytest.raises(UserError, match=r"r\.yaml:3:1: not valid YAML: the key 'seed' is written twice"):
        load_recipe(file)
    file.write_text("- a\n")
    with pytest.raises(UserError, match="expected keys and values at the top level"):
        load_recipe(file)
    file.write_bytes(b"data: \xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(file)
    file.write_text("x: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(file)
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")


def test_overrides_reach_every_depth_and_leave_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"data": "a", "stages": [{"method": "sft", "learning_rate": 1.0, "max_steps": 1}]}))
    recipe = load_recipe(file, ["stages.0.learning_rate=1e-6", "sampling.top_k=5", "data=b", "rewards=[task]"])
    assert recipe.stages[0].learning_rate == 1e-6
    assert recipe.stages[0].max_steps == 1
    assert (recipe.sampling.top_k, recipe.data["train"].path) == (5, "b")
    original = {"a": [{"b": 1}]}
    assert override(original, ["a.0.b=2"]) == {"a": [{"b": 2}]}
    assert original == {"a": [{"b": 1}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed", "expected key=value"),
        ("stages.3.max_steps=1", "'3' is no index of a list of 1"),
        ("data.path=b", "write that part out in full first"),
        ("sed=1", "unknown key 'sed'; did you mean 'seed'?"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_says_why(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"data": "a", "stages": [{"method": "sft", "learning_rate": 1.0, "max_steps": 1}]}))
    with pytest.raises(UserError) as caught:
        load_recipe(file, [text])
    assert message in str(caught.value)


def test_yaml_and_json_forms_load_to_the_same_recipe(tmp_path: Path) -> None:
    recipe = parse(Recipe, {**FLAT, "model": {"lora": {"r": 4}}, "method": {"grpo": {"beta": 0.0}}, "report_to": ["trackio"]})
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    (tmp_path / "r.json").write_text(recipe.model_dump_json())
    for name in ("r.yaml", "r.json"):
        again = load_recipe(tmp_path / name)
        assert again == recipe
        assert config_hash(again) == config_hash(recipe)


def test_the_hash_moves_with_every_setting_and_with_nothing_else() -> None:
    same = {"max_steps": 3, "learning_rate": 0.00001, "method": {"name": "sft"}, "data": {"train": {"path": "rows.jsonl"}}}
    assert config_hash(parse(Recipe, FLAT)) == config_hash(parse(Recipe, same))
    for change in ({"seed": 1}, {"weight_decay": 0.1}, {"method": {"sft": {"average": "sequences"}}}, {"model": "x"}):
        assert config_hash(parse(Recipe, {**FLAT, **change})) != config_hash(parse(Recipe, FLAT))


def test_every_setting_has_a_description() -> None:
    def undescribed(schema: dict[str, Any], at: str) -> list[str]:
        parts = {at: schema, **schema.get("$defs", {})}
        return [
            f"{name}.{key}"
            for name, part in parts.items()
            for key, field in part.get("properties", {}).items()
            if not field.get("description") and "$ref" not in str(field)
        ]

    assert undescribed(Recipe.model_json_schema(), "Recipe") == []
    assert undescribed(StudySpec.model_json_schema(), "StudySpec") == []


def test_a_study_builds_one_recipe_per_arm_and_seed() -> None:
    study = parse(StudySpec, STUDY)
    assert [arm.name for arm in study.arms] == ["sft", "sft -> grpo"]
    recipe = study.recipe("sft -> grpo", 2)
    assert recipe.seed == 2
    assert recipe.budget == study.budget
    assert [s.method.name for s in recipe.stages] == ["sft", "grpo"]
    assert recipe.data["train"].task == "sums"
    assert study.against() == ["base", "sft", "sft -> grpo"]
    with pytest.raises(UserError, match="no arm 'dpo'"):
        study.recipe("dpo", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared": {"data": {"task": "sums"}, "modl": 1}}, "unknown key 'shared.modl'; did you mean 'model'?"),
        ({"shared": {"data": {"task": "sums"}, "seed": 1}}, "unknown key 'shared.seed'"),
        ({"arms": [{"method": "sft", "lerning_rate": 1}]}, "unknown key 'arms.0.lerning_rate'; did you mean 'learning_rate'?"),
        ({"arms": [{"method": "sft"}]}, "missing key 'arms.0.learning_rate'"),
        ({"arms": [STUDY["arms"][0]] * 2}, "arms need different names, got 'sft' more than once"),
        ({"arms": [{"name": "base", **STUDY["arms"][0]}]}, "'base' is the untrained model"),
        ({"seeds": [1, 1]}, "repeated seed"),
        ({"contrasts": {"against": ["dpo"]}}, "names 'dpo', which is no arm; arms: sft, sft -> grpo"),
        ({"quick": {"sheds": [0]}}, "unknown key 'sheds'; did you mean 'seeds'?"),
    ],
)
def test_a_wrong_study_says_where(change: dict[str, Any], message: str) -> None:
    assert message in refusal(StudySpec, {**STUDY, **change})


def test_a_recipe_is_no_study_and_a_study_no_recipe(tmp_path: Path) -> None:
    examples = Path(__file__).parents[1] / "examples"
    with pytest.raises(UserError, match=r"sft_then_grpo\.yaml is a recipe for one run: .* `crosstrain train`"):
        load_study(examples / "sft_then_grpo.yaml")
    with pytest.raises(UserError, match=r"arithmetic\.yaml is a study: it has `arms`; run it with `crosstrain study`"):
        load_recipe(examples / "arithmetic.yaml")


def test_quick_settings_apply_to_arms_as_they_were_written(tmp_path: Path) -> None:
    quick = {"seeds": [7], "budget.amount": 100.0, "arms.0.batch_size": 2, "shared.evaluation.pass_at_k": [1]}
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({**STUDY, "quick": quick}))
    study = load_study(file)
    small = study.quickened()
    assert (small.seeds, small.budget.amount, small.arms[0].stages[0].batch_size) == ([7], 100.0, 2)
    assert small.shared.evaluation.pass_at_k == [1]
    assert small.arms[1] == study.arms[1]
    assert study.arms[0].stages[0].batch_size == 8
