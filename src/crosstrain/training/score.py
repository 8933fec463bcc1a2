"""`score`: a batch of trajectories to per-token statistics of a model, with gradient.

The only place that knows how sequences are laid out for the model. The sequences of a group, and of neighbouring groups where that
makes less to compute, share a line, and what they start with (a prompt, a system prompt, the same first words of answers) is
computed once: a line is a tree of tokens in which each sees the path to it, at the position it would have alone. The head runs once
for every trained token after a state, however many sequences say it there, in chunks, in at least fp32; no logits exist for what
predicts prompt tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crosstrain.architecture import has_local_attention
from crosstrain.attention import of_any_shape
from crosstrain.head import at_least_fp32, evaluation_mode, head_logits, plain_head
from crosstrain.llama import hidden_states
from crosstrain.prefix import common_start
from crosstrain.served import written_out
from crosstrain.training.batching import cut, to_batch
from crosstrain.training.token_logp import CHUNK, token_logp
from crosstrain.types import Batch, Channel, Divergence, Example, Group, Scores, Source, Trajectory

Layout = Literal["shared", "plain"]

PACK_TOKENS = 256
"""Groups are joined to lines of at most this many tokens, or as long as the longest single group: where attention computes what a
mask hides, it grows with the square of a line, which longer lines would pay for sharing a little more."""


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Entropy in nats of the next-token distribution, [M]."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(dim=-1)


CHANNELS: Mapping[str, Channel] = {"entropy": entropy}
"""Channels that a term can ask for by name, with gradient."""


def _watched_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return entropy(logits.detach(), targets)


def _correct(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.detach().argmax(dim=1) == targets).to(logits.dtype)


WATCHED: Mapping[str, Channel] = {"entropy": _watched_entropy, "correct": _correct}
"""What is measured of every trained token, without gradient."""


@dataclass(frozen=True)
class Lines:
    """How a batch is laid out for the model.

    Sequences have rows and columns in a batch, and lines and places here.

    tokens, positions: [N, L]. mask: [N, 1, L, L] bool, who sees whom, or None where every line is one sequence: plainly causal.
    line, place, target: [P], where the hidden states are that predict trained tokens, and which; equal predictions once.
    row, column: [M], where each trained token is in the batch. prediction: [M], its index among the P.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor | None
    line: Tensor
    place: Tensor
    target: Tensor
    row: Tensor
    column: Tensor
    prediction: Tensor


@dataclass(frozen=True)
class Beside:
    """Another next-token distribution at every trained token of a batch, and what is computed of it and the policy's.

    hidden: [M, D], the states that predict the trained tokens, by row and column of the batch, as `trained_states` gives them.
    logits: some of these states to logits [m, V], without gradient; asked again in backward. measures: of each channel's name, the
    divergence and the temperature of both logits (None: that of `score`).
    """

    hidden: Tensor
    logits: Callable[[Tensor], Tensor]
    measures: Mapping[str, tuple[Divergence, float | None]]


