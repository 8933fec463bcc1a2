"""A study runs every arm and seed once, in a useful order, survives kills and failures, and refuses what is unfair."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import study_fakes
from hypothesis import given
from hypothesis import strategies as st
from study_fakes import STUDY, Fakes, quiet, small_study

from crosstrain.config import Recipe, StudySpec, config_hash, load_study
from crosstrain.config.differences import differences
from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.own_code import code_of
from crosstrain.run_folder import open_folder
from crosstrain.studies.attempt import attempt
from crosstrain.studies.budget import check_can_be_equal
from crosstrain.studies.estimate import expected_seconds
from crosstrain.studies.layout import only_one_process, slugs, study_runs
from crosstrain.studies.progress import Clock
from crosstrain.studies.runner import checked, plan, run_study
from crosstrain.training.gradient import NonFinite


def run(out: Path, fakes: Fakes, spec: StudySpec | None = None, **options: Any) -> str:
    """Run a study with fakes; what it printed."""
    console, printed = quiet()
    run_study(spec or small_study(), out, console=console, actions=fakes.actions(), **options)
    return printed.getvalue()


def study_json(out: Path) -> dict[str, Any]:
    return json.loads((out / "study.json").read_text())


# --- what a study does ----------------------------------------------------------------------------------------------


def test_base_first_then_one_seed_of_every_arm_at_a_time(tmp_path: Path) -> None:
    fakes = Fakes()
    run(tmp_path, fakes)
    assert fakes.bases == [tmp_path / "runs" / "base"]
    assert fakes.names() == ["sft/seed-0", "sft-to-grpo/seed-0", "sft/seed-1", "sft-to-grpo/seed-1"]
    assert all(options["base"] == "the base's answers" for _, _, options in fakes.trained)
    recipes = {folder: recipe for folder, recipe, _ in fakes.trained}
    assert recipes[tmp_path / "runs/sft-to-grpo/seed-1"] == small_study().recipe("sft -> grpo", 1)


def test_weights_are_kept_of_the_first_seed_only(tmp_path: Path) -> None:
    fakes = Fakes()
    run(tmp_path, fakes, small_study(seeds=[3, 0]))
    assert [(recipe.seed, options["save_weights"]) for _, recipe, options in fakes.trained] == [
        (3, True),
        (3, True),
        (0, False),
        (0, False),
    ]
    assert [entry["save_weights"] for entry in study_json(tmp_path)["runs"]] == [True, True, False, False]


def test_the_report_is_made_after_each_seed_and_at_the_end(tmp_path: Path) -> None:
    fakes = Fakes()
    console, _ = quiet()
    path = run_study(small_study(), tmp_path, console=console, actions=fakes.actions())
    assert path == tmp_path / "report.html"
    assert len(fakes.reports) == 2


def test_a_report_that_cannot_be_made_half_way_does_not_stop_the_training(tmp_path: Path) -> None:
    fakes = Fakes()
    real, times = fakes.write_report, []

    def breaks_once(folder: Path) -> Path:
        times.append(folder)
        if len(times) == 1:
            raise ZeroDivisionError("one seed")
        return real(folder)

    fakes.write_report = breaks_once  # type: ignore[method-assign]
    printed = run(tmp_path, fakes)
    assert "no report so far: ZeroDivisionError: one seed" in printed
    assert len(fakes.names()) == 4


def test_what_is_printed_before_and_along_the_way(tmp_path: Path) -> None:
    printed = run(tmp_path, Fakes())
    assert "runs: 2 arms x 2 seeds = 4, and the untrained model" in printed
    assert "predicted: about 8 min of training, peak memory 3.1 GB" in printed
    assert printed.index("predicted: ") < printed.index("run 1 of 4 (sft, seed 0)")
    assert "run 2 of 4 (sft -> grpo, seed 0), under a minute left in all:" in printed
    assert "run 3 of 4 (sft, seed 1) done in 0 s; under a minute left in all" in printed
    assert "run 4 of 4 (sft -> grpo, seed 1) done in 0 s; all runs done" in printed


def test_study_json_says_what_was_compared(tmp_path: Path) -> None:
    run(tmp_path, Fakes())
    found = study_json(tmp_path)
    assert (found["status"], found["quick"], found["tune"], found["resumed"]) == ("finished", False, False, 0)
    assert found["spec"] == {**small_study().model_dump(mode="json"), "quick": {}}
    assert found["learning_rates"] == {"from": "study file", "arms": {"sft": [1e-5], "sft -> grpo": [1e-5, 2e-5]}}
    assert [(e["arm"], e["seed"], e["folder"]) for e in found["runs"]][1] == ("sft -> grpo", 0, "runs/sft-to-grpo/seed-0")
    assert "torch" in found["versions"] and found["hardware"]["cores"] >= 1
    assert found["started_at"] <= found["finished_at"]


def test_quick_applies_the_files_quick_settings_and_says_so(tmp_path: Path) -> None:
    fakes = Fakes()
    printed = run(tmp_path, fakes, quick=True)
    assert {(recipe.seed, recipe.budget.amount) for _, recipe, _ in fakes.trained if recipe.budget} == {(5, 20.0)}
    assert study_json(tmp_path)["quick"] is True
    assert "a taste, not a result" in printed
    with pytest.raises(UserError, match="has no `quick:` settings"):
        run(tmp_path / "other", fakes, small_study(quick={}), quick=True)


def test_other_quick_settings_leave_a_study_what_it_is(tmp_path: Path) -> None:
    fakes = Fakes()
    run(tmp_path, fakes)
    trained = len(fakes.trained)
    run(tmp_path, fakes, small_study(quick={"seeds": [6]}))
    assert len(fakes.trained) == trained


def test_without_base_its_answers_are_still_there_for_divergences_but_not_as_an_arm(tmp_path: Path) -> None:
    fakes = Fakes()
    run(tmp_path / "kl", fakes, small_study(base=False))
    assert fakes.bases == [tmp_path / "kl" / "base"]
    shared = {**STUDY["shared"], "evaluation": {**STUDY["shared"]["evaluation"], "divergence": False}}
    run(tmp_path / "none", fakes, small_study(base=False, shared=shared))
    assert len(fakes.bases) == 1


# --- interruptions --------------------------------------------------------------------------------------------------


def test_a_finished_study_only_makes_its_report_again(tmp_path: Path) -> None:
    run(tmp_path, Fakes())
    before = study_json(tmp_path)
    again = Fakes()
    run(tmp_path, again)
    assert again.trained == [] and again.bases == [] and again.reports == [tmp_path]
    assert study_json(tmp_path) == before


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path) -> None:
    def interrupt(recipe: Recipe, step: int) -> None:
        if recipe.seed == 1 and step == 2:
            raise KeyboardInterrupt

    console, printed = quiet()
    with pytest.raises(KeyboardInterrupt):
        run_study(small_study(), tmp_path, console=console, actions=Fakes(before_step=interrupt).actions())
    assert "the same command goes on from there" in printed.getvalue()
    steps: list[int] = []
    again = Fakes(before_step=lambda recipe, step: steps.append(step))
    said = run(tmp_path, again)
    assert again.names() == ["sft/seed-1", "sft-to-grpo/seed-1"]
    assert steps[0] == 2, "the interrupted run resumes where it was"
    assert "2 of 4 runs are finished" in said
    assert said.index("measuring a step of each arm") < said.index("runs are finished"), "a minute of silence looks like a hang"
    assert study_json(tmp_path)["resumed"] == 1


def test_killed_at_any_moment_a_study_goes_on_without_running_anything_twice(tmp_path: Path) -> None:
    out, calls = tmp_path / "study", tmp_path / "calls.txt"
    command = [sys.executable, study_fakes.__file__, str(out), str(calls), "0.02"]
    killed = 0
    for wanted in (3, 9):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while process.poll() is None and (not calls.is_file() or len(calls.read_text().splitlines()) < wanted):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert killed == 2, "the study ended before it could be killed"
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    counted = Counter(calls.read_text().splitlines())
    assert len(counted) == 4 * 4
    assert sum(counted.values()) <= 4 * 4 + killed, "at most the step that was cut off is run again"
    assert study_json(out)["resumed"] == 2
    assert study_json(out)["status"] == "finished"


# --- failures -------------------------------------------------------------------------------------------------------


def explode_in_grpo(error: Exception) -> Any:
    def before_step(recipe: Recipe, step: int) -> None:
        if recipe.stages[-1].method.name == "grpo" and recipe.seed == 0 and step == 1:
            raise error

    return before_step


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NonFinite("loss/nll is nan; examples: train:3"), "NonFinite: loss/nll is nan; examples: train:3"),
        (UserError("reward check.py:score failed on rows.jsonl:7"), "reward check.py:score failed on rows.jsonl:7"),
    ],
)
def test_a_failing_run_is_recorded_and_the_others_go_on(tmp_path: Path, error: Exception, message: str) -> None:
    fakes = Fakes(before_step=explode_in_grpo(error))
    printed = run(tmp_path, fakes)
    record = json.loads((tmp_path / "runs/sft-to-grpo/seed-0/record.json").read_text())
    assert record["status"] == "failed"
    assert record["error"]["message"] == message and record["error"]["type"] == type(error).__name__
    assert "before_step" in record["error"]["traceback"]
    assert len(fakes.names()) == 4
    assert f"run 2 of 4 (sft -> grpo, seed 0) failed: {message}; the others go on" in printed
    assert study_json(tmp_path)["status"] == "finished"
    assert [(one["arm"], one["seed"]) for one in study_json(tmp_path)["budget"]["runs"]] == [
        ("sft", 0),
        ("sft", 1),
        ("sft -> grpo", 1),
    ]


def test_a_failed_run_is_tried_again_by_the_same_command(tmp_path: Path) -> None:
    run(tmp_path, Fakes(before_step=explode_in_grpo(NonFinite("nan"))))
    again = Fakes()
    run(tmp_path, again)
    assert again.names() == ["sft-to-grpo/seed-0"]
    record = json.loads((tmp_path / "runs/sft-to-grpo/seed-0/record.json").read_text())
    assert record["status"] == "finished" and "error" not in record


def test_a_wrong_setting_stops_the_study_before_anything_is_lost(tmp_path: Path) -> None:
    def wrong(recipe: Recipe, step: int) -> None:
        raise UserError("method grpo: unknown setting 'beat'")

    with pytest.raises(UserError, match="beat"):
        run(tmp_path, Fakes(before_step=wrong))


def test_a_mistake_in_the_very_first_run_stops_the_study_for_it_would_come_back_in_every_run(tmp_path: Path) -> None:
    def wrong(recipe: Recipe, step: int) -> None:
        if step == 3:
            raise UserError("task sums: its reward gave None for dev:0")

    fakes = Fakes(before_step=wrong)
    with pytest.raises(UserError, match="its reward gave None"):
        run(tmp_path, fakes)
    assert fakes.names() == ["sft/seed-0"]


def test_when_nothing_works_the_study_ends_after_the_first_seed(tmp_path: Path) -> None:
    def broken(recipe: Recipe, step: int) -> None:
        raise ZeroDivisionError("boom")

    fakes = Fakes(before_step=broken)
    with pytest.raises(RuntimeError, match="every run of seed 0 failed; the first: ZeroDivisionError: boom"):
        run(tmp_path, fakes)
    assert len(fakes.names()) == 2


# --- folders --------------------------------------------------------------------------------------------------------


def test_another_study_in_the_folder_is_refused_with_what_differs(tmp_path: Path) -> None:
    run(tmp_path, Fakes())
    other = small_study(budget={"unit": "flops", "amount": 200.0}, seeds=[0, 1, 2])
    with pytest.raises(
        UserError, match=r"budget.amount is 100.0 there and 200.0 here, seeds is \[0, 1\] there and \[0, 1, 2\]"
    ):
        run(tmp_path, Fakes(), other)
    with pytest.raises(UserError, match="was started without --quick and this one is with it"):
        run(tmp_path, Fakes(), quick=True)
    with pytest.raises(UserError, match="was started without --tune"):
        run(tmp_path, Fakes(), tune=True)


def with_rate(rate: float, **changes: Any) -> StudySpec:
    """The small study with another rate in the last stage of its second arm."""
    sft, then = STUDY["arms"]
    return small_study(arms=[sft, {"stages": [then["stages"][0], {**then["stages"][1], "learning_rate": rate}]}], **changes)


def test_a_study_in_which_nothing_began_may_be_corrected(tmp_path: Path) -> None:
    fakes = Fakes()

    def refuses(recipe: Recipe) -> Any:
        raise UserError("method grpo: unknown setting 'beat'")

    fakes.plan = refuses  # type: ignore[method-assign]
    with pytest.raises(UserError, match="beat"):
        run(tmp_path, fakes)
    other = small_study(budget={"unit": "flops", "amount": 200.0}, quick={"seeds": [5]})
    printed = run(tmp_path, Fakes(), other, quick=True)
    assert study_json(tmp_path)["spec"]["budget"]["amount"] == 200.0 and "note: " not in printed
    assert [entry["folder"] for entry in study_json(tmp_path)["runs"]] == ["runs/sft/seed-5", "runs/sft-to-grpo/seed-5"]


def test_runs_that_did_not_begin_take_a_corrected_recipe_and_the_others_are_kept(tmp_path: Path) -> None:
    def wrong(recipe: Recipe, step: int) -> None:
        if recipe.stages[-1].method.name == "grpo":
            raise UserError("method grpo: the reward cannot be called")

    with pytest.raises(UserError, match="cannot be called"):
        run(tmp_path, Fakes(before_step=wrong))
    again = Fakes()
    printed = run(tmp_path, again, with_rate(3e-5))
    assert again.names() == ["sft-to-grpo/seed-0", "sft/seed-1", "sft-to-grpo/seed-1"] and again.bases == [
        tmp_path / "runs" / "base"
    ]
    assert {r.stages[-1].learning_rate for _, r, _ in again.trained} == {1e-5, 3e-5}
    assert "note: arms.1.stages.1.learning_rate is 2e-05 there and 3e-05 here; what has begun is as it was" in printed
    found = study_json(tmp_path)
    assert found["spec"]["arms"][1]["stages"][1]["learning_rate"] == 3e-5 and found["runs"][0]["seconds"] is not None
    again = Fakes()
    run(tmp_path, again, with_rate(3e-5))
    assert again.trained == []


def test_runs_that_began_with_another_recipe_are_named_and_can_be_begun_anew(tmp_path: Path) -> None:
    run(tmp_path, Fakes(before_step=explode_in_grpo(NonFinite("nan"))), small_study(seeds=[0]))
    folder = tmp_path / "runs/sft-to-grpo/seed-0"
    with pytest.raises(
        UserError,
        match=rf"learning_rate is 2e-05 there and 1e-06 here; begun with what it says there: sft -> grpo, seed 0\. Set it "
        rf"back to go on with that study, remove {folder} to begin that anew as it says here",
    ):
        run(tmp_path, Fakes(), with_rate(1e-6, seeds=[0]))
    shutil.rmtree(folder)
    again = Fakes()
    run(tmp_path, again, with_rate(1e-6, seeds=[0]))
    assert again.names() == ["sft-to-grpo/seed-0"]


def only_base(out: Path) -> None:
    """A study that was stopped once the untrained model was evaluated."""

    def stops(recipe: Recipe, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, Fakes(before_step=stops))


def test_what_the_untrained_model_was_asked_is_no_matter_of_one_run(tmp_path: Path) -> None:
    only_base(tmp_path)
    changed = {**STUDY["shared"], "evaluation": {**STUDY["shared"]["evaluation"], "samples_per_question": 16}}
    with pytest.raises(UserError, match=r"begun with what it says there: the untrained model\. .* remove .*/runs/base to"):
        run(tmp_path, Fakes(), small_study(shared=changed))
    with pytest.raises(UserError, match=r"use the same flags to go on with it, remove \S+/runs/base or choose another --out"):
        run(tmp_path, Fakes(), quick=True)
    shutil.rmtree(tmp_path / "runs/base")
    run(tmp_path, Fakes(), quick=True)


def never_finished(out: Path) -> None:
    """Make a finished study one that was interrupted just before its end."""
    record = {key: value for key, value in study_json(out).items() if key != "budget"}
    (out / "study.json").write_text(json.dumps({**record, "status": "running"}))


def test_runs_of_an_arm_that_is_no_longer_there_are_not_said_to_begin_anew(tmp_path: Path) -> None:
    run(tmp_path, Fakes(), small_study(seeds=[0, 1, 2, 3, 4, 5]))
    never_finished(tmp_path)
    with pytest.raises(UserError) as caught:
        run(
            tmp_path, Fakes(), small_study(seeds=[0, 1, 2, 3, 4, 5], arms=[*STUDY["arms"][:1]], contrasts={"against": ["base"]})
        )
    said = str(caught.value)
    assert "sft -> grpo, seed 4 and 1 more. Set it back" in said and "seed 5" not in said
    assert "seed-4 and 1 more to go on without what this study does not have, or" in said and "anew as it says" not in said


def test_a_finished_study_keeps_its_comparisons_and_takes_another_title(tmp_path: Path) -> None:
    run(tmp_path, Fakes(), small_study(base=False, contrasts={"against": ["sft"]}))
    for changes, differ in (
        ({"contrasts": {"against": ["sft -> grpo"]}}, 'contrasts.against.0 is "sft" there and "sft -> grpo" here'),
        ({"base": True}, "base is false there and true here"),
    ):
        with pytest.raises(
            UserError, match=rf"a finished study of other comparisons: {differ}; set it back, or choose another"
        ):
            run(tmp_path, Fakes(), small_study(**{"base": False, "contrasts": {"against": ["sft"]}, **changes}))
    again = Fakes()
    printed = run(tmp_path, again, small_study(base=False, contrasts={"against": ["sft"]}, title="Better", tune=None))
    assert again.trained == [] and again.reports == [tmp_path]
    assert (
        'title is "" there and "Better" here' in printed
        and "tune is" in printed
        and "only study.json and the report" in printed
    )
    found = study_json(tmp_path)
    assert (found["title"], found["spec"]["title"], found["spec"]["tune"], found["status"]) == (
        "Better",
        "Better",
        None,
        "finished",
    )
    (correction,) = found["corrections"]
    assert correction["differences"][0] == {"setting": "title", "before": "", "after": "Better"}
    assert len(correction["finished"]) == 4


def test_a_finished_study_that_tries_a_failed_run_again_keeps_its_comparisons(tmp_path: Path) -> None:
    run(tmp_path, Fakes(before_step=explode_in_grpo(NonFinite("nan"))))

    def stops(recipe: Recipe, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fakes(before_step=stops))
    with pytest.raises(UserError, match="a finished study of other comparisons"):
        run(tmp_path, Fakes(), small_study(contrasts={"against": ["sft"]}))


def test_a_searched_study_takes_another_title(tmp_path: Path) -> None:
    run(tmp_path, Fakes(), tune=True)
    again = Fakes()
    run(tmp_path, again, small_study(title="Better"), tune=True)
    assert again.trained == [] and study_json(tmp_path)["title"] == "Better"


@pytest.mark.parametrize("finished", [True, False])
def test_results_are_not_overwritten_by_another_study_when_the_runs_are_elsewhere(tmp_path: Path, finished: bool) -> None:
    run(tmp_path / "out", Fakes())
    shutil.move(tmp_path / "out/runs", tmp_path / "kept")
    if not finished:
        never_finished(tmp_path / "out")
        (tmp_path / "out/results.json").write_text("{}")
    with pytest.raises(UserError, match=r"another study: .*: its report, whose runs are not here\. .*study, or choose another"):
        run(tmp_path / "out", Fakes(), with_rate(1e-6))


def test_the_time_of_a_removed_run_is_forgotten(tmp_path: Path) -> None:
    run(tmp_path, Fakes())
    shutil.rmtree(tmp_path / "runs/sft/seed-1")

    def stops(recipe: Recipe, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fakes(before_step=stops))
    assert [entry["seconds"] is None for entry in study_json(tmp_path)["runs"]] == [False, False, True, False]


def test_a_study_does_not_mix_versions_of_a_reward(tmp_path: Path) -> None:
    reward, out = tmp_path / "reward.py", tmp_path / "out"
    reward.write_text("def score(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    spec = small_study(shared={**STUDY["shared"], "rewards": [f"{reward}:score"]})

    def stops(recipe: Recipe, step: int) -> None:
        if recipe.seed == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, Fakes(before_step=stops), spec)
    record, before = out / "runs/sft-to-grpo/seed-0/record.json", code_of(spec.recipe("sft -> grpo", 0))
    record.write_text(json.dumps({**json.loads(record.read_text()), "code": before}))
    text = reward.read_text()
    reward.write_text(f"{text}\n# better\n")
    fakes = Fakes()
    with pytest.raises(
        UserError,
        match=rf"{reward} is not what it was when these began: sft -> grpo, seed 0; .* Put it back to go on, remove "
        rf"{record.parent} to begin them anew with the new one, or choose another --out",
    ):
        run(out, fakes, spec)
    assert fakes.trained == []
    reward.write_text(text)
    run(out, fakes, spec)
    assert fakes.names() == ["sft/seed-1", "sft-to-grpo/seed-1"]
    reward.write_text(f"{text}\n# better\n")
    run(out, fakes, spec)  # nothing is left to be trained with it


def test_a_finished_study_takes_no_further_runs_and_a_search_no_other_study(tmp_path: Path) -> None:
    """Seeds that are added once the report was read are no fair sample."""
    run(tmp_path / "done", Fakes())
    for other in (small_study(seeds=[0, 1, 2]), small_study(arms=[*STUDY["arms"], {"method": "dft", "learning_rate": 1e-5}])):
        with pytest.raises(UserError, match=r"holds a finished study of other runs: .*choose another --out to start anew"):
            run(tmp_path / "done", Fakes(), other)
    with pytest.raises(UserError, match=r"begun with what it says there: sft, seed 1; sft -> grpo, seed 1\."):
        run(tmp_path / "done", Fakes(), small_study(seeds=[0]))

    def stops(recipe: Recipe, step: int) -> None:
        if recipe.stages[-1].learning_rate == 1e-5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "search", Fakes(before_step=stops), tune=True)
    with pytest.raises(UserError, match=r"begun with what it says there: the search for learning rates\."):
        run(tmp_path / "search", Fakes(), with_rate(1e-6), tune=True)


def test_a_run_without_a_step_is_begun_anew_whatever_recipe_lies_there(tmp_path: Path) -> None:
    first, other = (with_rate(rate).recipe("sft -> grpo", 0) for rate in (1e-5, 1e-6))
    open_folder(first, tmp_path)
    (tmp_path / "record.json").write_text('{"status": "failed", "error": {}}')
    with pytest.raises(UserError, match=r"stages.1.learning_rate is 1e-05 there and 1e-06 here"):
        open_folder(other, tmp_path)
    opens = replace(
        Fakes().actions(), train=lambda recipe, folder, **_: SimpleNamespace(evaluation=open_folder(recipe, folder))
    )
    assert attempt(opens, other, tmp_path, first=True).evaluation == {}
    assert json.loads((tmp_path / "recipe.json").read_text())["hash"] == config_hash(other)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis.txt' but no study; choose another --out"):
        run(tmp_path, Fakes())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_processes_cannot_run_the_same_folder(tmp_path: Path) -> None:
    with only_one_process(tmp_path), pytest.raises(UserError, match="another process is running the study"):
        run(tmp_path, Fakes())
    run(tmp_path, Fakes())


@given(st.lists(st.text(max_size=80), unique=True, max_size=8))
def test_every_arm_gets_a_folder_of_its_own(names: list[str]) -> None:
    found = slugs(names)
    assert list(found) == names
    folders = list(found.values())
    assert len({folder.lower() for folder in folders} | {"base"}) == len(names) + 1
    assert all(folder and set(folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for folder in folders)


json_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, json_values)
def test_two_configurations_differ_in_something_exactly_when_they_are_not_equal(a: Any, b: Any) -> None:
    # A key that is missing reads as None, which no setting of a resolved study is without having that key.
    assert differences(a, a) == []
    if not differences(a, b):
        assert _without_none(a) == _without_none(b)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: v for k, v in ((k, _without_none(v)) for k, v in value.items()) if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def test_seeds_are_the_outer_loop() -> None:
    assert [(one.arm, one.seed) for one in study_runs(small_study(seeds=[4, 2]))] == [
        ("sft", 4),
        ("sft -> grpo", 4),
        ("sft", 2),
        ("sft -> grpo", 2),
    ]


# --- equal budgets --------------------------------------------------------------------------------------------------


def test_spending_and_overshoot_of_every_run_are_recorded(tmp_path: Path) -> None:
    run(tmp_path, Fakes(step_cost=30.0))
    budget = study_json(tmp_path)["budget"]
    assert (budget["unit"], budget["amount"], budget["equal"]) == ("flops", 100.0, True)
    assert {(one["spent"], one["overshoot"], one["largest_step"]) for one in budget["runs"]} == {(120.0, 20.0, 30.0)}


def test_a_run_that_spent_more_than_a_step_beyond_its_budget_is_called_out(tmp_path: Path) -> None:
    fakes = Fakes(step_cost=10.0)
    real = fakes.train

    def spends_too_much(recipe: Recipe, output_dir: Path, **options: Any) -> Any:
        more = (
            recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"amount": 111.0})}) if recipe.budget else None
        )
        return real(more if recipe.stages[-1].method.name == "sft" and more else recipe, output_dir, **options)

    fakes.train = spends_too_much  # type: ignore[method-assign]
    printed = run(tmp_path, fakes)
    budget = study_json(tmp_path)["budget"]
    assert budget["equal"] is False
    assert {(one["arm"], one["equal"]) for one in budget["runs"]} == {("sft", False), ("sft -> grpo", True)}
    assert "sft, seed 0 spent 120 flops of 100: more than one step above the study's budget" in printed


def arm(*stages: dict[str, Any]) -> StudySpec:
    return small_study(arms=[{"stages": [{"method": "sft", "learning_rate": 1e-5, **stage} for stage in stages]}], quick={})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (arm({"max_steps": 3}), r"arms.0 \(sft\): stage 0 ends by 'max_steps' alone.*or remove 'max_steps'"),
        (arm({"budget_share": 0.5}, {"max_steps": 3}), "stage 1 ends by 'max_steps' alone"),
        (arm({"budget_share": 0.5}, {"budget_share": 0.25}), "add up to 0.75; in a study they must add up to 1"),
        (arm({"budget_share": 0.5}), "add up to 0.5"),
    ],
)
def test_arms_that_could_not_spend_the_same_are_refused(spec: StudySpec, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", Fakes(), spec)
    assert not (tmp_path / "out").exists()


def test_arms_that_spend_the_whole_budget_are_accepted() -> None:
    check_can_be_equal(arm({}))
    check_can_be_equal(arm({"budget_share": 1.0, "max_steps": 3}))
    check_can_be_equal(arm(*[{"budget_share": 0.1}] * 10))


def test_a_method_that_never_spends_the_unit_is_refused_before_it_runs_for_ever(tmp_path: Path) -> None:
    fakes = Fakes()
    real = fakes.plan

    def plan_without_flops(recipe: Recipe) -> Any:
        found = real(recipe)
        for stage in found.stages:
            stage.cost = type(stage.cost)(demonstrations=3)
        return found

    fakes.plan = plan_without_flops  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"arm 'sft': stage 0 \(sft\) spends no flops, so it would never use up its budget"):
        run(tmp_path, fakes)
    assert fakes.trained == []


# --- time -----------------------------------------------------------------------------------------------------------


def test_the_plan_of_a_dry_run_is_printable_and_writes_nothing(tmp_path: Path) -> None:
    text = str(plan(small_study(), tune=True, actions=Fakes().actions()))
    assert "learning-rate search: 3 trials per arm with the same budget" in text
    assert "sft -> grpo  about 4 steps of sft, then about 4 steps of grpo; about 2 min" in text
    assert "predicted: about 20 min of training, peak memory 3.1 GB" in text
    assert list(tmp_path.iterdir()) == []


def test_time_left_goes_from_planned_to_measured() -> None:
    planned = {"sft": 60.0, "grpo": 60.0}
    assert expected_seconds("grpo", planned, {"sft": [160.0]}, evaluation=20.0) == pytest.approx(160.0)
    assert expected_seconds("grpo", planned, {"sft": [160.0], "grpo": [30.0, 50.0]}, evaluation=20.0) == pytest.approx(40.0)
    clock = Clock(planned, {"sft": [10.0]}, 0.0, waiting=["sft", "sft"])
    assert clock.left() == pytest.approx(20.0)
    assert clock.left("sft", done=0.5) == pytest.approx(25.0)
    clock.note("sft", 30.0)
    assert clock.left() == pytest.approx(40.0)


# --- the bundled study ----------------------------------------------------------------------------------------------


def test_the_bundled_study_compares_methods_and_nothing_else() -> None:
    spec = load_study(Path(__file__).parents[2] / "examples" / "arithmetic.yaml")
    checked(spec, quick=False, tune=True)
    assert [arm.name for arm in spec.arms] == ["sft", "dft", "grpo", "sft -> grpo", "luffy", "hpt"]
    for arm in spec.arms:
        for stage in arm.stages:
            method = load_method(stage.method.name, **stage.method.settings)
            assert "ref_logp" not in method.needs, "no arm has a KL term"
            assert method.updates.steps == 1
            own, expert = method.settings.get("num_generations", 0), method.plan.needs_expert is not None
            assert not method.plan.samples or own + (expert and stage.method.name == "luffy") == 8
            assert stage == spec.arms[0].stages[0].model_copy(
                update={k: getattr(stage, k) for k in ("method", "batch_size", "learning_rate", "budget_share")}
            )
    questions = spec.shared.evaluation
    assert sum(one.size for one in questions.in_distribution) == 64
    assert set(spec.tune.seeds if spec.tune else ()) & set(spec.seeds) == set()
    quick = checked(spec, quick=True, tune=True)
    assert quick.seeds == [0] and quick.budget.amount <= spec.budget.amount / 10
