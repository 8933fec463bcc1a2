"""The forgetting suite's numbers are those of plain forward passes and of the greedy replies."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from crosstrain.evaluate.forgetting import ANSWER_TOKENS, gold_answers, prose_results, question_results
from crosstrain.evaluate.suite import HINT, Passage, Question, questions
from crosstrain.rollout.sampler import Completion, Prompt, Sampling
from crosstrain.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(vocab_size=len(TOKENIZER))
SOME = (Question("a", "", "Capital of France?", "Paris"), Question("b", "", "Opposite of up?", "Down", accept=("below",)))


class Says:
    """A sampler that gives fixed replies and remembers what it was asked."""

    def __init__(self, *replies: str) -> None:
        self.replies = replies
        self.asked: list[Prompt] = []
        self.limit = 0

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, step: int) -> list[list[Completion]]:
        self.asked, self.limit = list(prompts), sampling.max_completion_length
        tokens = [tuple(TOKENIZER(reply)["input_ids"]) for reply in self.replies]
        return [[Completion(t, (0.0,) * len(t), True)] for t in tokens]


def test_a_gold_answer_is_scored_after_the_rendered_question_without_its_end_token() -> None:
    prompts, answers = gold_answers(TOKENIZER, SOME)
    assert TOKENIZER.decode(prompts[0]) == f"<|im_start|>user\nCapital of France? {HINT}<|im_end|>\n<|im_start|>assistant\n"
    assert [TOKENIZER.decode(a) for a in answers] == ["Paris", "Down"]


@torch.no_grad()
def test_nll_is_the_total_of_the_answer_in_nats() -> None:
    found = question_results(MODEL, TOKENIZER, Says("x", "y"), SOME, "shared")
    prompts, answers = gold_answers(TOKENIZER, SOME)
    for result, prompt, answer in zip(found, prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        mean = float(MODEL(ids, labels=labels).loss)
        assert result["tokens"] == len(answer)
        assert result["nll"] == pytest.approx(mean * len(answer), rel=1e-5)


def test_greedy_replies_are_matched_with_gold_and_accepted_answers() -> None:
    says = Says("It is Paris, I think", "up")
    found = question_results(MODEL, TOKENIZER, says, SOME, "shared")
    assert [r["correct"] for r in found] == [1, 0]
    assert [r["reply"] for r in found] == ["It is Paris, I think", "up"]
    assert all(p.greedy and p.n == 1 for p in says.asked)
    assert says.limit == ANSWER_TOKENS
    assert [r["correct"] for r in question_results(MODEL, TOKENIZER, Says("?", "Below!"), SOME, "shared")] == [0, 1]


@torch.no_grad()
def test_prose_nll_is_the_total_of_all_tokens_but_the_first() -> None:
    passage = Passage("p", "news", "Snow fell.")
    [found] = prose_results(MODEL, TOKENIZER, [passage], "shared")
    ids = torch.tensor([TOKENIZER(passage.text)["input_ids"]])
    assert found["tokens"] == ids.shape[1] - 1
    assert found["nll"] == pytest.approx(float(MODEL(ids, labels=ids).loss) * found["tokens"], rel=1e-5)


def test_every_gold_answer_of_the_suite_has_tokens() -> None:
    _, answers = gold_answers(TOKENIZER, questions())
    assert all(answers)
    assert [TOKENIZER.decode(a) for a in answers] == [q.answer for q in questions()]