def score(
    model: Any,
    batch: Batch,
    *,
    channels: Mapping[str, Channel] | None = None,
    beside: Sequence[Beside] = (),
    watch: bool = False,
    temperature: float = 1.0,
    layout: Layout = "shared",
    embed: Callable[[Tensor, Batch], Tensor] | None = None,
    value_head: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Log-probs in nats of every trained token of `batch`, [B, T], and the asked channels; 0 where nothing is trained.

    watch: also the channels `entropy` (where `channels` has it, that one) and `correct`, whether the token is the most likely
    one, both without gradient. temperature: logits are divided by it first (as the sampler does). layout: "shared" computes a
    common start once and needs a model that accepts a custom attention mask; "plain" runs one line per sequence. embed: changes
    the input embeddings, [B, longest row, D], which makes the layout plain. value_head: hidden states [P, D] -> [P]; its result
    is the channel `value`, of the state before each token. beside: other distributions of the same tokens, whose measures are
    channels too; their logits exist for as many positions at once as the model's own.
    """
    # what changes embeddings (noise) is about one row at a time, and must not know what shares its line
    lines = lay_out(batch, layout if embed is None else "plain")
    if beside:  # equal predictions of two rows may stand beside different ones
        lines = _one_for_each_token(lines)
    with of_any_shape(lines.tokens.device):
        hidden = _hidden_states(model, lines, batch, embed)
    asked: dict[str, Channel] = {**(WATCHED if watch else {}), **(channels or {})}
    weight = plain_head(model)
    if weight is not None and weight.dtype == hidden.dtype and not channels and not beside:
        found = token_logp(hidden, weight, lines.target, temperature)  # which measures what is watched itself
        flat = {"logp": found.logp, **{name: getattr(found, name).to(found.logp.dtype) for name in asked}}
    else:
        flat = _head(model, hidden, lines.target, asked, temperature, beside)
    if value_head is not None:
        flat["value"] = value_head(hidden)
    rectangles = {name: _rectangle(values, lines, batch) for name, values in flat.items()}
    return Scores(rectangles.pop("logp"), rectangles, lines.tokens.numel(), len(lines.target))


@torch.no_grad()
def trained_states(model: Any, batch: Batch, layout: Layout) -> Tensor:
    """The model's last hidden states that predict the trained tokens of `batch`, by row and column, [M, D], without gradient."""
    lines = _one_for_each_token(lay_out(batch, layout))
    with of_any_shape(lines.tokens.device):
        return _hidden_states(model, lines, batch, None)


def trajectory_logps(
    model: Any,
    trajectories: Sequence[Trajectory],
    *,
    tokens_per_micro_batch: int = 2048,
    temperature: float = 1.0,
    layout: Layout = "shared",
) -> list[Tensor]:
    """The log-prob of each token of each trajectory, without gradient: one [T_i] tensor each, 0 on tokens that nobody trains.

    Trajectories with the same prompt are computed as one group, so that their prompt is computed once.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, t in enumerate(trajectories):
        groups.setdefault(t.tokens[: t.response_start], []).append(i)
    order = [i for members in groups.values() for i in members]
    if not order:
        return []
    batch = to_batch([Group(Example("", "", p), tuple(trajectories[i] for i in m)) for p, m in groups.items()])
    result: list[Tensor] = [torch.empty(0)] * len(trajectories)
    device = next(model.parameters()).device
    with torch.no_grad():
        for index in cut(batch, tokens_per_micro_batch, "token", shared=layout == "shared"):
            logp = score(model, batch.rows(index).to(device), temperature=temperature, layout=layout).logp.cpu()
            for values, row in zip(logp, index.tolist(), strict=True):
                result[order[row]] = values[: int(batch.length[row])].float()
    return result


def predicting_states(model: Any, trajectories: Sequence[Trajectory], *, tokens_per_micro_batch: int = 2048) -> list[Tensor]:
    """The last hidden states that the head predicts each trajectory's trained tokens from, without gradient: one [n_i, D] in at
    least fp32 each, in the order of its tokens."""
    batch = to_batch([Group(Example(str(i), "", ()), (t,)) for i, t in enumerate(trajectories)])
    result: list[Tensor] = [torch.empty(0)] * len(trajectories)
    device = next(model.parameters()).device
    with torch.no_grad():
        for index in cut(batch, tokens_per_micro_batch, "token", shared=False):
            part = batch.rows(index).to(device)
            lines = lay_out(part, "plain")
            with of_any_shape(device):
                hidden = _hidden_states(model, lines, part, None)
            hidden = hidden.to(at_least_fp32(hidden.dtype)).cpu()
            for k, row in enumerate(index.tolist()):
                result[row] = hidden[lines.line.cpu() == k]
    return result


def lay_out(batch: Batch, layout: Layout) -> Lines:
    """Where every token of `batch` goes in the model's input; the rows of a group need not be neighbours.

    Two answers to the prompt 5 6 in one line: 8 follows the prompt and does not see the 7 before it.

    >>> S = Source
    >>> one = Trajectory((5, 6, 7), (S.PROMPT, S.PROMPT, S.EXPERT))
    >>> other = Trajectory((5, 6, 8, 9), (S.PROMPT, S.PROMPT, S.EXPERT, S.EXPERT))
    >>> lines = lay_out(to_batch([Group(Example("q", "", (5, 6)), (one, other))]), "shared")
    >>> lines.tokens.tolist(), lines.positions.tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 2, 2, 3]])
    >>> lines.mask[0, 0].int()
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 0, 1, 0],
            [1, 1, 0, 1, 1]], dtype=torch.int32)
    >>> list(zip(lines.place.tolist(), lines.target.tolist()))  # 6 predicts 7 and 8, 8 predicts 9
    [(1, 7), (1, 8), (3, 9)]
    """
    rows, trained = _row_tokens(batch), batch.trained.cpu()
    packed = _packed(batch, rows) if layout == "shared" else [[r] for r in range(len(batch))]
    trees = [_Tree() for _ in packed]
    predictions: dict[tuple[int, int, int], int] = {}
    scored: list[tuple[int, int, int]] = []
    for n, members in enumerate(packed):
        for r in members:
            path = trees[n].add(rows[r])  # of each column, its place in the line
            for column in torch.nonzero(trained[r]).flatten().tolist():
                key = (n, path[column - 1], rows[r][column])
                scored.append((r, column, predictions.setdefault(key, len(predictions))))
    padded = {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(getattr(tree, name)) for tree in trees], batch_first=True, padding_value=padding
        )
        for name, padding in (("tokens", 0), ("positions", 0), ("ends", _NEVER))
    }
    mask = _tree_mask(padded["ends"]) if any(len(members) > 1 for members in packed) else None
    device = batch.tokens.device
    line, place, target = torch.tensor(list(predictions), dtype=torch.long, device=device).reshape(-1, 3).unbind(1)
    row, column, prediction = torch.tensor(scored, dtype=torch.long, device=device).reshape(-1, 3).unbind(1)
    return Lines(
        padded["tokens"].to(device),
        padded["positions"].to(device),
        None if mask is None else mask.to(device),
        *(line, place, target),
        *(row, column, prediction),
    )


def _one_for_each_token(lines: Lines) -> Lines:
    """The same lines with a prediction of its own for every trained token, by row and column."""
    order = torch.argsort(lines.row * (int(lines.column.max()) + 1 if len(lines.column) else 1) + lines.column)
    at = lines.prediction[order]
    return replace(
        lines,
        line=lines.line[at],
        place=lines.place[at],
        target=lines.target[at],
        row=lines.row[order],
        column=lines.column[order],
        prediction=torch.arange(len(at), device=at.device),
    )


_NEVER = 2**31
"""More places than there are: where `ends` a token that all after it on its line still see."""


class _Tree:
    """A line: sequences as a tree of tokens, depth first.

    ends: of each token, the first place after it that no longer sees it. Right in any order of sequences; the more neighbours
    have in common, the shorter the line.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.ends: list[int] = []
        self._last: Sequence[int] = ()
        self._path: list[int] = []

    def add(self, sequence: Sequence[int]) -> list[int]:
        """Add what the sequence does not have in common with the one before it, and return the place of each of its tokens."""
        common = common_start(self._last, sequence)
        first, new = len(self.tokens), len(sequence) - common
        for place in self._path[common:]:
            self.ends[place] = first
        self.tokens += sequence[common:]
        self.positions += range(common, len(sequence))
        self.ends += [_NEVER] * new
        self._path = [*self._path[:common], *range(first, first + new)]
        self._last = sequence
        return self._path


