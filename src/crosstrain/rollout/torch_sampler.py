"""The in-process sampler: any Hugging Face causal language model, batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from crosstrain.architecture import found_once, has_local_attention, is_plain
from crosstrain.attention import of_any_shape
from crosstrain.errors import UserError
from crosstrain.head import (
    adds_up_in_fp32,
    at_least_fp32,
    check_head,
    evaluation_mode,
    head_logits,
    head_parameters,
    plain_head,
)
from crosstrain.rollout.decode import HEAD_ROWS, Ask, Policy, cached, plain
from crosstrain.rollout.rows import Rows
from crosstrain.rollout.sampler import Completion, Prompt, Sampling, check_keys
from crosstrain.served import written_out

Path = Literal["cached", "plain"]

SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layer whose state is keys and values of single positions, which our cache holds."""


@dataclass(frozen=True)
class Found:
    """How a model is sampled from, why not "cached", and whether `head_logits` gives its logits."""

    path: Path
    reason: str
    known_head: bool


class TorchSampler:
    """Completes prompts with a model held in this process.

    A prompt is prefilled once, completions that are still the same text are computed once, and those that finish are replaced by
    waiting ones. Log-probs are those of the full distribution, in fp32. A completion's random numbers depend on (seed, step,
    key, sample, position) only; floating point may still differ with the batch, in bf16 enough to change a token now and then.

    stop_token_ids: ids that end a completion. May be empty.
    token_budget: completions times columns of the key-value cache (but at least one completion); bounds its memory, of which there
        is twice as much while waiting prompts come in. A prompt whose own completions do not fit is prefilled again for each part
        of them.

    Its property `path` is "cached", or "plain" where the model does not accept our cache or has layers it cannot serve: the whole
    sequence is then run for every token, which is right but slow. `path_reason` says why. Both are found by trying, at a model's
    first call.
    """

    def __init__(self, model: Any, *, stop_token_ids: tuple[int, ...], token_budget: int = 32_768) -> None:
        if token_budget < 1:
            raise UserError(f"token_budget: got {token_budget}; it must be at least 1")
        self.model = model
        self.stop_token_ids = stop_token_ids
        self.token_budget = token_budget

    @property
    def path(self) -> Path:
        """How this model is sampled from."""
        return self._look().path

    @property
    def path_reason(self) -> str:
        """Why the path is plain; empty when it is cached."""
        return self._look().reason

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, step: int) -> list[list[Completion]]:
        """`n` completions of each prompt, in the prompts' order.

        Raises UserError for a prompt and completion longer than a model with learned positions can take, ValueError for repeated
        keys, FloatingPointError when logits are not finite.
        """
        check_keys(prompts)
        _check_length(self.model, prompts, sampling)
        found = self._look()
        with evaluation_mode(self.model), of_any_shape(next(self.model.parameters()).device):
            policy = _policy(self.model, found.known_head, sum(p.n for p in prompts))
            rows = _rows(policy, prompts, sampling, self.stop_token_ids, seed, step)
            run = cached if found.path == "cached" else plain
            run(policy, _asks(prompts, rows, self.token_budget), rows, self.token_budget)
            return rows.completions()

    def _look(self) -> Found:
        return found_once(_find_path, self.model)


def _policy(model: Any, known_head: bool, rows: int) -> Policy:
    parameter = next(model.get_output_embeddings().parameters())
    weight = plain_head(model) if known_head else None
    as_it_is = weight is not None and adds_up_in_fp32(weight)
    # what `head_logits` is given: nothing it could cast where a card takes the weight in 16 bits
    head = None if not known_head else {"weight": weight} if as_it_is else head_parameters(model)
    shares_start = is_plain(model) and not has_local_attention(model)
    memory = None
    if weight is not None:
        memory = weight.new_empty(min(rows, HEAD_ROWS), len(weight), dtype=at_least_fp32(weight.dtype))
    return Policy(model, model.get_decoder(), written_out(model), head, parameter.device, memory, shares_start)


