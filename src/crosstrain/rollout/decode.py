"""The decoding loops: with keys and values kept, or without.

A row is a completion; a line of the batch is a text, of one or more rows that are still the same, and is computed once. Where the
rows of a line draw different tokens, the text with the smallest of them goes on in the line and the others in copies of it:

    rows 0 1 2 on line 0 draw 7 9 7, row 3 on line 1 draws 7   ->   rows 0 2 on line 0, row 3 on line 1, row 1 on the new line 2

Only rows that were asked for together share lines (see `Ask`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from crosstrain.head import head_logits
from crosstrain.llama import Llama, extend
from crosstrain.one_token import extend_one
from crosstrain.prefix import common_start
from crosstrain.rollout.cache import PreallocatedCache, merge
from crosstrain.rollout.rows import Rows

COMPACT_BELOW = 0.75
"""Finished lines leave the batch when fewer than this share of it still runs: the others have to be moved together."""

REFILL_BELOW = 0.75
"""Waiting prompts come in when fewer than this share of a batch's rows still runs: all of its lines are copied to a new cache."""

ENOUGH_LINES = 64
"""On a processor they come in only when also fewer lines than this run: of 135M parameters on 2 cores, a token takes 50 ms and
0.9 ms for each line, and copying a line 2.6 ms, so that a large batch of short completions is better run to its end."""

HEAD_ROWS = 128
"""Lines whose logits exist at once, and so the most prompts of a prefill: 128 x 49,152 in fp32 are 25 MB."""

PREFILL_TOKENS = 4096
"""Prompt tokens in one forward pass, padding included, unless a single prompt has more."""

SMALL_PREFILL = 512
"""Prompt tokens below which a forward pass is not cut to save some: reading the weights again costs as much."""


@dataclass(frozen=True)
class Policy:
    """A model as the loops use it.

    llama: the decoder written out (`crosstrain.llama`), or None where the model's own code runs.
    parameters: the head's, cast once where the device needs that; None where only the model's own forward knows the logits (see
        `check_head`).
    memory: room for the logits of HEAD_ROWS lines, used again for every token.
    shares_start: whether prompts of one prefill may share the columns of what they start with. Not where attention counts columns
    (local windows, ALiBi): during the prefill there are unused ones between the start and the rest of shorter prompts.
    """

    model: Any
    decoder: Any
    llama: Llama | None
    parameters: dict[str, Tensor] | None
    device: torch.device
    memory: Tensor | None = None
    shares_start: bool = False


@dataclass(frozen=True)
class Ask:
    """A prompt and the rows of its completions, `first` to `first + n`."""

    tokens: tuple[int, ...]
    first: int
    n: int


@dataclass
class _Batch:
    """Lines that decode together, and the rows (completions) on them.

    token, position: [L], what each line feeds next. row: [R] ids in `Rows` of the rows that run. line: [R], where each is, rising.
    started: how many rows ran when the batch was put together.
    """

    cache: PreallocatedCache
    token: Tensor
    position: Tensor
    row: Tensor
    line: Tensor
    started: int


@dataclass(frozen=True)
class _Part:
    """What goes into the next batch. source: [L], the line of `cache` that each of its lines starts from (a prompt several times,
    where its rows drew different tokens). The others as in `_Batch`."""

    cache: PreallocatedCache
    source: Tensor
    token: Tensor
    position: Tensor
    row: Tensor
    line: Tensor


@dataclass(frozen=True)
class _Drawn:
    """What became of rows with their next token.

    row: [R], those that go on. text: [R], rising, which of the T different texts each of them is now: where it is in the next two.
    source: [T], rising, the line that a text comes from. token: [T], what it says next.
    """

    row: Tensor
    text: Tensor
    source: Tensor
    token: Tensor


