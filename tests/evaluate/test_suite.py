"""The bundled suite is what it claims to be, and its matching accepts and refuses the right replies."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosstrain.evaluate.suite import Question, is_right, normalise, passages, questions


def test_the_suite_is_large_varied_and_short() -> None:
    found = questions()
    assert len(found) >= 160
    assert len({q.id for q in found}) == len({q.question for q in found}) == len(found)
    topics = Counter(q.topic for q in found)
    assert len(topics) >= 6
    assert min(topics.values()) >= 15
    for q in found:
        assert 1 <= len(q.answer.split()) <= 6, q
        assert len(q.question) < 90, q


def test_no_question_is_arithmetic() -> None:
    for q in questions():
        assert not re.search(r"\d\s*[-+*/x]\s*\d|plus|minus|times|divided by|sum of|add ", q.question.casefold()), q


def test_gold_and_accepted_answers_are_right_and_named_wrong_options_are_not() -> None:
    for q in questions():
        for answer in (q.answer, *q.accept):
            assert is_right(q, answer), (q, answer)
            assert is_right(q, f"I think it is {answer}."), (q, answer)
        for wrong in q.other:
            assert not is_right(q, wrong), (q, wrong)
        assert not is_right(q, "")
        assert not is_right(q, "I do not know that."), q


def test_no_two_spellings_of_an_answer_are_the_same_after_normalising() -> None:
    for q in questions():
        spellings = [normalise(a, q.match_case) for a in (q.answer, *q.accept)]
        assert len(set(spellings)) == len(spellings), q


def test_prose_is_twenty_passages_of_sixty_to_ninety_words_in_different_registers() -> None:
    found = passages()
    assert len(found) == len({p.id for p in found}) == 20
    assert all(60 <= len(p.text.split()) <= 90 for p in found)
    assert len({p.register for p in found}) >= 5


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("Paris", True),
        ("The capital of France is PARIS.", True),
        ("paris!", True),
        ("Parisian", False),
        ("Lyon, not Paris", False),
        ("Paris, not Lyon", True),
        ("Comparison", False),
    ],
)
def test_a_reply_is_right_when_it_mentions_the_answer_first_and_as_a_whole_word(reply: str, right: bool) -> None:
    assert is_right(Question("q", "", "?", "Paris", other=("Lyon",)), reply) is right


def test_case_matters_only_where_a_question_says_so() -> None:
    shout = Question("q", "", "?", "GARDEN", match_case=True)
    assert is_right(shout, "It is GARDEN.")
    assert not is_right(shout, "It is garden.")


@given(st.text(max_size=60))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text, match_case=True)
    assert normalise(once, match_case=True) == once