def _packed(batch: Batch, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows of each line, groups whole and in the order of their tokens, so that those which start alike are neighbours.

    A line is no longer than a limit, or than its group where it has but one. Of several limits, up to PACK_TOKENS and the length of
    the longest group, the one that gives the smallest rectangle is taken.
    """
    members: dict[int, list[int]] = {}
    for r, g in enumerate(batch.group.tolist()):
        members.setdefault(g, []).append(r)
    groups = sorted((sorted(held, key=rows.__getitem__) for held in members.values()), key=lambda held: rows[held[0]])
    # how long each group is in a line of its own, and how much of it a line that has the group before it would have already
    alone = [len(rows[held[0]]) + sum(_added(rows[a], rows[b]) for a, b in pairwise(held)) for held in groups]
    shared = [0, *(common_start(rows[a[-1]], rows[b[0]]) for a, b in pairwise(groups))]
    best: list[list[int]] = []
    smallest = math.inf
    for limit in (0, *(PACK_TOKENS * part // 8 for part in range(1, 9)), max(alone, default=0)):
        lines: list[list[int]] = []
        widths: list[int] = []
        for held, width, saved in zip(groups, alone, shared, strict=True):
            if lines and widths[-1] + width - saved <= limit:
                lines[-1] = lines[-1] + held
                widths[-1] += width - saved
            else:
                lines.append(held)
                widths.append(width)
        if len(lines) * max(widths, default=0) < smallest:
            smallest, best = len(lines) * max(widths, default=0), lines
    return best


def _added(before: Sequence[int], sequence: Sequence[int]) -> int:
    """How many tokens a sequence adds to a line after the one before it."""
    return len(sequence) - common_start(before, sequence)


def _row_tokens(batch: Batch) -> list[list[int]]:
    return [tokens[:n] for tokens, n in zip(batch.tokens.tolist(), batch.length.tolist(), strict=True)]


def _tree_mask(ends: Tensor) -> Tensor:
    """[N, 1, L, L] bool: a token sees itself and those before it whose `ends` are after it. ends: [N, L]."""
    place = torch.arange(ends.shape[1])
    return ((place[None, :] <= place[:, None]) & (place[:, None] < ends[:, None, :]))[:, None]


def _hidden_states(model: Any, lines: Lines, batch: Batch, embed: Callable[[Tensor, Batch], Tensor] | None) -> Tensor:
    """The decoder's last hidden states where trained tokens are predicted, [P, D]."""
    at = (lines.line, lines.place)
    llama = written_out(model)
    if llama is not None:
        embeds = None if embed is None else embed(model.get_input_embeddings()(lines.tokens), batch)
        # those of plain lines are all the same, and their angles are computed once
        plain = lines.mask is None
        positions = torch.arange(lines.tokens.shape[1], device=lines.tokens.device)[None] if plain else lines.positions
        return hidden_states(llama, lines.tokens, positions, lines.mask, embeds, at)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    inputs: dict[str, Any] = {"use_cache": False}
    if embed is None:
        inputs["input_ids"] = lines.tokens
    else:
        inputs["inputs_embeds"] = embed(model.get_input_embeddings()(lines.tokens), batch)
    if lines.mask is not None:
        # padding comes last and is seen by nothing else, so that plain causal lines need no mask
        inputs["attention_mask"] = _mask_for(model, lines.mask)
        inputs["position_ids"] = lines.positions
    return decoder(**inputs).last_hidden_state[at]  # type: ignore[no-any-return]


def _mask_for(model: Any, mask: Tensor) -> Tensor:
    """Eager attention adds its mask to the scores, SDPA takes it as booleans."""
    if model.config._attn_implementation != "eager":
        return mask
    dtype = next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def choose_layout(model: Any) -> Layout:
    """ "shared" when the model honours a custom mask and positions, else "plain".

    Found by trying: short responses to prompts that start alike must score as they do line by line, and changing the first must
    not touch those after it. Whether an architecture honours a custom mask cannot be read off its name. A model with local
    attention gets "plain": in a shared line, columns are not positions, so a window would have to be part of the mask.
    """
    if has_local_attention(model):
        return "plain"
    parameter = next(model.parameters())
    one, other = (_probe(model, k).to(parameter.device) for k in (1, 2))
    try:
        with evaluation_mode(model):
            plain = score(model, one, layout="plain").logp
            shared = score(model, one, layout="shared").logp
            changed = score(model, other, layout="shared").logp
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError):
        return "plain"  # the architecture refuses a custom mask or positions: the plain path needs neither
    # bf16 arithmetic itself moves with the layout, so there the mean has to do
    exact = parameter.dtype in (torch.float32, torch.float64)
    gap = (plain - shared).abs()
    agrees = float(gap.max()) < 1e-3 if exact else float(gap[one.trained].mean()) < 0.3
    # the layout stays the same here, so that even bf16 gives equal bits where nothing leaks
    leaks = float((shared - changed)[1:].abs().max()) > 1e-4
    return "shared" if agrees and not leaks else "plain"