def cached(policy: Policy, asks: Sequence[Ask], rows: Rows, token_budget: int) -> None:
    """Prefill each prompt once, share its keys and values among its rows, and replace those that finish by waiting ones."""
    waiting = deque(sorted(asks, key=lambda a: -len(a.tokens)))  # the longest first: those after it fit into its columns
    batch: _Batch | None = None
    while waiting or batch is not None:
        running = 0 if batch is None else len(torch.unique_consecutive(batch.line))
        worn = waiting and (batch is None or _is_worn(batch, running))
        if admitted := _admit(waiting, batch, rows.limit, token_budget) if worn else []:
            batch = _refill(policy, batch, admitted, rows)
        elif batch is not None and running < COMPACT_BELOW * batch.cache.lines:
            batch = _compact(batch)
        if batch is not None:
            _step(policy, batch, rows)
            if not len(batch.row):
                batch = None  # so that its memory is free for the next


def _is_worn(batch: _Batch, running: int) -> bool:
    """Whether waiting prompts should come in: enough rows have finished, and on a processor few lines run."""
    return len(batch.row) < REFILL_BELOW * batch.started and (batch.token.device.type != "cpu" or running < ENOUGH_LINES)


def _compact(batch: _Batch) -> _Batch:
    """The batch without idle lines, in the same memory."""
    source, which = torch.unique_consecutive(batch.line, return_inverse=True)
    at = batch.cache.keep(source)
    line, order = at[which].sort(stable=True)
    back = at.argsort()  # which of those kept is line 0, 1, ... now
    return replace(
        batch, token=batch.token[source[back]], position=batch.position[source[back]], row=batch.row[order], line=line
    )


def _step(policy: Policy, batch: _Batch, rows: Rows) -> None:
    """One more token for every row that runs; lines without any idle until they are dropped."""
    hidden = _forward(policy, batch.token[:, None], batch.position[:, None], batch.cache)
    drawn = _draw(policy, hidden, batch.line, batch.row, rows)
    leaves = torch.zeros_like(drawn.source, dtype=torch.bool)
    leaves[1:] = drawn.source[1:] == drawn.source[:-1]  # a line's first text stays in it, the others go behind the last line
    line = torch.where(leaves, batch.cache.lines - 1 + leaves.cumsum(0), drawn.source)
    leaving = torch.nonzero(leaves).flatten()
    if len(leaving):
        copied = drawn.source[leaving]
        batch.cache.fork(copied)
        batch.position = torch.cat([batch.position, batch.position[copied]])
        batch.token = torch.cat([batch.token, drawn.token[leaving]])
    batch.position[line] += 1
    batch.token[line] = drawn.token
    batch.line, order = line[drawn.text].sort(stable=True)
    batch.row = drawn.row[order]


def _refill(policy: Policy, batch: _Batch | None, admitted: Sequence[Ask], rows: Rows) -> _Batch | None:
    """The rows that still run and those of admitted prompts; None when no row goes on.

    The cache has room for as many lines as rows, which is enough: of every line, also one that idles, some row was the last on it,
    and no two lines have the same. Of its columns, the last token of a completion needs none, since nothing follows it.
    """
    parts = [] if batch is None else [_running(batch)]
    parts += [_prefill(policy, chunk, rows) for chunk in _chunks(admitted, policy.shares_start)]
    parts = [p for p in parts if len(p.row)]
    if not parts:
        return None
    row = torch.cat([p.row for p in parts])
    lines = [0, *accumulate(len(p.source) for p in parts)]
    return _Batch(
        cache=merge([(p.cache, p.source) for p in parts], len(row), room=rows.limit - int(rows.length[row].min())),
        token=torch.cat([p.token for p in parts]),
        position=torch.cat([p.position for p in parts]),
        row=row,
        line=torch.cat([p.line + first for p, first in zip(parts, lines, strict=False)]),
        started=len(row),
    )


def _running(batch: _Batch) -> _Part:
    source, line = torch.unique_consecutive(batch.line, return_inverse=True)
    return _Part(batch.cache, source, batch.token[source], batch.position[source], batch.row, line)


def _admit(waiting: deque[Ask], batch: _Batch | None, limit: int, token_budget: int) -> list[Ask]:
    """Take from `waiting` what fits beside the rows that run; where none do, at least one, even if it does not fit."""
    held = 0 if batch is None else len(batch.row)
    columns = 0 if batch is None else int(batch.position[batch.line].max())  # a line has as many as its next position
    admitted: list[Ask] = []
    while waiting:
        columns = max(columns, len(waiting[0].tokens))
        if held and (held + waiting[0].n) * (columns + limit) > token_budget:
            break
        admitted.append(waiting.popleft())
        held += admitted[-1].n
    return admitted


