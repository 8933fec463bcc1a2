"""Tiny random models and made-up data of every kind, for tests; `crosstrain.testing` has what tests take from here."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosstrain.rollout.sampler import Completion, Prompt, Sampling
from crosstrain.training.batching import to_batch, with_advantage
from crosstrain.training.collect import Collected, Truncation, collect
from crosstrain.training.columns import no_grad_scores, other_scores
from crosstrain.training.engine import Engine, Teacher
from crosstrain.types import Batch, Channel, Example, Group, Method, Scores, Source, State, Trajectory, Weights
from crosstrain.value_head import make_value_head, named

VOCABULARY = 61


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, vocab_size: int = VOCABULARY) -> Any:
    """A random Llama of about 20,000 parameters in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():  # the default initialisation is nearly uniform, which hides mistakes
            for p in model.parameters():
                p.mul_(4.0) if p.ndim >= 2 else None
    # transformers' RMSNorm computes in fp32 whatever the model's dtype: its rounding would drown 1e-8 in fp64
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
    return model.to(dtype).eval()


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer without merges (259 ids) with a ChatML template; pad is the end token, as in SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|im_start|>", "<|endoftext|>", "<|im_end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
    )
    fast.chat_template = CHATML
    return fast


def save_tiny_model(folder: str | Path, seed: int = 0) -> Path:
    """A folder that any recipe can name as its model: `tiny_model` in fp32 with `tiny_tokenizer`."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(seed, torch.float32, vocab_size=len(tokenizer))
    model.config.eos_token_id = model.config.pad_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


class ScriptedSampler:
    """A sampler whose completions follow from their keys alone; `script` may fix a key's completions."""

    def __init__(self, length: int = 6, script: dict[str, Sequence[tuple[int, ...]]] | None = None) -> None:
        self.length = length
        self.script = script or {}

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, step: int) -> list[list[Completion]]:
        """Random tokens of random length, ending in token 2 unless cut."""
        return [[self._one(p, i, seed, step) for i in range(p.n)] for p in prompts]

    def _one(self, prompt: Prompt, index: int, seed: int, step: int) -> Completion:
        key = prompt.key.split("@")[0]
        if key in self.script:
            tokens = self.script[key][index]
            return Completion(tokens=tokens, logp=tuple(-0.5 for _ in tokens), finished=True)
        rng = random.Random(f"{seed}/{step}/{prompt.key}/{index}")
        tokens = tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, self.length)))
        finished = rng.random() < 0.8
        tokens = (*tokens, 2) if finished else tokens
        return Completion(tokens=tokens, logp=tuple(-rng.random() * 3 for _ in tokens), finished=finished)


def tiny_batch(rewards: Sequence[float], groups: Sequence[int], tokens: int = 2) -> Batch:
    """One row of one prompt token and `tokens` own tokens for each reward, in the given groups."""
    rows: dict[int, list[Trajectory]] = {}
    for reward, g in zip(rewards, groups, strict=True):
        source = (Source.PROMPT,) + (Source.POLICY,) * tokens
        rows.setdefault(g, []).append(Trajectory((1,) * (tokens + 1), source, reward=reward))
    return to_batch([Group(Example(f"tiny:{g}", "", (1,)), tuple(ts)) for g, ts in rows.items()])


def made_up_examples(method: Method, n: int = 8, seed: int = 0) -> list[Example]:
    """Examples with random prompts that bring what the method needs (and a demonstration where it needs nothing).

    Another prompt that it has read is the row's own with random tokens before it.
    """
    rng = random.Random(seed)
    result = []
    for i in range(n):
        prompt = tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(2, 7)))
        contexts = {
            template: (*(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 6))), *prompt)
            for template in sorted(method.contexts)
        }

        def answer(reward: float | None, prompt: tuple[int, ...] = prompt, contexts: Any = contexts) -> Trajectory:
            tokens = (*(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 5))), 2)
            source = (Source.PROMPT,) * len(prompt) + (Source.EXPERT,) * len(tokens)
            known = tuple(-0.5 - (token % 5) for token in tokens)  # as some other model might have found them
            behaviour = (math.nan,) * len(prompt) + known
            return Trajectory(prompt + tokens, source, reward=reward, behaviour_logp=behaviour, contexts=contexts)

        expert = {
            "pair": lambda: (answer(1.0), answer(0.0)),
            "label": lambda i=i: (answer(float(i % 2)),),
        }.get(method.plan.needs_expert or "", lambda: (answer(None),))()
        result.append(Example(f"train:{i}", "", prompt, expert, contexts=contexts, where=f"made-up:{i + 1}"))
    return result


def made_up_rewards(groups: list[Group]) -> list[Group]:
    """Rewards that show a method every case: a group all wrong, one all right, the others mixed; demonstrations are right."""
    result = []
    for g in groups:
        number = int(g.example.id.split(":")[1].split("@")[0])
        scored = []
        for k, t in enumerate(g.trajectories):
            own = {0: 0.0, 1: 1.0}.get(number % 4, float((k + number) % 2))
            scored.append(replace(t, reward=own if t.wrote(Source.POLICY) else 1.0) if t.reward is None else t)
        result.append(replace(g, trajectories=tuple(scored)))
    return result