def _rows(policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, stops: Sequence[int], seed: int, step: int) -> Rows:
    dtype = next(policy.model.get_output_embeddings().parameters()).dtype
    dtype = dtype if dtype == torch.float64 else torch.float32
    return Rows(prompts, sampling, stops, seed=seed, step=step, dtype=dtype, device=policy.device)


def _asks(prompts: Sequence[Prompt], rows: Rows, token_budget: int) -> list[Ask]:
    """What to decode: a prompt with all of its rows, in parts where they exceed the budget."""
    asks = []
    for prompt, first in zip(prompts, rows.first, strict=False):
        most = max(1, token_budget // (len(prompt.tokens) + rows.limit))
        asks += [Ask(prompt.tokens, first + i, min(most, prompt.n - i)) for i in range(0, prompt.n, most)]
    return asks


def _check_length(model: Any, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    """Learned positions end; rotary ones go on, for better or worse."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or getattr(config, "rope_parameters", None) is not None:
        return
    for prompt in prompts:
        needed = len(prompt.tokens) + sampling.max_completion_length - 1
        if needed > positions:
            raise UserError(
                f"prompt {prompt.key}: its {len(prompt.tokens)} tokens and sampling.max_completion_length="
                f"{sampling.max_completion_length} need {needed} positions; the model has {positions}. Shorten one of them"
            )


def _find_path(model: Any) -> Found:
    """Cached, when two prompts of different length get the log-probs of plain forward passes from it."""
    try:
        check_head(model)
    except UserError as error:
        if model.get_output_embeddings() is None:
            raise
        return Found("plain", str(error), known_head=False)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - SERVED_LAYERS
    if kinds:
        return Found(
            "plain", f"it has layers of kind {', '.join(sorted(kinds))}, which the cache cannot serve", known_head=True
        )
    try:
        gap = _gap(model)
    except torch.OutOfMemoryError:
        raise
    except FloatingPointError as error:  # it names a prompt of the probe
        raise FloatingPointError(
            "the model's logits are not finite, so no token can be drawn: its weights may be damaged"
        ) from error
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:  # what refusing a cache looks like
        return Found("plain", f"it does not accept the cache: {type(error).__name__}: {error}", known_head=True)
    # bf16 arithmetic itself moves with the batch's shape, so there only the mean can tell
    exact = next(model.get_output_embeddings().parameters()).dtype in (torch.float32, torch.float64)
    if not gap < (1e-3 if exact else 0.2):
        return Found("plain", f"with the cache its log-probs are off by {gap:.3g} nats on average", known_head=True)
    return Found("cached", "", known_head=True)


def _gap(model: Any) -> float:
    """Mean distance of the log-probs of sampled tokens, with the cache and without, in nats."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    # of 5, 9 and 13 tokens, with the same first one
    prompts = [Prompt(tuple((7 * i + k * (i > 0)) % vocabulary for i in range(1 + 4 * k)), 2, f"probe {k}") for k in (1, 2, 3)]
    gaps = []
    with evaluation_mode(model):
        policy = _policy(model, known_head=True, rows=sum(p.n for p in prompts))
        rows = _rows(policy, prompts, Sampling(max_completion_length=3), (), seed=0, step=0)
        cached(policy, _asks(prompts, rows, 1_000), rows, 1_000)
        for prompt, completions in zip(prompts, rows.completions(), strict=True):
            for c in completions:
                ids = torch.tensor([[*prompt.tokens, *c.tokens]], device=policy.device)
                states = policy.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt.tokens) - 1 : -1]
                logp = torch.log_softmax(head_logits(model, states, policy.parameters), dim=-1)
                expected = logp.gather(1, ids[0, len(prompt.tokens) :, None])[:, 0]
                gaps.append((expected - torch.tensor(c.logp, dtype=logp.dtype, device=policy.device)).abs().mean())
    return float(torch.stack(gaps).mean())