def _chunks(asks: Sequence[Ask], shares_start: bool) -> list[list[Ask]]:
    """Prompts in chunks for one forward pass each, of which at most a tenth is padding where it matters.

    The longest come first, so that neighbours are padded little. Where starts are shared, prompts that start alike may be
    neighbours instead, whichever runs fewer tokens; a chunk ends where one more would cost more in it, with a shorter start for
    all, than by itself.
    """
    by_length = _cut(sorted(asks, key=lambda a: -len(a.tokens)), shares_start)
    if not shares_start:
        return by_length
    by_start = _cut(sorted(asks, key=lambda a: a.tokens), shares_start)
    return min(by_length, by_start, key=lambda chunks: sum(_forward_tokens(chunk, shares_start) for chunk in chunks))


def _cut(order: Sequence[Ask], shares_start: bool) -> list[list[Ask]]:
    """Prompts in this order, in chunks."""
    chunks: list[list[Ask]] = []
    for ask in order:
        if not chunks or _ends([*chunks[-1], ask], shares_start):
            chunks.append([ask])
        else:
            chunks[-1].append(ask)
    return chunks


def _ends(chunk: Sequence[Ask], shares_start: bool) -> bool:
    """Whether the last prompt of a chunk should start another one."""
    tokens, before = (_forward_tokens(c, shares_start) for c in (chunk, chunk[:-1]))
    start = _shared(chunk) if shares_start else 0
    real = start + sum(len(a.tokens) - start for a in chunk)
    padded, alone = real < 0.9 * tokens, before + len(chunk[-1].tokens)  # what it would cost by itself
    wasteful = tokens > SMALL_PREFILL and (padded or tokens > alone + SMALL_PREFILL)
    return wasteful or tokens > PREFILL_TOKENS or len(chunk) > HEAD_ROWS


def _forward_tokens(asks: Sequence[Ask], shares_start: bool) -> int:
    """Tokens that a chunk runs through the model, padding included."""
    start = _shared(asks) if shares_start else 0
    return start + len(asks) * (max(len(a.tokens) for a in asks) - start)


def _shared(asks: Sequence[Ask]) -> int:
    """How many tokens prompts start with alike (a system prompt, examples), leaving one of each over to predict from."""
    if len(asks) == 1:
        return 0
    first, last = (extreme(asks, key=lambda a: a.tokens).tokens for extreme in (min, max))
    return min(common_start(first, last), min(len(a.tokens) for a in asks) - 1)


def _prefill(policy: Policy, asks: Sequence[Ask], rows: Rows) -> _Part:
    """The prompts' keys and values, and the first token of each of their rows; rows that it ends are left out."""
    start = _shared(asks) if policy.shares_start else 0
    width = max(len(a.tokens) for a in asks) - start
    tokens = torch.tensor([[0] * (start + width - len(a.tokens)) + list(a.tokens[start:]) for a in asks], device=policy.device)
    length = torch.tensor([len(a.tokens) for a in asks], device=policy.device)
    position = torch.arange(start, start + width, device=policy.device) - (start + width - length)[:, None]
    real = position >= start  # what comes before is padding on the left
    if start:
        first = torch.tensor([asks[0].tokens[:start]], device=policy.device)
        once = PreallocatedCache(torch.ones_like(first, dtype=torch.bool))
        _forward(policy, first, torch.arange(start, device=policy.device)[None], once)
        cache = merge([(once, torch.zeros_like(length))], len(asks), room=width)
        cache.real[:, start:] = real
    else:
        cache = PreallocatedCache(real)
    hidden = _forward(policy, tokens, position.clamp(min=0), cache)
    if start:
        cache.close_gaps()  # unused columns of shorter prompts, which are then on the left alone, as everything else counts on
    owner = torch.repeat_interleave(torch.tensor([a.n for a in asks], device=policy.device))
    row = torch.cat([torch.arange(a.first, a.first + a.n, device=policy.device) for a in asks])
    drawn = _draw(policy, hidden, owner, row, rows)
    return _Part(cache, drawn.source, drawn.token, length[drawn.source], drawn.row, drawn.text)


