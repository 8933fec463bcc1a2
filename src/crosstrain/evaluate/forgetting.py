"""What a model still knows: likelihood of gold answers, greedy answers, likelihood of prose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crosstrain.data.chat import encode
from crosstrain.data.rows import Row
from crosstrain.evaluate.likelihood import Tokens, answer_logps, text_logps
from crosstrain.evaluate.suite import Passage, Question, is_right
from crosstrain.rollout.sampler import Prompt, Sampler, Sampling
from crosstrain.training.score import Layout

ANSWER_TOKENS = 12
"""Greedy replies are cut here: the longest gold answer has 5 tokens (SmolLM2), and a full sentence still names it."""


def gold_answers(tokenizer: Any, questions: Sequence[Question]) -> tuple[list[Tokens], list[Tokens]]:
    """The rendered prompts and the gold answers' tokens.

    The token that ends the turn is left out: whether a model stops after a bare word is style, which any training on short
    answers changes, and not knowledge.
    """
    prompts: list[Tokens] = []
    answers: list[Tokens] = []
    special = set(tokenizer.all_special_ids)
    for q in questions:
        row = Row(
            "prompt_completion", q.prompt, completion=({"role": "assistant", "content": q.answer},), where=f"forgetting:{q.id}"
        )
        example = encode(row, tokenizer, id=q.id)
        answer = example.expert[0].response
        while answer[-1] in special:
            answer = answer[:-1]
        prompts.append(example.prompt_tokens)
        answers.append(answer)
    return prompts, answers


def question_results(
    model: Any, tokenizer: Any, sampler: Sampler, questions: Sequence[Question], layout: Layout
) -> list[dict[str, Any]]:
    """Per question: the total negative log-likelihood (nats) of the gold answer and its tokens; the greedy reply and whether it
    is right (1 or 0)."""
    prompts, answers = gold_answers(tokenizer, questions)
    logps = answer_logps(model, prompts, answers, layout=layout)
    asked = [Prompt(p, 1, f"forgetting:{q.id}", greedy=True) for p, q in zip(prompts, questions, strict=True)]
    replies = sampler.sample(asked, Sampling(max_completion_length=ANSWER_TOKENS), seed=0, step=0)
    results = []
    for q, logp, [reply] in zip(questions, logps, replies, strict=True):
        text = tokenizer.decode(reply.tokens, skip_special_tokens=True)
        results.append({"id": q.id, "nll": -sum(logp), "tokens": len(logp), "correct": int(is_right(q, text)), "reply": text})
    return results


def prose_results(model: Any, tokenizer: Any, passages: Sequence[Passage], layout: Layout) -> list[dict[str, Any]]:
    """Per passage: its total negative log-likelihood (nats) as plain text, and how many tokens that counts (all but the first)."""
    texts = [tuple(tokenizer(p.text)["input_ids"]) for p in passages]
    logps = text_logps(model, texts, layout=layout)
    return [{"id": p.id, "nll": -sum(logp), "tokens": len(logp)} for p, logp in zip(passages, logps, strict=True)]
