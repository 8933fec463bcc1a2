"""The nouns: what a row, a trajectory, a group, a batch, a score, a term and a method are.

Everything trainable is a `Group`: one example and its trajectories. Each token is tagged with who wrote it. A demonstration
is a group of one EXPERT trajectory, a preference pair a group of two with unequal rewards, GRPO's rollouts a group of G
POLICY trajectories, LUFFY's a group of both kinds.

Shape letters used throughout: B sequences of an optimizer step (or a micro-batch of it), T tokens of the longest of them,
P preference pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Message = Mapping[str, Any]
"""One chat message: `{"role": "user", "content": "..."}`, further keys as the chat template knows them."""

State = Mapping[str, Any]
"""What a method remembers between steps: JSON values only, returned by `init` and `update`, saved in checkpoints."""

Schedule = Callable[[int], float]
"""A number that depends on the optimizer step (0 at the first)."""


class Source(IntEnum):
    """Who wrote a token.

    PROMPT is conditioned on and never trained, EXPERT comes from the data (demonstration, chosen or rejected answer, expert
    prefix), POLICY was sampled by the model in training, TOOL is what an environment answered.
    """

    PROMPT = 0
    EXPERT = 1
    POLICY = 2
    TOOL = 3


@dataclass(frozen=True)
class Trajectory:
    """One sequence of tokens with the author of each.

    tokens, source: same length T, prompt included; own completions are kept as sampled and never tokenized again.
    reward: what the verifier or the label says, higher is better; None is unknown. A penalty for length is taken off.
    unpenalised: the reward before that; None where nothing was taken off.
    rewards: the reward functions' separate scores, by name (NaN where a function gave none).
    behaviour_logp: log-prob in nats of each token under the policy that sampled it, NaN where unknown; empty means unknown
        everywhere.
    policy_version: the optimizer step of the sampling weights; -1 when not ours.
    finished: False for a completion cut at the token limit. greedy: the most likely token was taken everywhere (ReMax's baseline).
    sampled_from: the example's context that it was sampled from, in place of the prompt that stands before it; "" is that prompt.
    replayed: sampled in an earlier step and remembered since; `behaviour_logp` is that of the policy of that time.
    contexts: other prompts for the same response, by name (self-distillation reads a second one).

    >>> t = Trajectory(tokens=(5, 6, 7), source=(Source.PROMPT, Source.EXPERT, Source.EXPERT))
    >>> t.response_start, t.response
    (1, (6, 7))
    """

    tokens: tuple[int, ...]
    source: tuple[Source, ...]
    reward: float | None = None
    unpenalised: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    behaviour_logp: tuple[float, ...] = ()
    policy_version: int = -1
    finished: bool = True
    greedy: bool = False
    sampled_from: str = ""
    replayed: bool = False
    contexts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.source):
            raise ValueError(f"a trajectory has {len(self.tokens)} tokens but {len(self.source)} sources; they must match")
        if self.behaviour_logp and len(self.behaviour_logp) != len(self.tokens):
            raise ValueError(
                f"a trajectory has {len(self.tokens)} tokens but {len(self.behaviour_logp)} behaviour_logp; they must match"
            )

    @property
    def response_start(self) -> int:
        """Index of the first token that is not PROMPT; the length when there is none."""
        return next((i for i, s in enumerate(self.source) if s != Source.PROMPT), len(self.source))

    @property
    def response(self) -> tuple[int, ...]:
        """The tokens from `response_start` on."""
        return self.tokens[self.response_start :]

    def wrote(self, source: Source) -> bool:
        """Whether `source` wrote any token of this trajectory."""
        return source in self.source


@dataclass(frozen=True)
class Example:
    """One dataset row, tokenized.

    id: stable name used for randomness and in messages, `<stream>:<row>`.
    prompt: as the row had it (text or chat messages); this is what reward functions receive.
    prompt_tokens: the rendered prompt, ready for the policy to continue.
    expert: trajectories the row brings: a demonstration (one), a preference pair (chosen with reward 1, then rejected with
        reward 0), a labelled completion (reward 1 or 0), or none.
    columns: every other column; reward functions receive them as keywords.
    where: `file:row`, for messages.
    contexts: the prompt written otherwise, by name, tokenized like it: what a method's `contexts` make of the row (STaR's hint).
    """

    id: str
    prompt: str | tuple[Message, ...]
    prompt_tokens: tuple[int, ...]
    expert: tuple[Trajectory, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    contexts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """One example and its trajectories: the unit of comparison.

    >>> e = Example("train:0", "2+2=", (1, 2))
    >>> demo = Trajectory((1, 2, 3), (Source.PROMPT, Source.PROMPT, Source.EXPERT))
    >>> own = Trajectory((1, 2, 4), (Source.PROMPT, Source.PROMPT, Source.POLICY), reward=0.0)
    >>> g = Group(e, (demo, own))
    >>> [t.tokens[-1] for t in g.by(Source.POLICY)], len(g.only(Source.EXPERT).trajectories)
    ([4], 1)
    """

    example: Example
    trajectories: tuple[Trajectory, ...]
    stream: str = "train"

    def by(self, source: Source) -> tuple[Trajectory, ...]:
        """The trajectories that `source` wrote at least one token of."""
        return tuple(t for t in self.trajectories if t.wrote(source))

    def only(self, source: Source) -> Group:
        """The same group with only the trajectories of `by(source)`."""
        return replace(self, trajectories=self.by(source))


@dataclass(frozen=True)
class Request:
    """Ask the sampler for `n` completions of `prompt + prefix`.

    prefix: expert tokens placed between the prompt and the completion, tagged EXPERT in the trajectory (TRAPO, BREAD, UFT).
    greedy: take the most likely token instead of sampling (ReMax's baseline).
    by: who writes: the policy in training, or the recipe's teacher, whose words are tagged EXPERT.
    context: sample from the example's context of that name in place of its prompt (STaR's hint). The completion is kept behind the
    prompt itself, and its `behaviour_logp` is unknown: nobody computed it under that prompt.
    """

    n: int
    prefix: tuple[int, ...] = ()
    greedy: bool = False
    by: Literal["policy", "teacher"] = "policy"
    context: str = ""


def _everything_starts_with_its_expert_trajectories(example: Example, state: State) -> tuple[Trajectory, ...]:
    return example.expert


def _ask_nothing(group: Group, state: State) -> Sequence[Request]:
    return ()


def _one_stream(state: State) -> Mapping[str, float]:
    return {"train": 1.0}


Decode = Callable[[tuple[int, ...]], str]
"""Tokens to text, special tokens left out."""

ById = Callable[[str], Example]
"""The example of an id as the data have it (`train:3`), for building groups from what was remembered of it."""


@dataclass(frozen=True)
class Plan:
    """What to collect for an optimizer step.

    streams: share of the step's examples drawn from each named data stream, by state (CHORD draws from two).
    start: the trajectories a group begins with, before anything is sampled.
    next: the completions to ask for, given the group so far; asked again after each round until it returns nothing. One round
        for GRPO, several for TRAPO, BREAD and STaR. Rounds are batched across examples.
    samples: whether `next` ever asks for anything (a plan that does needs a sampler).
    scored: whether completions need a reward. Where they do not (a teacher gives the credit), a recipe may still have one: it is
        recorded, and nothing depends on it.
    reward: the reward of a completion, in place of the recipe's: for methods that compare it with the row's demonstration (SRL,
        SPIN).
    recall: groups of remembered examples that a step begins with, each in place of a drawn one while there are any: buffered
        demonstrations, or own rollouts to replay. `next` is asked about these groups too.
    wants: whether an example is drawn, by state; the stream is gone through until the step has enough, at most once, after which
        examples that were passed over are taken in their order. Examples have the ids of the data here.
    All of these find the run's `seed` and the step's `batch_size` in the state, beside what the method keeps there.
    needs_expert: what the row must bring: "demonstration", "pair", "label" or nothing. expert_streams: the streams whose rows must
        bring it; None for all.
    max_draws: how often a step may draw further examples to replace groups that `select` dropped (DAPO's dynamic sampling).
    origins: the recipe's stream that stands for one of the plan's, where it is not the one of the same name; a stage's `data`.
    """

    streams: Callable[[State], Mapping[str, float]] = _one_stream
    start: Callable[[Example, State], tuple[Trajectory, ...]] = _everything_starts_with_its_expert_trajectories
    next: Callable[[Group, State], Sequence[Request]] = _ask_nothing
    samples: bool = False
    scored: bool = True
    reward: Callable[[Group, Trajectory, Decode], float | None] | None = None
    recall: Callable[[State, ById], Sequence[Group]] | None = None
    wants: Callable[[Example, State], bool] | None = None
    needs_expert: Literal["demonstration", "pair", "label"] | None = None
    expert_streams: frozenset[str] | None = None
    max_draws: int = 1
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def asks_for_rewards(self) -> bool:
        """Whether the recipe has to bring reward functions."""
        return self.samples and self.scored and self.reward is None

    def origin(self, stream: str) -> str:
        """The recipe's stream that a stream of the plan is drawn from."""
        return self.origins.get(stream, stream)

    def brings(self, stream: str) -> Literal["demonstration", "pair", "label"] | None:
        """What the rows of a stream must bring."""
        return self.needs_expert if self.expert_streams is None or stream in self.expert_streams else None


@dataclass(frozen=True)
class Batch:
    """Rectangles for the terms: B sequences, padded on the right to T tokens.

    tokens, source: [B, T] int64; padding is tagged PROMPT.
    trained: [B, T] bool, the entries a term may be on: not prompt, not padding, not a masked truncated completion.
    group: [B] int64, which group of the optimizer step a row belongs to.
    rank: [B] int64, position by reward within the group, 0 is best; rows of equal reward share the better rank.
    reward: [B] float, NaN where unknown.
    advantage: [B, T] float, NaN where no advantage was set.
    columns: further no-gradient tensors [B, T] or [B], NaN where unknown: `behaviour_logp`, `old_logp`, `ref_logp`, `old_value`...
    example_ids: B names for messages.
    prompt_length: [B] int64, tokens that all rows of a group share at their start (what may be computed once).
    length: [B] int64, tokens of each row without padding.
    contexts: by name, another prompt of each row (see `Comparison`).
    step: optimizer steps taken before this one, for schedules. seed: the run's, for random numbers inside a method.
    """

    tokens: Tensor
    source: Tensor
    trained: Tensor
    group: Tensor
    rank: Tensor
    reward: Tensor
    advantage: Tensor
    columns: Mapping[str, Tensor]
    example_ids: tuple[str, ...]
    prompt_length: Tensor
    length: Tensor
    contexts: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    step: int = 0
    seed: int = 0

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def written_by(self, *sources: Source) -> Tensor:
        """[B, T] bool: trained entries that one of `sources` wrote."""
        hit = torch.zeros_like(self.trained)
        for source in sources:
            hit = hit | (self.source == int(source))
        return hit & self.trained

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Rows of the better and of the worse answer of each preference pair, [P] and [P].

        A pair is a group of exactly two rows of known, unequal reward, both with trained tokens (a masked truncated answer
        cannot be compared); pairs are found by group and reward, never by position.
        """
        better: list[int] = []
        worse: list[int] = []
        for g in torch.unique(self.group).tolist():
            rows = torch.nonzero(self.group == g).flatten().tolist()
            if len(rows) != 2 or not bool(self.trained[rows].any(dim=1).all()):
                continue
            first, second = (float(self.reward[r]) for r in rows)
            if math.isnan(first) or math.isnan(second) or first == second:
                continue
            better.append(rows[0] if first > second else rows[1])
            worse.append(rows[1] if first > second else rows[0])
        device = self.tokens.device
        return torch.tensor(better, dtype=torch.long, device=device), torch.tensor(worse, dtype=torch.long, device=device)

    def rows(self, index: Tensor) -> Batch:
        """The batch of the rows in `index`, [b] int64, in that order; T is kept."""
        return replace(
            self,
            tokens=self.tokens[index],
            source=self.source[index],
            trained=self.trained[index],
            group=self.group[index],
            rank=self.rank[index],
            reward=self.reward[index],
            advantage=self.advantage[index],
            columns={name: column[index] for name, column in self.columns.items()},
            example_ids=tuple(self.example_ids[i] for i in index.tolist()),
            prompt_length=self.prompt_length[index],
            length=self.length[index],
            contexts={name: tuple(every[i] for i in index.tolist()) for name, every in self.contexts.items()},
        )

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        moved = {f: getattr(self, f).to(device) for f in _BATCH_TENSORS}
        return replace(self, **moved, columns={name: column.to(device) for name, column in self.columns.items()})

    def with_columns(self, **columns: Tensor) -> Batch:
        """The same batch with further (or replaced) columns."""
        return replace(self, columns={**self.columns, **columns})


_BATCH_TENSORS = ("tokens", "source", "trained", "group", "rank", "reward", "advantage", "prompt_length", "length")


@dataclass(frozen=True)
class Scores:
    """Per-token statistics of the current policy, with gradient: the only way a term sees the model.

    logp: [B, T], log-prob in nats of token t given those before it; 0 where not computed (never read there: `reduce` masks
        both what goes into a term and what comes out).
    channels: further ones on request, [B, T]: `entropy`, `value`, or a full-vocabulary functional such as a divergence.
    computed_tokens, computed_predictions: positions that went through the model's layers for them, padding included and what rows
        start with alike counted once, and through its head.
    """

    logp: Tensor
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    computed_tokens: int = 0
    computed_predictions: int = 0


Weights = Literal["current", "reference", "teacher", "average"]
"""Whose weights: the policy's as they are, those of the frozen reference, those of the recipe's teacher, or an average of the
policy's over the stage's steps (`Method.average`)."""


Channel = Callable[[Tensor, Tensor], Tensor]
"""A full-vocabulary functional: (logits [M, V] in at least fp32, targets [M]) -> [M], with gradient."""


class Look(Protocol):
    """Scores of any batch without gradient, for building columns: `look(batch)` those of the current policy, its `entropy` and the
    asked `channels` among them; `look(batch, of="reference")` those of the frozen reference, `of="teacher"` those of the teacher.
    Each is a forward pass, and is counted as one."""

    def __call__(self, batch: Batch, *, of: Weights = "current", channels: Mapping[str, Channel] | None = None) -> Scores:
        """The scores."""
        ...


Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A functional of two next-token distributions: (the policy's logits [M, V], the other's [M, V], targets [M]) -> [M], both logits
in at least fp32, with gradient to the first alone."""


@dataclass(frozen=True)
class Comparison:
    """A channel that compares the policy's next-token distribution with another one at the same positions, over the vocabulary.

    divergence: what is computed of the two.
    of: whose weights the other distribution comes from; it never has a gradient, nor dropout.
    context: which of the method's `contexts` these weights read before the same response; "" is the policy's own prompt.
    temperature: what both logits are divided by; None is what the policy's log-probs are taken at (of methods that sample, the
        temperature of sampling).
    """

    divergence: Divergence
    of: Weights
    context: str = ""
    temperature: float | None = None


On = Callable[[Batch], Tensor]
"""Which entries a term is on: [B, T] bool, a function of the data only."""

Value = Callable[[Scores, Batch, Tensor], Tensor]
"""A term's un-normalised loss. Gets scores, batch and the term's own [B, T] mask; both are 0 outside the mask. Returns [B, T]
per token, [B] per sequence or [P] per pair."""

Count = Literal["own_tokens", "all_tokens", "sequences", "pairs", "groups"]


@dataclass(frozen=True)
class Per:
    """What a term is divided by: the product of counted names and a constant.

    own_tokens: tokens this term is on. all_tokens: tokens that any term is on. sequences: rows this term is on. pairs:
    preference pairs. groups: groups of the optimizer step. All are counted over the whole optimizer step.
    when: count the step's groups as collected ("before" select) or as kept ("after").

    >>> str(Per(("sequences",), constant=64.0))
    'sequences x 64'
    """

    counts: tuple[Count, ...]
    constant: float = 1.0
    when: Literal["before", "after"] = "after"

    def __str__(self) -> str:
        parts = list(self.counts) + ([f"{self.constant:g}"] if self.constant != 1.0 or not self.counts else [])
        return " x ".join(parts) + (" (before select)" if self.when == "before" else "")


@dataclass(frozen=True)
class Term:
    """One summand of an objective: `coef * sum(value on its tokens) / per`.

    name: logged as `loss/<name>`.
    value: the un-normalised loss whose gradient is taken.
    on: the entries it counts and reads.
    per: the denominator, counted by the trainer over the whole optimizer step.
    coef: a number or a schedule over optimizer steps.
    unit: what a micro-batch may not split.
    needs: columns or channels it reads: "ref_logp", "entropy", ... ("old_logp" is made when a batch is used more than once; "value"
        asks for a value head, "old_value" is what it said before the updates).
    logged: the published loss, where its value differs from that of `value` (PPO's min form); same shape, no gradient taken.
    describe: the formula in words, printed by `crosstrain methods`.
    slots: what the term is in the unified estimator, in words: `gate`, `denominator`, `advantage` where it is not the method's, and
        `within`, how tokens are averaged before the division by `per`. Terms that are no surrogate have no gate and denominator.
    """

    name: str
    value: Value
    on: On
    per: Per
    coef: float | Schedule = 1.0
    unit: Literal["token", "sequence", "group"] = "token"
    needs: frozenset[str] = frozenset()
    logged: Value | None = None
    describe: str = ""
    slots: Mapping[str, str] = field(default_factory=dict, hash=False)

    def coefficient(self, step: int) -> float:
        """The coefficient at an optimizer step."""
        return float(self.coef(step)) if callable(self.coef) else float(self.coef)

    def scaled(self, factor: float) -> Term:
        """The term with its coefficient times `factor`."""
        coef = self.coef
        return replace(self, coef=(lambda step: factor * coef(step)) if callable(coef) else factor * coef)


@dataclass(frozen=True)
class Updates:
    """Inner updates: how often one collected batch is used.

    epochs: passes over it. minibatches: optimizer steps per pass, cut by group.
    """

    epochs: int = 1
    minibatches: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.minibatches < 1:
            raise ValueError(f"updates: got epochs={self.epochs}, minibatches={self.minibatches}; both must be at least 1")

    @property
    def steps(self) -> int:
        """Optimizer steps per collected batch."""
        return self.epochs * self.minibatches


def keep(group: Group, state: State) -> Group | None:
    """The group as it is: selects everything."""
    return group


def _no_advantage(batch: Batch) -> Tensor:
    return torch.full(batch.tokens.shape, math.nan, device=batch.tokens.device)


def _no_state() -> State:
    return {}


def _same_state(state: State, observed: Mapping[str, float]) -> State:
    return state


def _remember_nothing(state: State, groups: Sequence[Group]) -> State:
    return state


@dataclass(frozen=True)
class Method:
    """A training method: a short tuple of terms and how their data come to be.

    terms: the objective.
    plan: what to collect.
    select: what to keep of a group once its rewards are known (None drops it).
    advantage: credit from rewards and columns, [B] or [B, T], no gradient. credits: whether a row's credit depends on its group
        alone, or on the whole step (REINFORCE++ divides by a standard deviation over all of it).
    updates: inner updates per collected batch.
    init, update: explicit state and how a step's logged metrics change it. remember: how the groups of a step do, as collected and
        before `select`, without what was replayed in them; called before `update`. State is JSON; a saved object comes back with
        its keys in another order, on which nothing may depend.
    reference: which weights `ref_logp` comes from: those the run or the stage started with, or those that the step did ("previous":
        SPIN's opponent, where a step is an iteration).
    start_from: which weights a step's inner updates start from: the current ones, or the recipe's own model ("base": ReST-EM,
        STaR), with fresh moments and a learning-rate schedule over the step's own updates. Completions are sampled from the
        current ones.
    contexts: texts in place of the prompt (of a chat's last user message), by name, with `{prompt}`, `{completion}` and the row's
        columns in braces, rendered with the chat template when data are loaded; see `Request.context`, `Comparison.context`.
    temperature: what the policy's logits are divided by in training; None is the sampling temperature where the method samples,
        else 1.
    average: after every optimizer step an average of the policy's weights, which starts with the stage's, goes this share of the
        way to them; None where nothing reads one.
    columns: builders of further no-gradient columns by name, `(look, batch) -> [B, T] or [B]` (KTO's mismatched pairs).
    channels: full-vocabulary functionals of its own by name, computed inside the head, chunk by chunk, with gradient (GEM).
    comparisons: such functionals of its distribution and another one's by name (GKD's teacher, SDFT's second prompt).
    embed: changes the input embeddings in training, `(embeddings [N, L, D], batch) -> same` (NEFTune).
    inputs: makes the input embeddings itself, in training and for its columns, from the table of the weights that the run started
        with: `(table, batch) -> [B, T, D]`, table being ids to embeddings (IFT).
    coefs: factors of the terms' coefficients that follow from the state, by term name (AMFT's mixing weight).
    grad_mask: parameters to leave alone at a step, by state (MIFO). movement: measure after every step how far each parameter has
        moved, in `update`'s metrics as `moved/<parameter>` (root mean square over its entries), since the start of the latest step
        for which this was true; since the first step there was, where none was. Keeps a copy of the trained weights.
    saves: what a run that ends with it leaves: the language model, or a sequence classifier of it and the value head.
    probes: quantities to measure and hand to `update`: `grad_norm/<term>`, the norm of that term's gradient alone, at a pass
        forward and backward each. probing: whether a step measures them, by state; every step does where it is None. probe_share:
        of steps, how many measure them in the long run; for predictions.
    name, settings, paper: how it was made, for records.
    """

    terms: tuple[Term, ...]
    plan: Plan = field(default_factory=Plan)
    select: Callable[[Group, State], Group | None] = keep
    advantage: Callable[[Batch], Tensor] = _no_advantage
    credits: Literal["group", "step"] = "group"
    updates: Updates = field(default_factory=Updates)
    init: Callable[[], State] = _no_state
    update: Callable[[State, Mapping[str, float]], State] = _same_state
    remember: Callable[[State, Sequence[Group]], State] = _remember_nothing
    reference: Literal["base", "stage_start", "previous"] = "base"
    start_from: Literal["current", "base"] = "current"
    contexts: Mapping[str, str] = field(default_factory=dict)
    temperature: float | None = None
    average: float | None = None
    columns: Mapping[str, Callable[[Look, Batch], Tensor]] = field(default_factory=dict)
    channels: Mapping[str, Channel] = field(default_factory=dict)
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    embed: Callable[[Tensor, Batch], Tensor] | None = None
    inputs: Callable[[Callable[[Tensor], Tensor], Batch], Tensor] | None = None
    coefs: Callable[[State], Mapping[str, float]] | None = None
    grad_mask: Callable[[State], Callable[[str], bool]] | None = None
    movement: Callable[[State], bool] | None = None
    probes: tuple[str, ...] = ()
    probing: Callable[[State], bool] | None = None
    probe_share: float = 1.0
    saves: Literal["language model", "reward model"] = "language model"
    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    paper: str = ""

    @property
    def needs(self) -> frozenset[str]:
        """Everything the terms read beside `logp`."""
        return frozenset().union(*(term.needs for term in self.terms))

    def reads(self, weights: Weights) -> bool:
        """Whether it needs a model with these weights beside the policy: for a column, or to compare distributions with."""
        column = {"reference": "ref_logp", "teacher": "teacher_logp"}.get(weights)
        return column in self.needs or any(c.of == weights for c in self.comparisons.values())

    def at(self, state: State) -> Method:
        """The method with the coefficients that its terms have at a state, and the probes that are measured there."""
        factors = {} if self.coefs is None else self.coefs(state)
        return replace(
            self,
            terms=tuple(t.scaled(factors[t.name]) if t.name in factors else t for t in self.terms),
            probes=self.probes if self.probing is None or self.probing(state) else (),
        )
