"""The in-process sampler: any Hugging Face causal language model, batched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from crosstrain.head import head_logits, head_weight
from crosstrain.rollout.cache import PreallocatedCache
from crosstrain.rollout.choose import choose
from crosstrain.rollout.sampler import Completion, Prompt, Sampling, uniforms

COMPACT_BELOW = 0.75
"""Finished rows leave the batch when fewer than this share of its rows is still running: a copy of the cache must pay off."""


class TorchSampler:
    """Completes prompts with a model held in this process.

    A prompt is prefilled once and its keys and values are then copied to each of its completions; finished rows leave the batch.
    Log-probs are those of the full distribution, in fp32. A completion's random numbers depend on (seed, step, key, sample,
    position) only.

    path: "cached" where the model accepts our key-value cache with masks and positions of our own, "plain" where it does not (it
    then runs the whole sequence for every token: right, but slow). Found by trying, at the first call.
    token_budget: rows times positions of one decode batch; bounds the memory of the cache.
    """

    def __init__(self, model: Any, *, stop_token_ids: tuple[int, ...], token_budget: int = 32_768) -> None:
        self.model = model
        self.stop_token_ids = stop_token_ids
        self.token_budget = token_budget
        self._path: Literal["cached", "plain"] | None = None

    @property
    def path(self) -> Literal["cached", "plain"]:
        """How this model is sampled from."""
        if self._path is None:
            self._path = "cached" if _cache_works(self) else "plain"
        return self._path

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, step: int) -> list[list[Completion]]:
        """`n` completions of each prompt, in the prompts' order."""
        training = self.model.training
        self.model.eval()
        try:
            decode = _Decode(self, sampling, seed, step)
            run = decode.cached if self.path == "cached" else decode.plain
            answers: list[list[Completion]] = [[] for _ in prompts]
            for batch in _batches(prompts, sampling.max_completion_length, self.token_budget):
                for i, completions in zip(batch, run([prompts[i] for i in batch]), strict=True):
                    answers[i] = completions
            return answers
        finally:
            self.model.train(training)


