"""Running a recipe: `train` from a clean start or from where it was stopped, `plan` without running, `evaluate_base`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from crosstrain import assemble, checks, run_record
from crosstrain.card import model_card
from crosstrain.config import Recipe, Stage, config_hash, load_recipe, parse
from crosstrain.errors import UserError, nearest
from crosstrain.evaluate import BaseAnswers, measure_dev
from crosstrain.memory import give_back
from crosstrain.models import save_model
from crosstrain.planning import RunPlan, plan
from crosstrain.prediction import plan_stages, predict
from crosstrain.prepare import base_engine, known_base, prepare, with_reference
from crosstrain.reward_models import save_reward_model
from crosstrain.rewards.child import check_not_in_worker
from crosstrain.run_evaluation import asks_nothing, evaluate_base, evaluate_trained
from crosstrain.run_folder import RunResult, folder_of, now, open_folder, result_of
from crosstrain.run_progress import epochs, is_trained, share_done, stage_of
from crosstrain.training import checkpoint
from crosstrain.training.average import Average
from crosstrain.training.checkpoint import Checkpoint, write_json
from crosstrain.training.cost import Cost
from crosstrain.training.display import Display
from crosstrain.training.engine import Engine
from crosstrain.training.gradient import NonFinite
from crosstrain.training.loop import Progress, StageSettings, Step, share_spent, stage_progress, train_stage
from crosstrain.training.record import (
    append_lines,
    completion_lines,
    cut_lines,
    peak_memory_gb,
    reset_peak_memory,
)
from crosstrain.training.reference import Known, kept_reference
from crosstrain.training.switch import Watch, look
from crosstrain.training.tally import Tally
from crosstrain.training.trackers import Log, trackers
from crosstrain.types import Method

__all__ = ["RunPlan", "RunResult", "as_recipe", "evaluate_base", "plan", "train"]


IDLE_STEPS = 100
"""Steps without progress after which a stage is taken for endless: a gated method may have no more use for demonstrations."""


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A recipe from itself, from a mapping with its keys, or from a YAML file."""
    if isinstance(recipe, Recipe):
        return recipe
    return parse(Recipe, recipe) if isinstance(recipe, Mapping) else load_recipe(recipe)


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output_dir: str | Path | None = None,
    *,
    base: BaseAnswers | None = None,
    save_weights: bool = True,
    display: Display | None = None,
) -> RunResult:
    """Run a recipe in a folder and return what it left there.

    A folder with an unfinished run of the same recipe is resumed from its last checkpoint, and ends bit for bit as it would
    have without the interruption (timings aside); a finished one is returned as it is; another recipe there is a UserError.
    base: the untrained model's answers, for divergences (made here when the evaluation needs them and none are given).
    save_weights: leave the trained model as a Hugging Face folder `model/`.
    """
    check_not_in_worker()
    recipe = as_recipe(recipe)
    folder = folder_of(recipe, output_dir)
    record = open_folder(recipe, folder)
    display = display or Display()
    if record.get("status") == "finished":
        display.say(f"{folder}: this run has already finished; nothing was done")
        return result_of(folder, record)
    run = _Run(recipe, folder, record, display, base)
    return run.to_the_end(save_weights)


