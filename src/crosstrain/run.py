"""Running a recipe: `train` from a clean start or from where it was stopped, `plan` without running, `evaluate_base`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from crosstrain import assemble, checks, run_record
from crosstrain.card import model_card
from crosstrain.config import Recipe, Stage, SwitchSpec, config_hash, load_recipe, parse
from crosstrain.data.mixtures import Mixture
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
from crosstrain.training import checkpoint
from crosstrain.training.average import Average
from crosstrain.training.checkpoint import Checkpoint, write_folder, write_json
from crosstrain.training.cost import Cost
from crosstrain.training.display import Display
from crosstrain.training.engine import Engine
from crosstrain.training.gradient import NonFinite
from crosstrain.training.loop import Progress, share_spent, stage_progress, train_stage
from crosstrain.training.record import (
    append_lines,
    completion_lines,
    cut_lines,
    peak_memory_gb,
    reset_peak_memory,
)
from crosstrain.training.reference import Known, kept_reference
from crosstrain.training.switch import Watch, look, stage_after
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
            self.display.start(self.folder.name, self._done())
            try:
                with self._trackers() as log:
                    while not self._trained():
                        self._stage(engine, log)
            finally:
                self.display.finish()
        self.progress.tally = self.progress.tally.held(peak_memory_gb(self.device))
        if self.best:
            self.optimizer.set_weights(load_file(self.folder / "best" / "weights.safetensors"))
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
        """Which of the recipe's stages it is; `progress.stage` counts on through the rounds of repeated ones."""
        return stage_after(self.progress.stage, [stage.repeat_until_budget for stage in self.recipe.stages])

    def _trained(self) -> bool:
        """Whether no stage is under way and none is left, or what is left are rounds until the budget is spent, and it is."""
        if self.started or self._at == len(self.recipe.stages):
            return not self.started
        budget = self.recipe.budget
        rounds = budget is not None and self.recipe.stages[self._at].repeat_until_budget
        return rounds and budget is not None and getattr(self.progress.cost, budget.unit) >= budget.amount

    def _stage(self, engine: Engine, log: Log) -> None:
        stage, method = self.recipe.stages[self._at], self.methods[self._at]
        if not self.started:
            self._begin(stage, method)
        settings = assemble.stage_settings(self.recipe, stage, self.progress.stage_cost)
        known, first = self.known.get(self._at), self.progress.stage == 0
        engine = with_reference(engine, stage, method, first=first, known=known, at_start=self._stage_start_reference)
        engine = self._with_average(engine, method)
        why = ""
        lines: list[dict[str, Any]] = []
        share = stage_progress(settings, self.progress)
        for step in train_stage(engine, method, settings, self.optimizer, self.progress):
            line = {"step": self.progress.step, "stage": self.progress.stage, "method": method.name, **step.metrics}
            line |= {"epoch": self._epoch(), **self._epochs_of_sources()}
            measured = self._measure_dev()
            line |= measured
            self._keep_best(line)
            if self.progress.step % self.recipe.logging_steps == 0 or measured:
                append_lines(self.folder / "metrics.jsonl", [line])
                log(line)
                if self.recipe.log_completions and method.plan.samples:
                    lines = completion_lines(self.progress.step, step.groups, self.tokenizer.decode)
                    append_lines(self.folder / "completions.jsonl", lines)
            self.display.step(self._done(), line)
            if method.plan.scored:
                self._look_at_rewards(line)
            if stage.until is not None and self._look(stage.until, method, line):
                why = f"{stage.until.rule} of {stage.until.metric}"
                break
            before, share = share, stage_progress(settings, self.progress)
            self.progress.idle = 0 if share > before else self.progress.idle + 1
            if self.progress.idle >= IDLE_STEPS and settings.max_steps is None and stage.until is None:
                why = f"{IDLE_STEPS} steps that spent nothing of its budget"
                self._warn(f"step {self.progress.step}: {method.name} ends after {why} in a row; count it in another unit")
                break
            if self.progress.step % self.recipe.save.save_steps == 0:
                self._save()
        why = why or ("budget" if share_spent(settings, self.progress) >= 1.0 else "max_steps")
        self.record["stages"].append({"method": method.name, "steps": self.progress.stage_step, "ended_by": why})
        self.progress.stage += 1
        self.started = False
        self.average = None
        self._save()

    def _look_at_rewards(self, line: Mapping[str, Any]) -> None:
        """Warn where a stage's first step, or all completions of any step, can teach nothing."""
        where = f"step {self.progress.step}"
        if self.progress.stage_step == 1 and line.get("frac_reward_zero_std") == 1.0:
            self._warn(f"{where}: all rewards are equal within every group; nothing can be learned from them")
        if math.isnan(line.get("reward", 0.0)):
            self._warn(f"{where}: no completion got a score, so the step taught nothing", once="got a score")

    def _begin(self, stage: Stage, method: Method) -> None:
        """A stage's boundary: which weights, moments and schedule it starts with, and what it remembers."""
        first = self.progress.stage == 0
        if stage.init_from == "base" and not first:
            self.optimizer.set_weights(assemble.base_weights(self.recipe, self.device, self.optimizer.masters))
        if stage.init_from == "best":
            if not self.best:
                raise UserError(f"stage {self.progress.stage}: init_from 'best', but no best checkpoint was kept before it")
            self.optimizer.set_weights(load_file(self.folder / "best" / "weights.safetensors"))
        self.optimizer.begin(
            weight_decay=stage.weight_decay,
            betas=(stage.adam_beta1, stage.adam_beta2),
            eps=stage.adam_epsilon,
            restart=stage.restart_optimizer or first,
            value_factor=assemble.value_factor(stage),
        )
        if stage.restart_schedule:
            self.progress.optimizer_steps = 0
        self.progress.stage_step = self.progress.idle = 0
        self.progress.stage_cost = Cost() if first else self.progress.cost  # the first is charged for what data cost
        self.progress.state = method.init()
        self.average = None if method.average is None else Average(self.model, self.optimizer.weights())
        self.watch = Watch()
        self.started = True
        if kept_reference(method, first=first) == "stage_start":
            write_folder(self.folder / "reference", lambda d: save_file(self._weights(), d / "weights.safetensors"))

    def _with_average(self, engine: Engine, method: Method) -> Engine:
        """The engine with the average of past weights that the stage compares with, if it does."""
        if self.average is None or method.average is None:
            return engine
        average, rate = self.average, method.average
        return replace(engine, average=average.opened, after_update=lambda: average.follow(self.optimizer.weights(), rate))

    def _stage_start_reference(self) -> Any:
        current = {n: m.clone() for n, m in self.optimizer.weights().items()}
        self.optimizer.set_weights(load_file(self.folder / "reference" / "weights.safetensors"))
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
            write_folder(self.folder / "best", lambda d: save_file(self._weights(), d / "weights.safetensors"))

    def _look(self, until: SwitchSpec, method: Method, line: Mapping[str, Any]) -> bool:
        value = line.get(until.metric)
        if value is None:
            looked = any(name.startswith("eval_") for name in line)
            # a step may train on nothing, and one of a method that samples may sample nothing
            partly = "loss" not in line or (method.plan.samples and "reward" not in line)
            if looked if until.metric.startswith("eval_") else not partly:
                raise UserError(f"until.metric: {until.metric!r} is not measured; {nearest(until.metric, line)}")
            return False
        rule = {"rule": until.rule, "mode": until.mode}
        self.watch = look(self.watch, value, **rule, min_delta=until.min_delta, reached=until.value)
        return self.watch.looks >= until.patience

    def _evaluate(self) -> dict[str, Any] | None:
        if asks_nothing(self.recipe):
            return None
        if self.methods[-1].saves == "reward model":
            self._warn("evaluation: the run ends in a reward model, which answers nothing; nothing was measured")
            return None
        return evaluate_trained(self.recipe, self.model, self.tokenizer, self.folder, base=self.base, display=self.display)

    def _done(self) -> float:
        """Share of the whole run that is done."""
        n, at, budget = len(self.recipe.stages), self._at, self.recipe.budget
        if self._trained():
            return 1.0
        stage = self.recipe.stages[at]
        if stage.repeat_until_budget and budget is not None:
            rest = sum(one.repeat_until_budget for one in self.recipe.stages) / n
            return 1 - rest + rest * min(getattr(self.progress.cost, budget.unit) / budget.amount, 1.0)
        settings = assemble.stage_settings(self.recipe, stage)
        inside = min(stage_progress(settings, self.progress), 1.0) if self.started else 0.0
        return (at + inside) / n

    def _epoch(self) -> float:
        """Passes over the data that the stage draws from, those of stages before it counted in."""
        names = set(assemble.origins(self.methods[self._at]))
        position = sum(self.progress.positions.get(name, 0) for name in names)
        return position / sum(len(self.loaded.streams[name].examples) for name in names)

    def _epochs_of_sources(self) -> dict[str, float]:
        """Passes over each source of the streams that are mixtures."""
        positions, streams = self.progress.positions, self.loaded.streams
        mixed = {name: stream for name, stream in streams.items() if isinstance(stream, Mixture) and name in positions}
        return {f"epoch/{n}/{source}": x for n, s in mixed.items() for source, x in s.epochs(positions[n]).items()}

    # --- saving -----------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, torch.Tensor]:
        return {n: w.contiguous().cpu() for n, w in self.optimizer.weights().items()}

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
                stage = self.recipe.stages[self._at]
                betas = (stage.adam_beta1, stage.adam_beta2)
                factor = assemble.value_factor(stage)
                self.optimizer.begin(weight_decay=stage.weight_decay, betas=betas, eps=stage.adam_epsilon, value_factor=factor)
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
        short = checks.short_iterations(self.recipe, self.methods, self.loaded)
        for text in (*self.loaded.warnings, *checks.unused_settings(self.recipe, self.methods), *short):
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