def _forward(policy: Policy, tokens: Tensor, positions: Tensor, cache: PreallocatedCache) -> Tensor:
    """The hidden state of each line's last column, [L, D]. A model's own code builds the mask, windows of local layers included."""
    if policy.llama is not None:
        one_token = tokens.shape[1] == 1 and cache.length > 0 and tokens.device.type == "cpu"
        return (extend_one if one_token else extend)(policy.llama, tokens, positions, cache)
    mask = cache.mask(tokens.shape[1])
    states = policy.decoder(
        input_ids=tokens, position_ids=positions, attention_mask=mask.long(), past_key_values=cache, use_cache=True
    ).last_hidden_state
    cache.advance(tokens.shape[1])
    return states[:, -1]  # type: ignore[no-any-return]


def _draw(policy: Policy, hidden: Tensor, owner: Tensor, row: Tensor, rows: Rows) -> _Drawn:
    """Draw the next token of each row from the hidden state of its line or prompt, its owner.

    hidden: [L, D]. owner, row: [R], owners rising. Rows of one owner share its logits.
    """
    owners, place = torch.unique_consecutive(owner, return_inverse=True)
    pieces = []
    for some, own in zip(torch.split(row, sizes := _row_counts(place)), torch.split(place, sizes), strict=True):
        first = int(own[0])
        logits = head_logits(policy.model, hidden[owners[first : first + HEAD_ROWS]], policy.parameters, policy.memory)
        pieces.append(rows.take(some, logits, own - first))
    token, live = (torch.cat(found) for found in zip(*pieces, strict=True))
    live, size = torch.nonzero(live).flatten(), logits.shape[1]
    pair, text = torch.unique(owner[live] * size + token[live], return_inverse=True)
    text, order = text.sort(stable=True)
    return _Drawn(row=row[live[order]], text=text, source=pair // size, token=pair % size)


def _row_counts(place: Tensor) -> list[int]:
    """How many rows there are for each HEAD_ROWS owners. place: [R], the owners' numbers from 0 on, rising without gaps."""
    return torch.bincount(torch.div(place, HEAD_ROWS, rounding_mode="floor")).tolist()  # type: ignore[no-any-return]


def plain(policy: Policy, asks: Sequence[Ask], rows: Rows, token_budget: int) -> None:
    """Run whole sequences again for every token, padded on the right: slow, and right for any causal model."""
    waiting = deque(sorted(asks, key=lambda a: -len(a.tokens)))
    while waiting:
        admitted = _admit(waiting, None, rows.limit, token_budget)
        running = [(i, list(a.tokens)) for a in admitted for i in range(a.first, a.first + a.n)]
        while running:
            still: list[tuple[int, list[int]]] = []
            for start in range(0, len(running), HEAD_ROWS):
                part = running[start : start + HEAD_ROWS]
                logits = _last_logits(policy, [tokens for _, tokens in part])
                own = torch.arange(len(part), device=policy.device)
                token, live = rows.take(torch.tensor([i for i, _ in part], device=policy.device), logits, own)
                for (i, tokens), t, goes_on in zip(part, token.tolist(), live.tolist(), strict=True):
                    still += [(i, [*tokens, t])] if goes_on else []
            running = still


def _last_logits(policy: Policy, sequences: Sequence[list[int]]) -> Tensor:
    """The logits after the last token of each sequence, [R, V], in at least fp32."""
    width = max(len(s) for s in sequences)
    tokens = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=policy.device)
    last = torch.tensor([len(s) - 1 for s in sequences], device=policy.device)
    row = torch.arange(len(sequences), device=policy.device)
    if policy.parameters is not None:
        states = policy.decoder(input_ids=tokens, use_cache=False).last_hidden_state
        return head_logits(policy.model, states[row, last], policy.parameters)
    logits: Tensor = policy.model(input_ids=tokens, use_cache=False).logits[row, last]
    return logits if logits.dtype == torch.float64 else logits.float()