class _Run:
    """One run from opening its folder to its end; `train` makes it, nothing else does."""

    def __init__(
        self, recipe: Recipe, folder: Path, record: dict[str, Any], display: Display, base: BaseAnswers | None
    ) -> None:
        self.recipe, self.folder, self.record, self.display, self.base = recipe, folder, record, display, base
        reset_peak_memory()
        self.ready = ready = prepare(recipe)
        self.device, self.methods, self.model, self.tokenizer = ready.device, ready.methods, ready.model, ready.tokenizer
        self.loaded, self.precision, self.optimizer = ready.loaded, ready.precision, ready.optimizer
        self.peak_memory_gb = 0.0
        self.known: dict[int, Known] = {}
        self.average: Average | None = None
        self.progress = Progress(cost=ready.data_cost)
        self.watch = Watch()
        self.best: dict[str, Any] = {}
        self.started = False

    def to_the_end(self, save_weights: bool) -> RunResult:
        with assemble.reward_scorer(self.recipe, self.tokenizer) as rewards:
            engine = base_engine(self.recipe, self.ready, rewards)
            self._note_start(engine)
            self._predict(engine)
            self.known = known_base(self.recipe, self.ready, engine)
            self._resume()
            self._forget_peak()  # of loading: what is measured is training
            self.display.start(self.folder.name, share_done(self.recipe, self.progress, started=self.started))
            try:
                with self._trackers() as log:
                    while not self._trained():
                        self._stage(engine, log)
            finally:
                self.display.finish()
        self.progress.tally = self.progress.tally.held(peak_memory_gb(self.device))
        if self.best:
            self.optimizer.set_weights(checkpoint.load_weights(self.folder / "best"))
        self.optimizer.end()
        give_back()
        if save_weights:  # before the evaluation, whose failure must not lose it
            self._save_model(self.folder / "model")
        evaluation = self._evaluate()
        if save_weights:
            card = model_card(self.recipe, self.record, self.progress.cost, evaluation, saves=self.methods[-1].saves)
            (self.folder / "model" / "README.md").write_text(card, encoding="utf-8")
        return self._finish(evaluation)

    def _trackers(self) -> AbstractContextManager[Log]:
        config = {**self.recipe.model_dump(mode="json"), "recipe_hash": config_hash(self.recipe)}
        return trackers(self.recipe.report_to, project="crosstrain", run=self.folder.name, config=config)

    @property
    def _at(self) -> int:
        return stage_of(self.recipe, self.progress)

    def _trained(self) -> bool:
        return is_trained(self.recipe, self.progress, started=self.started)

    def _stage(self, engine: Engine, log: Log) -> None:
        """One stage, from its start or from where it was stopped."""
        stage, method = self.recipe.stages[self._at], self.methods[self._at]
        if not self.started:
            self._begin(stage, method)
        settings = assemble.stage_settings(self.recipe, stage, self.progress.stage_cost)
        engine = self._with_reference(engine, stage, method)
        why, share = "", stage_progress(settings, self.progress)
        for step in train_stage(engine, method, settings, self.optimizer, self.progress):
            line = self._line(step, method)
            self._keep_best(line)
            self._write(step, line, method, log)
            if method.plan.scored:
                self._look_at_rewards(line)
            if why := self._switch(stage, line, method) or self._idle(stage, settings, method, share):
                break
            share = stage_progress(settings, self.progress)
            if self.progress.step % self.recipe.save.save_steps == 0:
                self._save()
        self._end(method, why or ("budget" if share_spent(settings, self.progress) >= 1.0 else "max_steps"))

    def _line(self, step: Step, method: Method) -> dict[str, Any]:
        """A step's line of metrics, with those on the development questions where it is time for them."""
        line = {"step": self.progress.step, "stage": self.progress.stage, "method": method.name, **step.metrics}
        return line | epochs(self.loaded, method, self.progress) | self._measure_dev()

    def _write(self, step: Step, line: Mapping[str, Any], method: Method, log: Log) -> None:
        """A step's line, and its completions, to the run's folder, the trackers and the display."""
        measured = any(name.startswith("eval_") for name in line)
        if self.progress.step % self.recipe.logging_steps == 0 or measured:
            append_lines(self.folder / "metrics.jsonl", [line])
            log(line)
            if self.recipe.log_completions and method.plan.samples:
                found = completion_lines(self.progress.step, step.groups, self.tokenizer.decode)
                append_lines(self.folder / "completions.jsonl", found)
        self.display.step(share_done(self.recipe, self.progress, started=self.started), line)

    def _look_at_rewards(self, line: Mapping[str, Any]) -> None:
        """Warn where a stage's first step, or all completions of any step, can teach nothing."""
        where = f"step {self.progress.step}"
        if self.progress.stage_step == 1 and line.get("frac_reward_zero_std") == 1.0:
            self._warn(f"{where}: all rewards are equal within every group; nothing can be learned from them")
        if math.isnan(line.get("reward", 0.0)):
            self._warn(f"{where}: no completion got a score, so the step taught nothing", once="got a score")

    def _switch(self, stage: Stage, line: Mapping[str, Any], method: Method) -> str:
        """Why the stage's own rule ends it after this step; nothing where it has none, or goes on."""
        until = stage.until
        if until is None:
            return ""
        value = line.get(until.metric)
        if value is None and until.metric in method.probes:  # which not every step measures
            return ""
        if value is None:
            looked = any(name.startswith("eval_") for name in line)
            # a step may train on nothing, and one of a method that samples may sample nothing
            partly = "loss" not in line or (method.plan.samples and "reward" not in line)
            if looked if until.metric.startswith("eval_") else not partly:
                raise UserError(f"until.metric: {until.metric!r} is not measured; {nearest(until.metric, line)}")
            return ""
        rule = {"rule": until.rule, "mode": until.mode}
        self.watch = look(self.watch, value, **rule, min_delta=until.min_delta, reached=until.value)
        return f"{until.rule} of {until.metric}" if self.watch.looks >= until.patience else ""

    def _idle(self, stage: Stage, settings: StageSettings, method: Method, before: float) -> str:
        """Why the stage is taken for endless: too many steps in a row left it where it was `before`. Else nothing."""
        self.progress.idle = 0 if stage_progress(settings, self.progress) > before else self.progress.idle + 1
        if self.progress.idle < IDLE_STEPS or settings.max_steps is not None or stage.until is not None:
            return ""
        why = f"{IDLE_STEPS} steps that spent nothing of its budget"
        self._warn(f"step {self.progress.step}: {method.name} ends after {why} in a row; count it in another unit")
        return why

    def _end(self, method: Method, why: str) -> None:
        self.record["stages"].append({"method": method.name, "steps": self.progress.stage_step, "ended_by": why})
        self.progress.stage += 1
        self.started = False
        self.average = None
        self._save()

    def _begin(self, stage: Stage, method: Method) -> None:
        """A stage's boundary: which weights, moments and schedule it starts with, and what it remembers."""
        first = self.progress.stage == 0
        if stage.init_from == "base" and not first:
            self.optimizer.set_weights(assemble.base_weights(self.recipe, self.device, self.optimizer.masters))
        if stage.init_from == "best":
            if not self.best:
                raise UserError(f"stage {self.progress.stage}: init_from 'best', but no best checkpoint was kept before it")
            self.optimizer.set_weights(checkpoint.load_weights(self.folder / "best"))
        self.optimizer.begin(**assemble.adamw_settings(stage), restart=stage.restart_optimizer or first)
        if stage.restart_schedule:
            self.progress.optimizer_steps = 0
        self.progress.stage_step = self.progress.idle = 0
        self.progress.stage_cost = Cost() if first else self.progress.cost  # the first is charged for what data cost
        self.progress.state = method.init()
        self.average = None if method.average is None else Average(self.model, self.optimizer.weights())
        self.watch = Watch()
        self.started = True
        if kept_reference(method, first=first) == "stage_start":
            checkpoint.save_weights(self.folder / "reference", self.optimizer.weights())

    def _with_reference(self, engine: Engine, stage: Stage, method: Method) -> Engine:
        """The engine with what the stage compares with: a reference, and an average of past weights."""
        known, first = self.known.get(self._at), self.progress.stage == 0
        engine = with_reference(engine, stage, method, first=first, known=known, at_start=self._stage_start_reference)
        if self.average is None or method.average is None:
            return engine
        average, rate = self.average, method.average
        return replace(engine, average=average.opened, after_update=lambda: average.follow(self.optimizer.weights(), rate))

    def _stage_start_reference(self) -> Any:
        current = {n: m.clone() for n, m in self.optimizer.weights().items()}
        self.optimizer.set_weights(checkpoint.load_weights(self.folder / "reference"))
        reference = assemble.make_reference(self.model, False)
        self.optimizer.set_weights(current)
        return reference

    # --- measuring --------------------------------------------------------------------------------------------------

    def _measure_dev(self) -> dict[str, float]:
        """Metrics on the development questions, every `eval_steps` steps."""
        spec = self.recipe.evaluation
        if not spec.eval_steps or self.progress.step % spec.eval_steps:
            return {}
        self.model.eval()
        return measure_dev(self.model, self.tokenizer, spec, sampling=self.recipe.sampling, seed=self.recipe.seed)

    def _keep_best(self, line: Mapping[str, Any]) -> None:
        save = self.recipe.save
        value = line.get(save.best_metric) if save.best_metric else None
        if value is None or math.isnan(value):
            names = ", ".join(k for k in line if k.startswith("eval_"))
            if save.best_metric and value is None and names:
                raise UserError(f"save.best_metric: got {save.best_metric!r}; measured are {names}")
            return
        if not self.best or ((value > self.best["value"]) == (save.best_mode == "max") and value != self.best["value"]):
            self.best = {"value": value, "step": self.progress.step, "metric": save.best_metric}
            checkpoint.save_weights(self.folder / "best", self.optimizer.weights())

    def _evaluate(self) -> dict[str, Any] | None:
        if asks_nothing(self.recipe):
            return None
        if self.methods[-1].saves == "reward model":
            self._warn("evaluation: the run ends in a reward model, which answers nothing; nothing was measured")
            return None
        return evaluate_trained(self.recipe, self.model, self.tokenizer, self.folder, base=self.base, display=self.display)

    # --- saving -----------------------------------------------------------------------------------------------------

    def _save_model(self, folder: Path) -> None:
        if self.methods[-1].saves == "reward model":
            assert self.ready.value_head is not None
            save_reward_model(self.model, self.ready.value_head, self.tokenizer, folder)
        else:  # a critic's head stays behind: it is no part of the language model
            save_model(self.model, self.tokenizer, folder)

    def _save(self) -> None:
        self.progress.tally = self.progress.tally.held(peak_memory_gb(self.device))
        state = {
            "progress": {**asdict(self.progress), "state": dict(self.progress.state)},
            "watch": asdict(self.watch),
            "best": self.best,
            "started": self.started,
            "stages": self.record["stages"],
            "recipe_hash": config_hash(self.recipe),
        }
        where = self.folder / "checkpoints"
        moments = {} if self._trained() else self.optimizer.moments()  # an evaluation takes none
        average = {} if self.average is None else self.average.weights
        found = Checkpoint(self.optimizer.weights(), moments, state, average)
        limit = self.recipe.save.save_total_limit
        checkpoint.save(where, self.progress.step, found, stage=self.progress.stage, keep=limit)

    def _resume(self) -> None:
        place = checkpoint.latest(self.folder / "checkpoints")
        step = 0
        if place is not None:
            found = checkpoint.load(place)
            saved = dict(found.state["progress"])
            saved_tally = saved.pop("tally", {})  # not in checkpoints of earlier versions
            costs = {name: Cost(**saved.pop(name)) for name in ("cost", "stage_cost")}
            self.progress = Progress(**saved, **costs, tally=Tally(**saved_tally))
            self.watch = Watch(**found.state["watch"])
            self.best, self.started = dict(found.state["best"]), found.state["started"]
            self.record["stages"] = list(found.state["stages"])
            if self.started:
                self.optimizer.begin(**assemble.adamw_settings(self.recipe.stages[self._at]))
            self.optimizer.load(found.weights, found.moments)
            if found.average:
                self.average = Average(self.model, found.average)
            step = self.progress.step
            self.display.say(f"{self.folder.name}: resuming after step {step}")
        for name in ("metrics.jsonl", "completions.jsonl"):
            cut_lines(self.folder / name, step)

    def _note_start(self, engine: Engine) -> None:
        setup = run_record.setup(self.recipe, self.ready, engine)
        run_record.check_unchanged(self.folder, self.record, setup)
        self.record |= setup
        self.record.setdefault("started_at", now())
        self.record.setdefault("warnings", [])
        for text in checks.warnings(self.recipe, self.methods, self.loaded):
            self._warn(text)
        if reason := getattr(engine.sampler, "path_reason", ""):
            self._warn(f"sampling runs whole sequences again for every token, which is slow: {reason}")
        write_json(self.folder / "record.json", self.record)

    def _warn(self, text: str, *, once: str | None = None) -> None:
        """Note and show a warning, unless it, or one that contains `once`, was given before."""
        if not any((once or text) in given for given in self.record["warnings"]):
            self.record["warnings"].append(text)
            self.display.say(f"warning: {text}")

    def _predict(self, engine: Engine) -> None:
        """Note what the run will take, once, with the weights that it starts with; none where that cannot be measured.

        A later stage may well fail on those weights, and train on the ones it gets.
        """
        if "predicted" in self.record:
            return
        self._forget_peak()
        self.record["predicted"] = None
        try:
            self.record["predicted"] = asdict(predict(plan_stages(self.recipe, self.ready, engine), self.ready.data_cost))
        except (UserError, NonFinite, FloatingPointError) as error:
            self._warn(f"what the run will take could not be measured: {error}")
        write_json(self.folder / "record.json", self.record)

    def _forget_peak(self) -> None:
        """The peak of memory starts anew, and the run's own does not forget it."""
        self.peak_memory_gb = max(self.peak_memory_gb, peak_memory_gb(self.device))
        reset_peak_memory(self.device)

    def _finish(self, evaluation: dict[str, Any] | None) -> RunResult:
        self._forget_peak()
        self.record |= {
            "status": "finished",
            "finished_at": now(),
            "cost": asdict(self.progress.cost),
            "steps": self.progress.step,
            "skipped_steps": self.progress.skipped,
            "best": self.best,
            "peak_memory_gb": self.peak_memory_gb,
            **run_record.measured(self.recipe, self.ready, self.progress),
        }
        write_json(self.folder / "record.json", self.record)
        for name in ("checkpoints", "best", "reference"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        return result_of(self.folder, self.record)
