"""One model's whole evaluation: its file, its numbers, and what makes two evaluations comparable."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import pytest
import torch

from crosstrain.config.evaluation import EvaluationSpec
from crosstrain.config.recipe import SamplingSpec
from crosstrain.data.rows import Row
from crosstrain.errors import UserError
from crosstrain.evaluate import Evaluated, evaluate_model, measure_dev
from crosstrain.evaluate import questions as sets
from crosstrain.evaluate import run as evaluate_run
from crosstrain.evaluate.suite import passages, questions, some_questions
from crosstrain.tasks import Task
from crosstrain.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SAMPLING = SamplingSpec(max_completion_length=5, top_p=0.5)
SPLITS = ("train", "dev", "test", "ood")


def reward(completions: list[Any], wants: list[str], **columns: Any) -> list[float | None]:
    """1 when the wanted letter is in the reply, 0.4 (partial credit, not right) when another letter is."""
    texts = [c[-1]["content"] for c in completions]
    return [1.0 if w in t else 0.4 if any(map(str.isalpha, t)) else 0.0 for t, w in zip(texts, wants, strict=True)]


def letters(reward: Any = reward) -> Task:
    def rows(split: str, size: int, seed: int) -> list[Row]:
        ask = [f"{split} {seed} {i}" for i in range(size)]
        return [
            Row("prompt", ({"role": "user", "content": q},), columns={"wants": "e"}, where=f"letters/{split}:{i + 1}")
            for i, q in enumerate(ask)
        ]

    def parse(text: str) -> str | None:
        return next((c for c in text if c.isascii() and c.isalpha()), None)

    return Task("letters", 3, SPLITS, rows, reward, parse)


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "get_task", lambda name, **config: letters())
    monkeypatch.setattr(evaluate_run, "passages", lambda: passages()[:2])


def spec(**changes: Any) -> EvaluationSpec:
    given: dict[str, Any] = {
        "in_distribution": [{"name": "test", "task": "letters", "size": 6}],
        "out_of_distribution": [{"name": "shifted", "task": "letters", "split": "ood", "size": 4}],
        "dev": {"name": "dev", "task": "letters", "split": "dev", "size": 3},
        "forgetting_questions": 6 if changes.get("forgetting", True) else None,
    }
    return EvaluationSpec(**given | changes)


def model(seed: int = 0) -> Any:
    return tiny_model(seed, torch.float32, vocab_size=len(TOKENIZER))


BASE = model()


def evaluate(m: Any, s: EvaluationSpec | None = None, **settings: Any) -> Evaluated:
    return evaluate_model(m, TOKENIZER, s or spec(), **{"sampling": SAMPLING, "seed": 0, "base": None} | settings)


@pytest.fixture(scope="module")
def found() -> Evaluated:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "get_task", lambda name, **config: letters())
        patch.setattr(evaluate_run, "passages", lambda: passages()[:2])
        base = evaluate(BASE)
        return evaluate(model(1), base=base.answers, base_model=BASE)


def test_the_file_has_its_schema_and_is_json(found: Evaluated) -> None:
    e = json.loads(json.dumps(found.evaluation, allow_nan=False))
    assert set(e) == {"schema_version", "sets", "forgetting", "divergence", "metrics", "seconds"}
    kinds = {name: (s["kind"], s["task"], s["task_version"], s["n"]) for name, s in e["sets"].items()}
    assert kinds == {
        "test": ("in_distribution", "letters", 3, 8),
        "shifted": ("out_of_distribution", "letters", 3, 8),
    }
    for s in e["sets"].values():
        for q in s["questions"]:
            assert set(q) == {"id", "correct", "parsed", "lengths", "distinct"}
            assert len(q["correct"]) == len(q["parsed"]) == len(q["lengths"]) == s["n"]
            assert all(1 <= n <= SAMPLING.max_completion_length for n in q["lengths"])
    assert [q["id"] for q in e["sets"]["shifted"]["questions"]] == [f"shifted:{i}" for i in range(4)]
    assert e["divergence"]["prompts"] == [f"test:{i}" for i in range(6)]
    assert {len(e["divergence"][key]) for key in ("forward_kl", "reverse_kl", "entropy")} == {6}
    assert [q["id"] for q in e["forgetting"]["questions"]] == [q.id for q in some_questions(6)]
    assert set(e["seconds"]) == {"sampling", "forgetting", "prose", "forward_kl", "reverse_kl"}
    assert set(e["metrics"]) == {
        *("accuracy", "pass@1", "pass@2", "pass@4", "response_length", "unparsed_frac", "distinct_frac"),
        *("ood_accuracy", "forgetting/nll", "forgetting/accuracy", "prose/nll"),
        *("forward_kl", "reverse_kl", "entropy"),
    }


def test_every_number_follows_from_the_samples(found: Evaluated) -> None:
    task = letters()
    by_question: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in found.samples:
        by_question.setdefault((line["set"], line["id"]), []).append(line)
    rights = 0
    for name, s in found.evaluation["sets"].items():
        for i, q in enumerate(s["questions"]):
            lines = by_question[name, q["id"]]
            split = {"test": "test", "shifted": "ood"}[name]
            assert all(line["prompt"] == f"{split} 0 {i}" for line in lines)
            replies = [line["completion"] for line in lines]
            assert q["correct"] == [float("e" in r) for r in replies] == [line["correct"] for line in lines]
            parsed = [task.parse(r) for r in replies]
            assert q["parsed"] == [p is not None for p in parsed]
            assert q["distinct"] == len(set(parsed) - {None})
            rights += sum(q["correct"])
    assert 0 < rights < len(found.samples)
    m, own = found.evaluation["metrics"], found.evaluation["sets"]["test"]["questions"]
    assert m["accuracy"] == m["pass@1"] == pytest.approx(sum(sum(q["correct"]) for q in own) / 48)
    assert m["pass@1"] <= m["pass@2"] <= m["pass@4"]
    assert m["unparsed_frac"] == pytest.approx(sum(not p for q in own for p in q["parsed"]) / 48)
    assert m["distinct_frac"] == pytest.approx(sum(q["distinct"] for q in own) / 48)
    prose = found.evaluation["forgetting"]["prose"]
    assert m["prose/nll"] == pytest.approx(sum(p["nll"] for p in prose) / sum(p["tokens"] for p in prose))
    assert m["reverse_kl"] == pytest.approx(statistics.fmean(found.evaluation["divergence"]["reverse_kl"]))


def test_a_moved_model_diverges_and_the_base_does_not(found: Evaluated) -> None:
    assert found.evaluation["metrics"]["forward_kl"] > 0.1
    assert found.evaluation["metrics"]["reverse_kl"] > 0.1
    base = evaluate(BASE, spec(forgetting=False))
    assert base.evaluation["metrics"]["forward_kl"] == base.evaluation["metrics"]["reverse_kl"] == 0.0
    again = evaluate(BASE, spec(forgetting=False), base=base.answers, base_model=BASE).evaluation["metrics"]
    assert again["forward_kl"] == again["reverse_kl"] == 0.0


def test_the_same_model_and_seed_give_the_same_file_and_another_seed_other_samples() -> None:
    first, second = evaluate(BASE), evaluate(BASE)
    for e in (first, second):
        e.evaluation.pop("seconds")
    assert (first.evaluation, first.samples, first.answers) == (second.evaluation, second.samples, second.answers)
    other = evaluate(BASE, spec(forgetting=False), seed=1)
    assert [line["id"] for line in other.samples] == [line["id"] for line in first.samples]
    assert [line["completion"] for line in other.samples] != [line["completion"] for line in first.samples]


def test_questions_do_not_change_when_another_set_is_added() -> None:
    alone = evaluate(BASE, spec(out_of_distribution=[], forgetting=False))
    together = evaluate(BASE, spec(forgetting=False))
    assert alone.evaluation["sets"]["test"] == together.evaluation["sets"]["test"]


def test_what_is_switched_off_is_missing_and_not_zero() -> None:
    s = spec(forgetting=False, divergence=False, in_distribution=[])
    # base answers may be around although this evaluation does not compare
    found = evaluate(BASE, s, base=evaluate(BASE).answers)
    assert set(found.evaluation["metrics"]) == {"ood_accuracy"}
    assert "forgetting" not in found.evaluation
    assert "divergence" not in found.evaluation
    assert found.answers.prompts == ()


def test_several_sets_share_the_divergence_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_run.divergence, "PROMPTS", 4)
    two = [{"name": name, "task": "letters", "size": 5} for name in ("a", "b")]
    found = evaluate(BASE, spec(in_distribution=two, forgetting=False))
    assert found.evaluation["divergence"]["prompts"] == ["a:0", "a:1", "b:0", "b:1"]
    assert {len(c) for c in found.answers.completions} == {4}


def test_a_missing_base_is_said_before_anything_is_sampled() -> None:
    parts: list[str] = []
    with pytest.raises(UserError, match="pass base_model"):
        evaluate(model(1), base=evaluate(BASE, spec(forgetting=False)).answers, progress=parts.append)
    assert parts == []


def test_base_answers_to_other_questions_are_refused() -> None:
    other = evaluate(BASE, spec(in_distribution=[{"name": "test", "task": "letters", "size": 6, "seed": 9}], forgetting=False))
    with pytest.raises(UserError, match="other prompts"):
        evaluate(model(1), spec(forgetting=False), base=other.answers, base_model=BASE)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda n: [None] * n, "gave None for test:0"),
        (lambda n: [0.0] * (n - 1) + [math.nan], "gave nan for shifted:3"),
        (lambda n: [0.0], "1 scores for"),
    ],
)
def test_a_task_that_cannot_score_is_an_error(scores: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = letters(lambda completions, **columns: scores(len(completions)))
    fine = letters(lambda completions, **columns: [0.0] * len(completions))
    tasks = iter([fine, broken] if "shifted" in message else [broken, fine])
    monkeypatch.setattr(sets, "get_task", lambda name, **config: next(tasks))
    with pytest.raises(UserError, match=message):
        evaluate(BASE)


def test_dev_metrics_are_those_of_its_questions() -> None:
    s = spec(forgetting=False, divergence=False, dev_samples=8)
    measured = measure_dev(BASE, TOKENIZER, s, sampling=SAMPLING, seed=0)
    as_test = spec(in_distribution=[s.dev], out_of_distribution=[], pass_at_k=[], forgetting=False, divergence=False)
    found = evaluate(BASE, as_test)
    assert measured == {f"eval_{name}": value for name, value in found.evaluation["metrics"].items()}
    assert set(measured) == {f"eval_{n}" for n in ("accuracy", "response_length", "unparsed_frac", "distinct_frac")}
    with pytest.raises(UserError, match="no development questions"):
        measure_dev(BASE, TOKENIZER, spec(dev=None), sampling=SAMPLING, seed=0)


def test_development_questions_are_not_part_of_the_final_evaluation() -> None:
    assert set(evaluate(BASE, spec(forgetting=False)).evaluation["sets"]) == {"test", "shifted"}


def test_the_model_is_left_in_the_mode_it_came_in() -> None:
    m = model().train()
    evaluate(m, spec(forgetting=False))
    assert m.training


@pytest.mark.real_model
def test_the_base_knows_much_of_the_suite_and_its_nll_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from crosstrain.evaluate.forgetting import gold_answers, prose_results, question_results
    from crosstrain.models import load_model
    from crosstrain.rollout.torch_sampler import TorchSampler

    real, tokenizer = load_model("smollm2-135m-instruct")
    sampler = TorchSampler(real, stop_token_ids=(tokenizer.eos_token_id,))
    results = question_results(real, tokenizer, sampler, questions(), "shared")
    assert 0.35 < statistics.fmean(r["correct"] for r in results) < 0.8
    for i in (0, 50, 120):
        [prompt], [answer] = gold_answers(tokenizer, [questions()[i]])
        ids = torch.tensor([[*prompt, *answer]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            loss = float(real(ids, labels=labels).loss)
        assert results[i]["nll"] == pytest.approx(loss * len(answer), rel=1e-4)
    [first] = prose_results(real, tokenizer, passages()[:1], "shared")
    ids = torch.tensor([tokenizer(passages()[0].text)["input_ids"]])
    with torch.no_grad():
        assert first["nll"] / first["tokens"] == pytest.approx(float(real(ids, labels=ids).loss), rel=1e-4)
