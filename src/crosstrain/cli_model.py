"""What `crosstrain sample` and `crosstrain eval` do with a model or a run."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from crosstrain import assemble
from crosstrain.config import Recipe, load_recipe, parse
from crosstrain.config.files import override
from crosstrain.errors import UserError
from crosstrain.evaluate import evaluate_model
from crosstrain.models import has_bf16_instructions, load_model, resolve_device
from crosstrain.rollout.sampler import Prompt, Sampler, Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.run import evaluate_base
from crosstrain.studies.measures import all_measures
from crosstrain.studies.report_text import interval, number
from crosstrain.studies.statistics import Estimate, arm_mean, compare
from crosstrain.studies.tables import joined_sets
from crosstrain.training.checkpoint import write_json
from crosstrain.training.record import append_lines

Turn = dict[str, str]


def is_run(name: str) -> bool:
    """Whether `name` is the folder of a training run."""
    return (Path(name) / "recipe.json").is_file()


def model_of(name: str) -> str:
    """The model to load for a name: a run's trained model, or the name itself.

    Raises UserError for a run that has not finished.
    """
    if not is_run(name):
        return name
    folder = Path(name) / "model"
    if not folder.is_dir():
        raise UserError(f"{name}: this run has no model/ folder yet; finish it with the command that started it")
    return str(folder)


def _load(name: str, device: torch.device) -> tuple[Any, Any]:
    dtype = torch.bfloat16 if has_bf16_instructions(device) else torch.float32
    model, tokenizer = load_model(model_of(name), dtype=dtype, device=device)
    return model.eval(), tokenizer


@dataclass(frozen=True)
class Chat:
    """A model that answers: `answer` continues a list of chat messages."""

    tokenizer: Any
    sampler: Sampler
    system: str | None
    sampling: Sampling
    greedy: bool
    seed: int

    @classmethod
    def load(cls, name: str, system: str | None, temperature: float, max_completion_length: int, seed: int) -> Chat:
        """A chat with the model called `name`; temperature 0 takes the most likely token each time."""
        model, tokenizer = _load(name, resolve_device("auto"))
        if tokenizer.chat_template is None:
            raise UserError(f"{name}: its tokenizer has no chat template, so it cannot be chatted with")
        sampler = TorchSampler(model, stop_token_ids=assemble.stop_tokens(model, tokenizer))
        sampling = Sampling(temperature=temperature or 1.0, max_completion_length=max_completion_length)
        return cls(tokenizer, sampler, system, sampling, temperature == 0, seed)

    def answer(self, turns: Sequence[Turn]) -> str:
        """The model's next message after `turns`; the same turns and seed give the same answer."""
        messages = ([{"role": "system", "content": self.system}] if self.system else []) + list(turns)
        tokens = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        prompt = Prompt(tuple(tokens), n=1, key="chat", greedy=self.greedy)
        [[completion]] = self.sampler.sample([prompt], self.sampling, seed=self.seed, step=len(turns))
        return str(self.tokenizer.decode(completion.tokens, skip_special_tokens=True))


def talk(
    chat: Chat,
    prompt: str | None,
    *,
    lines: Iterable[str] = sys.stdin,
    interactive: bool | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Answer `prompt` and stop; without one, chat in a terminal, or answer each line that is piped in on its own."""
    if prompt is not None:
        say(chat.answer([{"role": "user", "content": prompt}]))
        return
    if not (sys.stdin.isatty() if interactive is None else interactive):
        for line in lines:
            if line.strip():
                say(chat.answer([{"role": "user", "content": line.rstrip("\n")}]))
        return
    say("An empty line starts a new conversation; Ctrl-D ends.")
    turns: list[Turn] = []
    while (line := _read("> ")) is not None:
        if not line.strip():
            turns = []
            say("(new conversation)")
            continue
        turns.append({"role": "user", "content": line})
        turns.append({"role": "assistant", "content": chat.answer(turns)})
        say(turns[-1]["content"])


def _read(mark: str) -> str | None:
    try:
        return input(mark)
    except EOFError:
        return None


def recipe_for(name: str, config: Path | None, overrides: Sequence[str]) -> Recipe:
    """The recipe whose `evaluation` to follow: the file given, else the run's own."""
    if config is not None:
        return load_recipe(config, overrides)
    if not is_run(name):
        raise UserError(f"{name} is no run, so it brings no evaluation; say what to measure with --config RECIPE.yaml")
    saved = json.loads((Path(name) / "recipe.json").read_text(encoding="utf-8"))["recipe"]
    return parse(Recipe, override(saved, overrides), where=f"{name}/recipe.json")


def evaluate_and_print(name: str, config: Path | None, out: Path | None, overrides: Sequence[str]) -> None:
    """Measure a model as a recipe says, print the numbers, and write them with the samples when `out` is given."""
    recipe = recipe_for(name, config, overrides)
    model_of(name)
    folder = out or Path("runs") / f"eval-{re.sub('[^A-Za-z0-9._]+', '-', name).strip('-.')}"
    base = evaluate_base(recipe, folder / "base") if recipe.evaluation.divergence else None
    model, tokenizer = _load(name, resolve_device(recipe.device))
    found = evaluate_model(
        model,
        tokenizer,
        recipe.evaluation,
        sampling=recipe.sampling,
        seed=0,
        base=base,
        base_model=assemble.load_frozen_base(recipe, resolve_device(recipe.device)) if base is not None else None,
    )
    write_json(folder / "evaluation.json", found.evaluation)
    (folder / "samples.jsonl").unlink(missing_ok=True)
    if found.samples:
        append_lines(folder / "samples.jsonl", found.samples)
    before = json.loads((folder / "base" / "evaluation.json").read_text(encoding="utf-8")) if base is not None else None
    Console().print(measures_table(found.evaluation, before, recipe.evaluation.pass_at_k))
    print(f"evaluation: {folder / 'evaluation.json'}")


def measures_table(evaluation: Mapping[str, Any], base: Mapping[str, Any] | None, ks: Sequence[int]) -> Table:
    """Every measure of an evaluation with its interval over questions, and where there is a base its value and the change."""
    table = Table(
        caption="95% intervals over questions: about this very model, not about how it was trained", caption_justify="left"
    )
    for name in ("measure", "value", "interval", *(("base", "change", "interval of the change") if base is not None else ())):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for measure in all_measures([evaluation], ks):
        scores = measure.read(evaluation)
        assert scores is not None
        kind = {"format": measure.format, "unit": measure.unit, "change": False}
        values, sets = np.array(scores.values, float), joined_sets(scores.sets)
        own = arm_mean(values, None, sets)
        cells = [number(own.mean, kind), interval(*_bounded(own, measure.bounds), kind)]
        before = measure.read(base) if base is not None else None
        if before is not None:
            change = compare(values, np.array(before.values, float), None, sets)
            ends = interval(*_known(change.low, change.high), kind, signed=True)
            cells += [number(float(np.mean(before.values)), kind), number(change.difference, kind, signed=True), ends]
        table.add_row(f"{measure.label}, {measure.unit}" if measure.unit else measure.label, *cells)
    return table


def _bounded(estimate: Estimate, bounds: tuple[float, float] | None) -> tuple[float | None, float | None]:
    low, high = bounds or (-math.inf, math.inf)
    return _known(max(estimate.low, low), min(estimate.high, high))


def _known(low: float, high: float) -> tuple[float | None, float | None]:
    return (None, None) if math.isnan(low) else (low, high)
