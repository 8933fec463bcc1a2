"""The completions of one call while they grow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from crosstrain.rollout.choose import choose
from crosstrain.rollout.sampler import Completion, Prompt, Sampling, uniforms


class Rows:
    """One row per completion, in the order of prompts and samples: its random numbers and what it has so far.

    Which rows share a forward pass makes no difference here: a row's tokens depend on its own logits and random numbers only.

    limit: tokens after which a completion is cut. length: [N], tokens so far.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        stop_token_ids: Sequence[int],
        *,
        seed: int,
        step: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.prompts, self.sampling, self.limit = prompts, sampling, sampling.max_completion_length
        self.first = np.cumsum([0, *(p.n for p in prompts)]).tolist()
        total = self.first[-1]
        draws = [uniforms(seed, step, p.key, i, self.limit) for p in prompts for i in range(p.n)]
        self.uniform = torch.from_numpy(np.array(draws, dtype=np.float32).reshape(total, self.limit)).to(device)
        self.greedy = torch.tensor([p.greedy for p in prompts for _ in range(p.n)], dtype=torch.bool, device=device)
        self.stops = torch.tensor(list(stop_token_ids), dtype=torch.long, device=device)
        self.tokens = torch.zeros(total, self.limit, dtype=torch.long, device=device)
        self.logp = torch.zeros(total, self.limit, dtype=dtype, device=device)
        self.length = torch.zeros(total, dtype=torch.long, device=device)
        self.finished = torch.zeros(total, dtype=torch.bool, device=device)

    def take(self, row: Tensor, logits: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each of these rows, [R], and whether the row goes on after it, [R] bool.

        logits: [P, V]. place: [R], which of them is each row's.

        Raises FloatingPointError when a log-prob is not finite, since logits are NaN or infinite, naming the prompt.
        """
        s, column = self.sampling, self.length[row]
        token, logp = choose(logits, place, self.uniform[row, column], s.temperature, s.top_p, s.top_k, self.greedy[row])
        if not bool(torch.isfinite(logp).all()):
            bad = int(row[~torch.isfinite(logp)][0])
            key = self.prompts[int(np.searchsorted(self.first, bad, side="right")) - 1].key
            raise FloatingPointError(f"prompt {key}: the model's logits are not finite, so no token can be drawn")
        self.tokens[row, column] = token
        self.logp[row, column] = logp
        self.length[row] = column + 1
        self.finished[row] = torch.isin(token, self.stops)
        return token, ~self.finished[row] & (column + 1 < self.limit)

    def completions(self) -> list[list[Completion]]:
        """All completions, grouped by prompt."""
        tokens, logp, length, finished = (x.tolist() for x in (self.tokens, self.logp, self.length, self.finished))
        flat = [Completion(tuple(t[:n]), tuple(p[:n]), f) for t, p, n, f in zip(tokens, logp, length, finished, strict=True)]
        return [flat[start : start + p.n] for start, p in zip(self.first, self.prompts, strict=False)]
