"""The learning-rate search: the same for every arm, on development questions only, resumable, and used by the study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_fakes import STUDY, Fakes, quiet, small_study

from crosstrain.config import ArmSpec, Recipe, StudySpec, parse
from crosstrain.errors import UserError
from crosstrain.studies.runner import run_study
from crosstrain.studies.tune import Trial, arms_yaml, best_rate, dev_value, trial_recipe, with_rates
from crosstrain.training.gradient import NonFinite


def tune(out: Path, fakes: Fakes, spec: StudySpec | None = None) -> str:
    """Run a study with --tune and fakes; what it printed."""
    console, printed = quiet()
    run_study(spec or small_study(), out, tune=True, console=console, actions=fakes.actions())
    return printed.getvalue()


def tuning_json(out: Path) -> dict[str, Any]:
    return json.loads((out / "tuning.json").read_text())


def test_every_arm_gets_the_same_trials_and_the_study_runs_with_what_they_chose(tmp_path: Path) -> None:
    fakes = Fakes()
    tune(tmp_path, fakes)
    found = tuning_json(tmp_path)
    asked = {
        arm: [(t["learning_rate"], t["seed"]) for t in found["trials"] if t["arm"] == arm] for arm in ("sft", "sft -> grpo")
    }
    assert asked["sft"] == asked["sft -> grpo"] == [(1e-6, 7), (1e-5, 7), (1e-4, 7)]
    assert [t["value"] for t in found["trials"]][:3] == [0.25, 0.75, 0.5]
    assert found["chosen"]["sft"] == {"learning_rates": [1e-5], "at_edge": False}
    study = json.loads((tmp_path / "study.json").read_text())
    assert study["learning_rates"] == {"from": "tuning.json", "arms": {"sft": [1e-5], "sft -> grpo": [1e-5, 1e-5]}}
    last = fakes.trained[-1][1]
    assert [stage.learning_rate for stage in last.stages] == [1e-5, 1e-5]
    assert len(fakes.names()) == 2 * 3 + 4


def test_trials_see_development_questions_only(tmp_path: Path) -> None:
    fakes = Fakes()
    tune(tmp_path, fakes)
    trials = [recipe for folder, recipe, _ in fakes.trained if "tuning" in folder.parts]
    assert len(trials) == 6
    for recipe in trials:
        assert [one.split for one in recipe.evaluation.in_distribution] == ["dev"]
        assert recipe.evaluation.out_of_distribution == []
        assert not recipe.evaluation.forgetting and not recipe.evaluation.divergence
        assert recipe.evaluation.samples_per_question == 2
        assert recipe.evaluation.dev is None, "it would be sampled twice"
    assert not any(options["save_weights"] for folder, _, options in fakes.trained if "tuning" in folder.parts)


def test_a_trial_differs_from_the_run_in_budget_evaluation_and_rate_only() -> None:
    spec = small_study(tune={"learning_rates": [1e-6], "budget_share": 0.25})
    arm = with_rates(spec.arms[1], (3e-6, 4e-6))
    recipe, run = trial_recipe(spec, arm, seed=5), spec.recipe("sft -> grpo", 5)
    assert recipe.budget is not None and recipe.budget.amount == 25.0
    assert [stage.learning_rate for stage in recipe.stages] == [3e-6, 4e-6]
    back = {"budget": run.budget, "evaluation": run.evaluation, "stages": run.stages}
    assert recipe.model_copy(update=back) == run


def test_a_pipeline_takes_its_earlier_stages_rate_from_the_arm_of_that_method_alone(tmp_path: Path) -> None:
    def score(recipe: Recipe) -> float:
        if recipe.stages[-1].method.name == "sft":
            return {1e-4: 1.0}.get(recipe.stages[-1].learning_rate, 0.0)
        return {1e-6: 1.0}.get(recipe.stages[-1].learning_rate, 0.0)

    pipeline_first = [STUDY["arms"][1], STUDY["arms"][0]]
    fakes = Fakes(score=score)
    printed = tune(tmp_path, fakes, small_study(arms=pipeline_first))
    assert tuning_json(tmp_path)["chosen"]["sft -> grpo"]["learning_rates"] == [1e-4, 1e-6]
    searched = [r for f, r, _ in fakes.trained if "tuning" in f.parts and len(r.stages) == 2]
    assert [[s.learning_rate for s in r.stages] for r in searched] == [[1e-4, 1e-6], [1e-4, 1e-5], [1e-4, 1e-4]]
    assert "sft: the best rate, 0.0001, is at an end of the grid" in printed


def test_without_such_an_arm_earlier_stages_keep_the_files_rate(tmp_path: Path) -> None:
    tune(tmp_path, Fakes(), small_study(arms=[STUDY["arms"][1]]))
    assert tuning_json(tmp_path)["chosen"]["sft -> grpo"]["learning_rates"] == [1e-5, 1e-5]


def test_what_is_printed_can_be_pasted_into_the_study_file(tmp_path: Path) -> None:
    printed = tune(tmp_path, Fakes())
    pasted = yaml.safe_load(printed[printed.index("arms:\n") :].split("\n\n")[0])["arms"]
    chosen = parse(StudySpec, {**STUDY, "arms": pasted})
    assert [[s.learning_rate for s in a.stages] for a in chosen.arms] == [[1e-5], [1e-5, 1e-5]]
    assert [a.name for a in chosen.arms] == ["sft", "sft -> grpo"]


def test_arms_yaml_keeps_every_setting() -> None:
    spec = small_study()
    again = [parse(ArmSpec, one) for one in yaml.safe_load(arms_yaml(spec))["arms"]]
    assert again == list(spec.arms)


def test_an_interrupted_search_does_not_run_finished_trials_again(tmp_path: Path) -> None:
    def interrupt(recipe: Recipe, step: int) -> None:
        if recipe.stages[-1].learning_rate == 1e-4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, Fakes(before_step=interrupt))
    again = Fakes()
    tune(tmp_path, again)
    assert again.names()[:2] == ["lr-0.0001/seed-7", "lr-1e-06/seed-7"]
    assert len(again.names()) == 1 + 3 + 4


def test_a_rate_at_which_a_trial_fails_is_not_chosen(tmp_path: Path) -> None:
    def diverges(recipe: Recipe, step: int) -> None:
        if recipe.stages[-1].learning_rate == 1e-4 and step == 1:
            raise NonFinite("loss is nan")

    tune(tmp_path, Fakes(before_step=diverges, score=lambda recipe: recipe.stages[-1].learning_rate))
    found = tuning_json(tmp_path)
    assert found["chosen"]["sft"]["learning_rates"] == [1e-5]
    failed = [t for t in found["trials"] if t["error"]]
    assert {(t["learning_rate"], t["value"]) for t in failed} == {(1e-4, None)}
    assert failed[0]["error"] == "NonFinite: loss is nan"


def trial(rate: float, seed: int, value: float | None) -> Trial:
    return Trial("sft", rate, seed, "", value, None if value is not None else "NonFinite: nan")


def test_the_mean_over_seeds_decides_and_ties_go_to_the_smaller_rate() -> None:
    assert best_rate([trial(1e-6, 0, 0.9), trial(1e-6, 1, 0.0), trial(1e-5, 0, 0.5), trial(1e-5, 1, 0.5)]) == 1e-5
    assert best_rate([trial(1e-4, 0, 0.5), trial(1e-6, 0, 0.5), trial(1e-5, 0, 0.5)]) == 1e-6
    assert best_rate([trial(1e-4, 0, 0.9), trial(1e-4, 1, None), trial(1e-6, 0, 0.1), trial(1e-6, 1, 0.1)]) == 1e-6
    with pytest.raises(UserError, match=r"arm 'sft': a trial failed at every rate.*NonFinite: nan.*try smaller rates"):
        best_rate([trial(1e-4, 0, None)])


def test_a_metric_that_is_not_measured_is_named(tmp_path: Path) -> None:
    spec = small_study(tune={"learning_rates": [1e-6], "metric": "acuracy"})
    with pytest.raises(UserError, match=r"tune.metric: 'acuracy' is not measured.*did you mean 'accuracy'"):
        tune(tmp_path, Fakes(), spec)
    with pytest.raises(UserError, match=r"tune\.metric"):
        dev_value(None, "accuracy")


def test_tuning_without_a_grid_or_development_questions_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tune needs `tune:`"):
        tune(tmp_path, Fakes(), small_study(tune=None))
    shared = {**STUDY["shared"], "evaluation": {}}
    with pytest.raises(UserError, match=r"--tune needs development questions: add `shared.evaluation.dev`"):
        tune(tmp_path, Fakes(), small_study(shared=shared))
    with pytest.raises(UserError, match="repeated rate"):
        tune(tmp_path, Fakes(), small_study(tune={"learning_rates": [1e-5, 0.00001]}))