class _Examples:
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        return [self.examples[(position + i) % len(self.examples)] for i in range(n)], position + n


def made_up_text(tokens: tuple[int, ...]) -> str:
    """Tokens as text: a letter each, and for some the end of a thought."""
    return "".join("</think>" if t % 5 == 0 else chr(97 + t % 26) for t in tokens)


def made_up_step(method: Method, state: State, step: int, *, examples: int = 6, seed: int = 0) -> Collected:
    """What a step of a method collects, by its state, from made-up data of every kind."""
    stream = _Examples(made_up_examples(method, examples, seed))
    return collect(
        method,
        state,
        dict.fromkeys([*method.plan.streams(method.init()), *method.plan.streams(state)], stream),
        {},
        batch_size=examples,
        sampler=ScriptedSampler(),
        sampling=Sampling(),
        rewards=made_up_rewards,
        truncation=Truncation(),
        seed=seed,
        step=step,
        decode=made_up_text,
        teacher=ScriptedSampler(),
    )


def made_up_batch(method: Method, model: Any, *, examples: int = 6, seed: int = 0) -> Batch:
    """A batch as the loop would hand it to the method's terms, with old and reference log-probs, and old values, a little off the
    model's and those of a made-up value head.

    Of a method that recalls something, what it recalls after a first step.
    """
    state = method.init()
    collected = made_up_step(method, state, 0, examples=examples, seed=seed)
    if method.plan.recall is not None:
        state = method.update(method.remember(state, collected.rewarded), {"reward": 0.5})
        collected = made_up_step(method, state, 1, examples=examples, seed=seed)
    engine = made_up_engine(model, micro_batch_tokens=10**6, others=method.reads("teacher"))
    batch = to_batch(collected.groups).to(engine.device)
    scores = no_grad_scores(engine, method, batch, watch=True)
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(method.needs & {"old_logp", "ref_logp", "old_value"}):
        known = scores.channels["value"] if name == "old_value" else scores.logp
        noise = torch.randn(known.shape, generator=generator, dtype=torch.float64) * 0.3
        off = torch.where(batch.trained, known + noise.to(known), torch.full_like(known, math.nan))
        batch = batch.with_columns(**{name: off})

    if "teacher_logp" in method.needs:
        batch = batch.with_columns(teacher_logp=other_scores(engine, method, batch, "teacher").logp)

    def look(other: Batch, *, of: Weights = "current", channels: Mapping[str, Channel] | None = None) -> Scores:
        if of == "teacher":
            return other_scores(engine, method, other, "teacher")
        found = no_grad_scores(engine, method, other, watch=True, channels=channels)
        return Scores(found.logp - 0.1) if of == "reference" else found  # a reference that finds everything less likely

    for name, build in method.columns.items():
        batch = batch.with_columns(**{name: build(look, batch)})
    return with_advantage(batch, method.advantage(batch))


def made_up_value_head(model: Any) -> torch.nn.Linear:
    """A value head for a model, with weights that differ from 0, always the same ones."""
    head = make_value_head(model)
    drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    head.weight.data = (0.3 * drawn).to(head.weight)
    return head


def trained_parameters(engine: Engine) -> dict[str, Tensor]:
    """All parameters of an engine's model and value head, by name."""
    return {**dict(engine.model.named_parameters()), **named(engine.value_head)}


def made_up_other(model: Any, seed: int) -> Any:
    """A tiny model of other random weights with the vocabulary, dtype and device of `model`: a teacher, or a reference."""
    parameter = next(model.parameters())
    made = tiny_model(seed, parameter.dtype, vocab_size=model.config.get_text_config().vocab_size)
    return made.to(parameter.device).requires_grad_(False)


TEACHER, REFERENCE, AVERAGE = 101, 102, 103
"""Seeds of the made-up models that a method may compare with."""


def made_up_engine(model: Any, layout: str = "plain", micro_batch_tokens: int = 2048, *, others: bool = False) -> Engine:
    """What a method's gradient is taken with; with `others` also a made-up teacher, reference and average."""
    seeds = (TEACHER, REFERENCE, AVERAGE)
    teacher, reference, average = (made_up_other(model, seed) if others else None for seed in seeds)
    return Engine(
        model=model,
        parameters=1,
        layout=layout,  # type: ignore[arg-type]
        device=next(model.parameters()).device,
        streams={},
        micro_batch_tokens=micro_batch_tokens,
        value_head=made_up_value_head(model),
        reference=(lambda: nullcontext(reference)) if others else None,
        average=(lambda: nullcontext(average)) if others else None,
        teacher=Teacher(lambda: nullcontext(teacher), 1, layout) if others else None,  # type: ignore[arg-type]
        frozen_embeddings=copy.deepcopy(model.get_input_embeddings()).requires_grad_(False),
    )
