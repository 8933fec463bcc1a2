"""Rejection sampling in iterations, each of which may start from the base model anew: RFT, STaR, ReST-EM.

An iteration is a step: every prompt of it is answered by the model as it is, what is right is kept, and a number of updates imitate
that. In a recipe `batch_size` is the number of prompts of an iteration (all rows, in the papers) and `max_steps` that of
iterations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from crosstrain.methods.plans import right_answers, rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import ones
from crosstrain.objective.terms import by, nll
from crosstrain.types import Example, Group, Method, Per, Plan, Request, Source, State, Trajectory, Updates

Start = Literal["base", "current"]

HINT = "hint"
"""The context that STaR asks a second time from."""


@method(
    paper="arXiv:2308.01825",
    family="rejection sampling",
    works="The more different ways to a right answer, the more it helps, and weaker models gain most: LLaMA-7B from 35.9 to "
    "49.3 on GSM8K with samples of several models (arXiv:2308.01825).",
    fails="The better the model, the less it gains (arXiv:2308.01825).",
    deviates="Answers are different when their tokens are; the authors' code compares the equations between << and >>, of "
    "equal ones keeps the text farthest from the others, and drops answers with a wrong calculation.",
)
def rft(
    num_generations: int = 100,
    threshold: float = 0.0,
    distinct: bool = True,
    max_per_prompt: int | None = None,
    with_demonstration: bool = True,
    start_from: Start = "base",
    epochs: int = 3,
    minibatches: int = 1,
) -> Method:
    """RFT (rejection-sampling fine-tuning): imitate own right answers that differ, beside the demonstrations.

    Loss: -log pi averaged over the tokens of the demonstrations and of own answers with reward > threshold, of those with the same
    tokens one. Weight on grad log pi: 1 / N on kept tokens. Trained at temperature 1, whatever the samples were drawn at (0.7 in
    the paper).

    num_generations: completions sampled for each prompt, 100 in the paper. threshold: an answer with a larger reward is right.
    distinct: True keeps one of right answers with the same tokens. max_per_prompt: at most that many own answers to a prompt; None
    keeps all. with_demonstration: false leaves the rows' own answers out. start_from: the weights that a step's updates start from,
    the recipe's own ("base") or those of the step before ("current"). epochs: passes over what was kept. minibatches: optimizer
    steps per epoch.

    The paper's order is a stage of `sft` and then a step of this with all rows, which starts from the base model again.
    """
    return _imitation(
        rollouts(num_generations, with_demonstration=with_demonstration),
        threshold,
        distinct,
        max_per_prompt,
        start_from,
        epochs,
        minibatches,
    )


@method(
    paper="arXiv:2203.14465",
    family="rejection sampling",
    works="With a few examples of reasoning and many answers without: as good as a model 30 times larger on CommonsenseQA "
    "(arXiv:2203.14465).",
    fails="Where the model is no better than chance at first, or where chance alone is often right, so that wrong reasoning "
    "is kept (arXiv:2203.14465).",
    deviates="The hint's words are ours, after the answer in brackets of the authors' code for GSM8K; there is no few-shot "
    "prompt, and an iteration's updates do not grow by a fifth each time.",
)
def star(
    num_generations: int = 1,
    hint: str | None = "{prompt}\n\n(The right answer is {answer}.)",
    threshold: float = 0.0,
    max_per_prompt: int | None = None,
    start_from: Start = "base",
    epochs: int = 1,
    minibatches: int = 1,
) -> Method:
    """STaR (self-taught reasoner): imitate own right answers, and where there is none those given with the answer as a hint.

    A prompt with no answer of reward > threshold is asked again as `hint` writes it (rationalisation), `num_generations` times too;
    what is right then is trained on behind the prompt itself, as if no hint had been given.

    Loss: -log pi averaged over the tokens of kept answers. Weight on grad log pi: 1 / N on kept tokens. Trained at temperature 1.

    num_generations: completions sampled for each prompt, and for each hint. hint: what stands in place of the prompt (of a chat's
    last user message); `{prompt}` is that prompt, and any column of the row may be named, or `{completion}`; with None there is no
    second question. threshold: an answer with a larger reward is right. max_per_prompt: at most that many answers to a prompt; None
    keeps all. start_from: the weights that a step's updates start from; "base" as in the paper, in which every iteration trains the
    first model anew on what the last one said, or "current". epochs: passes over what was kept. minibatches: optimizer steps per
    epoch.
    """
    if num_generations < 1:
        raise ValueError(f"num_generations: got {num_generations}; it must be at least 1")
    if hint is not None and "{prompt}" not in hint:
        raise ValueError(f"hint: got {hint!r}; it must contain {{prompt}}, in whose place it stands (None is no hint)")

    def start(example: Example, state: State) -> tuple[Trajectory, ...]:
        return ()

    def following(group: Group, state: State) -> Sequence[Request]:
        if not group.trajectories:
            return (Request(num_generations),)
        solved = any(t.reward is not None and t.reward > threshold for t in group.trajectories)
        if hint is None or solved or any(t.sampled_from for t in group.trajectories):
            return ()
        return (Request(num_generations, context=HINT),)

    plan = Plan(start=start, next=following, samples=True)
    contexts = {} if hint is None else {HINT: hint}
    return _imitation(plan, threshold, False, max_per_prompt, start_from, epochs, minibatches, contexts)


@method(
    paper="arXiv:2312.06585",
    family="rejection sampling",
    checked="paper",
    works="On MATH and APPS with PaLM 2 better than SFT on people's solutions, and the more so the larger the model "
    "(arXiv:2312.06585).",
    fails="A second iteration overfits where problems are few (APPS), and pass@k gains less than pass@1 (arXiv:2312.06585).",
    deviates="No few-shot prompt; the paper ends an iteration's training by validation, here after a number of epochs.",
)
def rest_em(
    num_generations: int = 32,
    max_per_prompt: int | None = 10,
    threshold: float = 0.0,
    distinct: bool = False,
    start_from: Start = "base",
    epochs: int = 1,
    minibatches: int = 1,
) -> Method:
    """ReST-EM: sample, keep what is right and no more than so many per prompt, and train the base model on it; repeat.

    Loss: -log pi averaged over the tokens of kept answers (reward > threshold, the first max_per_prompt of a prompt), the M-step of
    expectation maximisation with a reward of 0 or 1. Weight on grad log pi: 1 / N on kept tokens. Trained at temperature 1.

    num_generations: completions sampled for each prompt, 32 on MATH and 64 on APPS, at temperature 0.7 from the 40 most likely
    tokens (`sampling`). max_per_prompt: at most that many answers to a prompt; None keeps all. threshold: an answer with a larger
    reward is right. distinct: True keeps one of right answers with the same tokens. start_from: the weights that a step's updates
    start from; "base" drifts less and transfers better than "current" (ReST), says the paper. epochs: passes over what was kept;
    the paper stops by validation. minibatches: optimizer steps per epoch.
    """
    return _imitation(rollouts(num_generations), threshold, distinct, max_per_prompt, start_from, epochs, minibatches)


def _imitation(
    plan: Plan,
    threshold: float,
    distinct: bool,
    max_per_prompt: int | None,
    start_from: Start,
    epochs: int,
    minibatches: int,
    contexts: Mapping[str, str] | None = None,
) -> Method:
    """Imitation, from the base model or the current one, of what a plan collects and is right."""
    if start_from not in ("base", "current"):
        raise ValueError(f"start_from: got {start_from!r}; allowed: base, current")
    return Method(
        terms=(nll("kept", on=by(Source.EXPERT, Source.POLICY), per=Per(("own_tokens",))),),
        plan=plan,
        select=right_answers(threshold, distinct=distinct, most=max_per_prompt),
        advantage=ones,
        updates=Updates(epochs, minibatches),
        start_from=start_from,
        contexts=contexts or {},
        temperature=1.0,
    )