class _Decode:
    """One call's decoding: the head is cast once, and every batch of prompts goes through `cached` or `plain`."""

    def __init__(self, sampler: TorchSampler, sampling: Sampling, seed: int, step: int) -> None:
        self.model, self.sampling, self.seed, self.step = sampler.model, sampling, seed, step
        self.decoder = self.model.get_decoder()
        self.head = head_weight(self.model)
        self.device = self.head.device
        self.stops = torch.tensor(sampler.stop_token_ids, dtype=torch.long, device=self.device)

    def cached(self, prompts: list[Prompt]) -> list[list[Completion]]:
        """Prefill once per prompt, then decode all completions together."""
        width = max(len(p.tokens) for p in prompts)
        cache = PreallocatedCache(width + self.sampling.max_completion_length)
        tokens = torch.zeros(len(prompts), width, dtype=torch.long)
        real = torch.zeros(len(prompts), width, dtype=torch.bool)
        for r, p in enumerate(prompts):  # padded on the left, so that all rows decode at the same column
            tokens[r, width - len(p.tokens) :] = torch.tensor(p.tokens)
            real[r, width - len(p.tokens) :] = True
        tokens, real = tokens.to(self.device), real.to(self.device)
        causal = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        itself = torch.eye(width, dtype=torch.bool, device=self.device)
        mask = ((real[:, None, :] & causal) | itself)[:, None]
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        hidden = self._forward(tokens, positions, mask, cache)
        owner = torch.tensor([i for i, p in enumerate(prompts) for _ in range(p.n)], device=self.device)
        cache.select(owner)
        rows = _Rows(prompts, self)
        seen = torch.ones(len(owner), cache.width, dtype=torch.bool, device=self.device)
        seen[:, :width] = real[owner]
        position = positions[owner, -1]
        last = hidden[owner]
        while True:
            token = rows.take(head_logits(self.model, last, self.head))
            keep = rows.compact()
            if keep is not None:
                if not len(keep):
                    return rows.completions()
                cache.select(keep)
                seen, position, token = seen[keep], position[keep], token[keep]
            position = position + 1
            mask = seen[:, None, None, : cache.length + 1]
            last = self._forward(token[:, None], position[:, None], mask, cache)

    def plain(self, prompts: list[Prompt]) -> list[list[Completion]]:
        """Run the whole sequence for every token, padded on the right."""
        rows = _Rows(prompts, self)
        sequences = [list(p.tokens) for p in prompts for _ in range(p.n)]
        while True:
            width = max(len(s) for s in sequences)
            tokens = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=self.device)
            ends = torch.tensor([len(s) - 1 for s in sequences], device=self.device)
            states = self.decoder(input_ids=tokens, use_cache=False).last_hidden_state
            last = states[torch.arange(len(sequences), device=self.device), ends]
            token = rows.take(head_logits(self.model, last, self.head))
            for sequence, t in zip(sequences, token.tolist(), strict=True):
                sequence.append(t)
            keep = rows.compact()
            if keep is not None:
                if not len(keep):
                    return rows.completions()
                sequences = [sequences[i] for i in keep.tolist()]

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: PreallocatedCache) -> Tensor:
        """The hidden state of each row's last position, [R, D]."""
        if self.model.config._attn_implementation == "eager":
            dtype = self.model.get_output_embeddings().weight.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
        states = self.decoder(
            input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        cache.advance(tokens.shape[1])
        return states[:, -1]  # type: ignore[no-any-return]


class _Rows:
    """The completions of a batch while they grow: which rows still run, and what they have."""

    def __init__(self, prompts: list[Prompt], decode: _Decode) -> None:
        self.prompts, self.decode = prompts, decode
        limit = decode.sampling.max_completion_length
        draws = [uniforms(decode.seed, decode.step, p.key, i, limit) for p in prompts for i in range(p.n)]
        self.uniform = torch.from_numpy(np.stack(draws)).to(decode.device)
        self.greedy = torch.tensor([p.greedy for p in prompts for _ in range(p.n)], device=decode.device)
        total = len(draws)
        self.tokens = torch.zeros(total, limit, dtype=torch.long, device=decode.device)
        self.logp = torch.zeros(total, limit, device=decode.device)
        self.length = torch.zeros(total, dtype=torch.long, device=decode.device)
        self.finished = torch.zeros(total, dtype=torch.bool, device=decode.device)
        self.active = torch.arange(total, device=decode.device)
        self.column = 0

    def take(self, logits: Tensor) -> Tensor:
        """Choose the next token of every row in the batch; those that already finished get one that is never used."""
        s, rows = self.decode.sampling, self.active
        token, logp = choose(logits, self.uniform[rows, self.column], s.temperature, s.top_p, s.top_k, self.greedy[rows])
        running = ~self.finished[rows]
        self.tokens[rows[running], self.column] = token[running]
        self.logp[rows[running], self.column] = logp[running].float()
        self.length[rows[running]] += 1
        self.finished[rows] |= torch.isin(token, self.decode.stops)
        self.column += 1
        return token

    def compact(self) -> Tensor | None:
        """Which rows of the batch to keep, empty when all is done, or None to go on with all of them."""
        running = ~self.finished[self.active]
        n = int(running.sum())
        if n == 0 or self.column == self.tokens.shape[1]:
            return self.active[:0]
        if n > COMPACT_BELOW * len(self.active):
            return None
        keep = torch.nonzero(running).flatten()
        self.active = self.active[keep]
        return keep

    def completions(self) -> list[list[Completion]]:
        """All completions, grouped by prompt."""
        tokens, logp, length, finished = (x.tolist() for x in (self.tokens, self.logp, self.length, self.finished))
        flat = [Completion(tuple(t[:n]), tuple(p[:n]), f) for t, p, n, f in zip(tokens, logp, length, finished, strict=True)]
        result, at = [], 0
        for p in self.prompts:
            result.append(flat[at : at + p.n])
            at += p.n
        return result


def _batches(prompts: Sequence[Prompt], limit: int, token_budget: int) -> list[list[int]]:
    """Prompt indices in batches of similar length, each within the budget of cache positions (but at least one prompt)."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].tokens), i))
    batches: list[list[int]] = []
    rows = 0
    for i in order:
        rows += prompts[i].n
        if not batches or rows * (len(prompts[i].tokens) + limit) > token_budget:
            batches.append([])
            rows = prompts[i].n
        batches[-1].append(i)
    return batches


@torch.no_grad()
def _cache_works(sampler: TorchSampler) -> bool:
    """Whether two prompts of different length, decoded with our cache, get the log-probs of plain forward passes."""
    vocabulary = int(sampler.model.config.get_text_config().vocab_size)
    prompts = [Prompt(tuple((7 * i + k) % vocabulary for i in range(3 + 2 * k)), 2, f"probe {k}") for k in (1, 2)]
    decode = _Decode(sampler, Sampling(max_completion_length=3), seed=0, step=0)
    decode.stops = decode.stops[:0]
    try:
        cached = decode.cached(prompts)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False  # the architecture's attention wants another kind of cache: the plain path needs none
    dtype = decode.head.dtype if sampler.model.get_output_embeddings().weight.dtype != torch.bfloat16 else torch.bfloat16
    for prompt, completions in zip(prompts, cached, strict=True):
        for c in completions:
            ids = torch.tensor([[*prompt.tokens, *c.tokens]], device=decode.device)
            states = decode.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt.tokens) - 1 : -1]
            logp = torch.log_softmax(head_logits(sampler.model, states, decode.head), dim=-1)
            expected = logp.gather(1, torch.tensor(c.tokens, device=decode.device)[:, None])[:, 0]
            gap = (expected - torch.tensor(c.logp, device=decode.device)).abs()
            if float(gap.mean()) > (0.3 if dtype == torch.bfloat16 else 1e-3):
                return False
    return True
