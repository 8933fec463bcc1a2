"""Methods that remember learn, each where it should: the bandit, whose chance of success is read off the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from bandit import END, PROMPTS, Answers, Bandit, learn, model_for, probability

from crosstrain.methods import load_method
from crosstrain.types import Example, Group
from tensors import equal

REINFORCED: list[tuple[str, dict[str, Any]]] = [
    ("replay", {}),
    ("solve_rate_selection", {"lowest": 0.0}),
    ("difficulty_curriculum", {"width": 50.0}),
    ("rollout_selection", {"num_generations": 16, "keep": 4}),
]


@pytest.mark.parametrize(("name", "settings"), REINFORCED, ids=str)
def test_rewards_alone_teach_what_sampling_can_find(name: str, settings: dict[str, Any]) -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    assert max(bandit.success(model)) < 0.2, "the task must not be solved at the start"
    metrics = learn(load_method(name, **settings), model, bandit, steps=50, until=0.9)
    assert min(bandit.success(model)) > 0.9
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.5
    assert any("weight_share/replay/policy" in m for m in metrics) == (name == "replay")


AIDED: list[tuple[str, dict[str, Any], int]] = [
    ("relift", {"buffer_size": 2, "minibatches": 1}, 60),
    ("mifo", {"buffer_size": 2, "entropy_share": 0.5}, 100),
]


@pytest.mark.parametrize(("name", "settings", "steps"), AIDED, ids=str)
def test_hybrids_learn_what_sampling_alone_never_finds(name: str, settings: dict[str, Any], steps: int) -> None:
    """Where GRPO stays at zero (test_learning.py), with demonstrations of the answers."""
    model, bandit = model_for(), Bandit.ending()
    assert max(bandit.success(model)) < 1e-3
    learn(load_method(name, **settings), model, bandit, steps=steps, until=0.6)
    assert min(bandit.success(model)) > 0.6


def test_srl_learns_steps_that_sampling_never_puts_together() -> None:
    """No reward but the likeness to the demonstration's next token, from which it learns to stop as well."""
    model, bandit = model_for(), Bandit(((6, 3, END), (9, 9, END)), ((3, 6, END), (5, 9, END)))
    assert max(bandit.success(model)) < 1e-3
    learn(load_method("srl", steps=3, think_end="", num_generations=16), model, bandit, steps=100, until=0.6)
    assert min(bandit.success(model)) > 0.6


@dataclass(frozen=True)
class Opening:
    """Answers of four equal tokens, right whatever follows: what is learned near the end of a demonstration is of use before it."""

    right: Answers = ((6, 6, 6, 6), (9, 9, 9, 9))

    def rewards(self, groups: list[Group]) -> list[Group]:
        """1 for what begins with the right answer, else 0."""
        right = dict(zip(PROMPTS, self.right, strict=False))
        opened = [(g, [t.response[:4] == right[g.example.prompt_tokens] for t in g.trajectories]) for g in groups]
        return [
            replace(g, trajectories=tuple(replace(t, reward=float(r)) for t, r in zip(g.trajectories, found, strict=True)))
            for g, found in opened
        ]

    def examples(self, needs: str | None) -> list[Example]:
        """As the bandit has them."""
        return Bandit(self.right, self.right).examples(needs)


def test_bread_shows_less_and_less_until_nothing_has_to_be_shown() -> None:
    """Where GRPO never samples an answer; a demonstration's tokens are never trained on themselves."""
    task: Any = Opening()
    grpo = learn(load_method("grpo", beta=0.0), model_for(), task, steps=10)
    assert {m["reward"] for m in grpo} == {0.0}
    model = model_for()
    metrics = learn(load_method("bread", episodes=4), model, task, steps=60)
    assert min(probability(model, p, a) for p, a in zip(PROMPTS, task.right, strict=False)) > 0.6
    assert "weight_share/rl/policy" in metrics[10] and not any("expert" in name and "weight" in name for name in metrics[10])
    used = [m["cost/demonstrations"] for m in metrics]
    assert used[-1] == used[-5] and 0 < used[-1] < 2 * len(metrics), "fewer than one demonstration for each prompt and step"


def test_grpo_alone_stays_where_no_answer_is_ever_sampled() -> None:
    model, bandit = model_for(), Bandit.ending()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = learn(load_method("grpo", beta=0.0), model, bandit, steps=8)
    assert {m["reward"] for m in metrics} == {0.0}
    assert equal(dict(model.named_parameters()), before)
