"""Sets of held-out questions: made by tasks, sampled together, scored by the task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crosstrain.config.evaluation import EvalSetSpec
from crosstrain.data.chat import encode
from crosstrain.errors import UserError
from crosstrain.evaluate.pass_at_k import pass_at_k
from crosstrain.rollout.sampler import Completion, Prompt, Sampler, Sampling
from crosstrain.tasks import Task, get_task
from crosstrain.types import Example

Kind = Literal["in_distribution", "out_of_distribution", "dev"]


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one task, the same and in the same order for every model; each is to be answered `n` times."""

    name: str
    kind: Kind
    task: Task
    examples: tuple[Example, ...]
    n: int


@dataclass(frozen=True)
class Answers:
    """A model's answers to a set: per question n completions, their texts, parsed answers (None where there is none) and whether
    each is right (1.0 or 0.0)."""

    questions: QuestionSet
    completions: tuple[tuple[Completion, ...], ...]
    texts: tuple[tuple[str, ...], ...]
    parsed: tuple[tuple[str | None, ...], ...]
    correct: tuple[tuple[float, ...], ...]


def load_set(spec: EvalSetSpec, kind: Kind, tokenizer: Any, n: int) -> QuestionSet:
    """The questions a spec describes, rendered for a model. Ids are `<set>:<row>`."""
    task = get_task(spec.task, **spec.task_config)
    rows = task.rows(spec.split, spec.size, spec.seed)
    examples = tuple(encode(row, tokenizer, id=f"{spec.name}:{i}") for i, row in enumerate(rows))
    return QuestionSet(spec.name, kind, task, examples, n)


def ask(sets: Sequence[QuestionSet], sampler: Sampler, tokenizer: Any, sampling: Sampling, *, seed: int) -> list[Answers]:
    """Answers to all sets, sampled in one call. Random numbers depend on the seed, the question and the sample only."""
    prompts = [Prompt(e.prompt_tokens, s.n, e.id) for s in sets for e in s.examples]
    completions = iter(sampler.sample(prompts, sampling, seed=seed, step=0) if prompts else [])
    return [_answers(s, [next(completions) for _ in s.examples], tokenizer) for s in sets]


def _answers(questions: QuestionSet, completions: Sequence[Sequence[Completion]], tokenizer: Any) -> Answers:
    texts = tuple(tuple(tokenizer.decode(c.tokens, skip_special_tokens=True) for c in group) for group in completions)
    return Answers(
        questions=questions,
        completions=tuple(tuple(group) for group in completions),
        texts=texts,
        parsed=tuple(tuple(questions.task.parse(t) for t in group) for group in texts),
        correct=_correct(questions, completions, texts),
    )


def _correct(
    questions: QuestionSet, completions: Sequence[Sequence[Completion]], texts: Sequence[Sequence[str]]
) -> tuple[tuple[float, ...], ...]:
    """1.0 where the task's reward is at least 1 (partial credit is not right), else 0.0, for each answer to each question."""
    n = questions.n
    asked = [e for e in questions.examples for _ in range(n)]
    flat = [text for group in texts for text in group]
    chat = [
        [{"role": "assistant", "content": t}] if not isinstance(e.prompt, str) else t for e, t in zip(asked, flat, strict=True)
    ]
    columns = {key: [e.columns[key] for e in asked] for key in (asked[0].columns if asked else ())}
    scores = questions.task.reward(
        prompts=[e.prompt for e in asked],
        completions=chat,
        completion_ids=[list(c.tokens) for group in completions for c in group],
        **columns,
    )
    if len(scores) != len(asked):
        raise UserError(f"task {questions.task.name}: its reward gave {len(scores)} scores for {len(asked)} completions")
    for example, score in zip(asked, scores, strict=True):
        if score is None or not math.isfinite(score):
            raise UserError(f"task {questions.task.name}: its reward gave {score} for {example.id} ({example.where})")
    right = [float(score >= 1.0) for score in scores if score is not None]
    return tuple(tuple(right[i * n : (i + 1) * n]) for i in range(len(questions.examples)))


def set_result(answers: Answers, ks: Sequence[int]) -> dict[str, Any]:
    """A set's entry in evaluation.json. lengths count the stop token; distinct counts different parsable answers."""
    q = answers.questions
    per_question = zip(q.examples, answers.correct, answers.parsed, answers.completions, strict=True)
    questions = [
        {
            "id": example.id,
            "correct": list(correct),
            "parsed": [p is not None for p in parsed],
            "lengths": [len(c.tokens) for c in completions],
            "distinct": len({p for p in parsed if p is not None}),
        }
        for example, correct, parsed, completions in per_question
    ]
    return {
        "kind": q.kind,
        "task": q.task.name,
        "task_version": q.task.version,
        "n": q.n,
        "questions": questions,
        "metrics": set_metrics(questions, ks),
    }


def set_metrics(questions: Sequence[Mapping[str, Any]], ks: Sequence[int]) -> dict[str, float]:
    """Means over the questions of a set (or of several), each question counting once: accuracy, pass@k, response_length (tokens),
    unparsed_frac (replies with no parsable answer), distinct_frac (different parsable answers per reply)."""

    def mean(key: str) -> float:
        return statistics.fmean(statistics.fmean(q[key]) for q in questions)

    passed = {
        f"pass@{k}": statistics.fmean(pass_at_k(len(q["correct"]), round(sum(q["correct"])), k) for q in questions) for k in ks
    }
    return {
        "accuracy": mean("correct"),
        **passed,
        "response_length": mean("lengths"),
        "unparsed_frac": 1.0 - mean("parsed"),
        "distinct_frac": statistics.fmean(q["distinct"] / len(q["correct"]) for q in questions),
    }


def sample_records(answers: Answers) -> list[dict[str, Any]]:
    """A line of samples.jsonl for every answer."""
    return [
        {"set": answers.questions.name, "id": e.id, "prompt": _text(e), "completion": text, "correct": correct}
        for e, texts, corrects in zip(answers.questions.examples, answers.texts, answers.correct, strict=True)
        for text, correct in zip(texts, corrects, strict=True)
    ]


def _text(example: Example) -> str:
    """The prompt for people: plain text, or the contents of its messages."""
    return example.prompt if isinstance(example.prompt, str) else "\n".join(str(m["content"]) for m in example.prompt)
