"""The whole evaluation of one model: everything a run's evaluation.json says."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from crosstrain.architecture import found_once
from crosstrain.assemble import stop_tokens
from crosstrain.config.evaluation import EvaluationSpec
from crosstrain.config.recipe import SamplingSpec
from crosstrain.errors import UserError
from crosstrain.evaluate import divergence
from crosstrain.evaluate.divergence import BaseAnswers
from crosstrain.evaluate.forgetting import prose_results, question_results
from crosstrain.evaluate.questions import Answers, QuestionSet, ask, load_set, sample_records, set_metrics, set_result
from crosstrain.evaluate.suite import SUITE_VERSION, passages, some_questions
from crosstrain.rollout.sampler import Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.training.score import Layout, choose_layout

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Evaluated:
    """evaluation: what evaluation.json holds. samples: the lines of samples.jsonl. answers: the model's own replies on the
    prompts of the divergences, to compare other models with (no prompts when `divergence` is off)."""

    evaluation: dict[str, Any]
    samples: list[dict[str, Any]]
    answers: BaseAnswers


def evaluate_model(
    model: Any,
    tokenizer: Any,
    spec: EvaluationSpec,
    *,
    sampling: SamplingSpec,
    seed: int,
    base: BaseAnswers | None,
    base_model: Any | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluated:
    """A model's answers to every set of `spec`, what it forgot, how far it is from the base, and a flat summary (`metrics`).

    sampling: its max_completion_length cuts the replies; they are drawn at `spec.temperature` from the full distribution,
    whatever top_p and top_k training used. base: the base's `answers`; None says that this model is the base, whose divergence
    from itself is 0. base_model: the base's weights, which score this model's own replies; not needed for a model with low-rank
    adapters. progress: told the name of each part as it starts. Raises UserError when the base answered other prompts, or when
    its weights are missing.
    """
    if spec.divergence and base is not None:
        divergence.check_base_model(model, base_model)
    clock = _Clock(progress)
    training = model.training
    model.eval()
    try:
        with clock.part("sampling"):
            sampler = TorchSampler(model, stop_token_ids=stop_tokens(model, tokenizer))
            sets = load_sets(spec, tokenizer)
            drawn = Sampling(temperature=spec.temperature, max_completion_length=sampling.max_completion_length)
            answers = ask(sets, sampler, tokenizer, drawn, seed=seed)
        layout = found_once(choose_layout, model)
        forgotten = (
            _forgetting(model, tokenizer, sampler, layout, clock, spec.forgetting_questions) if spec.forgetting else None
        )
        own = _replies(answers if spec.divergence else [], spec.temperature)
        diverged: dict[str, Any] | None = None
        if spec.divergence:
            own, diverged = _divergence(model, own, base, base_model, layout, clock)
    finally:
        model.train(training)
    evaluation: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "sets": {a.questions.name: set_result(a, spec.pass_at_k) for a in answers},
    }
    if forgotten is not None:
        evaluation["forgetting"] = forgotten
    if diverged is not None:
        evaluation["divergence"] = diverged
    evaluation["metrics"] = summary(evaluation, spec.pass_at_k)
    evaluation["seconds"] = clock.seconds
    return Evaluated(evaluation, [line for a in answers for line in sample_records(a)], own)


def measure_dev(model: Any, tokenizer: Any, spec: EvaluationSpec, *, sampling: SamplingSpec, seed: int) -> dict[str, float]:
    """Metrics on the development questions: `eval_accuracy` and the others of `set_metrics`, and of those out of distribution
    `eval_ood_accuracy` and so on."""
    asked = {prefix: one for prefix, one in (("eval_", spec.dev), ("eval_ood_", spec.dev_ood)) if one is not None}
    if not asked:
        raise UserError("evaluation.dev: there are no development questions to measure; add a `dev` set")
    sampler = TorchSampler(model, stop_token_ids=stop_tokens(model, tokenizer))
    held_out = [load_set(one, "dev", tokenizer, spec.dev_samples) for one in asked.values()]
    drawn = Sampling(temperature=spec.temperature, max_completion_length=sampling.max_completion_length)
    answered = ask(held_out, sampler, tokenizer, drawn, seed=seed)
    found = {prefix: set_result(answers, ())["metrics"] for prefix, answers in zip(asked, answered, strict=True)}
    return {prefix + name: value for prefix, metrics in found.items() for name, value in metrics.items()}


def load_sets(spec: EvaluationSpec, tokenizer: Any) -> list[QuestionSet]:
    """The in-distribution sets, then the out-of-distribution ones; `dev` is for looks during training (see `measure_dev`)."""
    n = spec.samples_per_question
    sets = [load_set(s, "in_distribution", tokenizer, n) for s in spec.in_distribution]
    sets += [load_set(s, "out_of_distribution", tokenizer, n) for s in spec.out_of_distribution]
    return sets


def summary(evaluation: Mapping[str, Any], ks: Sequence[int]) -> dict[str, float]:
    """The flat metrics of an evaluation; a part that was not measured has none.

    Questions of several sets of a kind are pooled. forgetting/nll is nats per gold answer, prose/nll nats per token.
    """
    pooled: dict[str, list[dict[str, Any]]] = {}
    for found in evaluation["sets"].values():
        pooled.setdefault(found["kind"], []).extend(found["questions"])
    metrics: dict[str, float] = {}
    if own := pooled.get("in_distribution"):
        metrics |= set_metrics(own, ks)
    if found := pooled.get("out_of_distribution"):
        metrics["ood_accuracy"] = set_metrics(found, ())["accuracy"]
    if forgotten := evaluation.get("forgetting"):
        metrics["forgetting/nll"] = statistics.fmean(q["nll"] for q in forgotten["questions"])
        metrics["forgetting/accuracy"] = statistics.fmean(q["correct"] for q in forgotten["questions"])
        metrics["prose/nll"] = sum(p["nll"] for p in forgotten["prose"]) / sum(p["tokens"] for p in forgotten["prose"])
    for name in ("forward_kl", "reverse_kl", "entropy"):
        if values := evaluation.get("divergence", {}).get(name):
            metrics[name] = statistics.fmean(values)
    return metrics


def _forgetting(
    model: Any, tokenizer: Any, sampler: TorchSampler, layout: Layout, clock: _Clock, n: int | None
) -> dict[str, Any]:
    with clock.part("forgetting"):
        asked = question_results(model, tokenizer, sampler, some_questions(n), layout)
    with clock.part("prose"):
        prose = prose_results(model, tokenizer, passages(), layout)
    return {"suite_version": SUITE_VERSION, "questions": asked, "prose": prose}


def _divergence(
    model: Any, own: BaseAnswers, base: BaseAnswers | None, base_model: Any | None, layout: Layout, clock: _Clock
) -> tuple[BaseAnswers, dict[str, Any]]:
    """The model's own replies with their log-probs, and the divergences from the base.

    All log-probs are computed the same way, own replies' too: the sampler's differ by rounding in bf16, by about 0.02 nats for a
    reply of 10 tokens, and a model would seem to diverge from itself.
    """
    if base is not None:
        divergence.check_same_prompts(base, own)
    found: dict[str, Any] = {"prompts": list(own.ids)}
    if base is None:
        with clock.part("forward_kl"):
            own = divergence.rescored(model, own, layout=layout)
        found["forward_kl"] = found["reverse_kl"] = [0.0] * len(own.ids)
    else:
        with clock.part("forward_kl"):
            own, found["forward_kl"] = divergence.compared(model, own, base, layout=layout)
        with clock.part("reverse_kl"), divergence.base_of(model, base_model) as reference:
            found["reverse_kl"] = divergence.reverse_kl(reference, own, layout=layout)
    found["entropy"] = divergence.entropy(own)
    return own, found


def _replies(answers: Sequence[Answers], temperature: float) -> BaseAnswers:
    """The replies that the divergences are measured on: the first to an equal share of each in-distribution set (of each
    out-of-distribution set when there is none)."""
    kinds = [[a for a in answers if a.questions.kind == kind] for kind in ("in_distribution", "out_of_distribution")]
    used = kinds[0] or kinds[1]
    share = -(-divergence.PROMPTS // max(len(used), 1))
    picked = [
        (e.id, e.prompt_tokens, group[: divergence.SAMPLES])
        for a in used
        for e, group in list(zip(a.questions.examples, a.completions, strict=True))[:share]
    ]
    return BaseAnswers(
        temperature=temperature,
        ids=tuple(i for i, _, _ in picked),
        prompts=tuple(p for _, p, _ in picked),
        completions=tuple(tuple(c.tokens for c in group) for _, _, group in picked),
        logps=tuple(tuple(c.logp for c in group) for _, _, group in picked),
    )


class _Clock:
    """Seconds per part, and a word to whoever watches."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)