def _probe(model: Any, first: int) -> Batch:
    """Three responses to one prompt, the first of which depends on `first`, and one to another prompt that starts alike.

    The first comes first in the order of tokens, whatever it is: nothing but what it says differs between two probes.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    prompt = tuple((7 * i + 3) % vocabulary for i in range(5))
    other = (*prompt[:3], (prompt[3] + 1) % vocabulary, prompt[4])
    responses = [(n, *((11 * (i + 3 * k) + 5) % vocabulary for i in range(2))) for n, k in enumerate((first, 3, 4))]
    source = (Source.PROMPT,) * 5 + (Source.POLICY,) * 3
    groups = [
        Group(Example("probe", "", start), tuple(Trajectory(start + r, source) for r in answers))
        for start, answers in ((prompt, responses), (other, responses[1:2]))
    ]
    return to_batch(groups)


def _head(
    model: Any,
    hidden: Tensor,
    targets: Tensor,
    channels: Mapping[str, Channel],
    temperature: float,
    beside: Sequence[Beside] = (),
) -> dict[str, Tensor]:
    """`logp`, the channels and what is measured beside another distribution, of every prediction, [P] each. Several chunks are
    computed again in backward; a single one keeps its logits until then."""
    names = ["logp", *channels, *(name for other in beside for name in other.measures)]

    def chunk(h: Tensor, target: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        raw = head_logits(model, h)
        logits = raw / temperature
        logp = logits.gather(1, target[:, None])[:, 0] - torch.logsumexp(logits, dim=1)
        found = [logp, *(channel(logits, target) for channel in channels.values())]
        for other, state in zip(beside, states, strict=True):
            theirs = other.logits(state)
            for divergence, own in other.measures.values():
                divisor = temperature if own is None else own
                found.append(divergence(raw / divisor, theirs / divisor, target))
        return tuple(found)

    pieces = []
    several = len(hidden) > CHUNK and torch.is_grad_enabled()
    parts_of = [x.split(CHUNK) for x in (hidden, targets, *(other.hidden for other in beside))]
    for parts in zip(*parts_of, strict=True):
        pieces.append(checkpoint(chunk, *parts, use_reentrant=False) if several else chunk(*parts))
    return {name: torch.cat(parts) for name, parts in zip(names, zip(*pieces, strict=True), strict=True)}


def _rectangle(values: Tensor, lines: Lines, batch: Batch) -> Tensor:
    """[P] values of predictions at the places of all M trained tokens in a [B, T] rectangle of zeros, with gradient."""
    zeros = torch.zeros(batch.tokens.shape, dtype=values.dtype, device=values.device)
    return zeros.index_put((lines.row, lines.column), values[lines.prediction])
