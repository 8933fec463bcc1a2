"""The in-process sampler against transformers' own generate and plain forward passes, over architectures."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from crosstrain import attention
from crosstrain.attention import use_short_attention
from crosstrain.errors import UserError
from crosstrain.rollout import decode, torch_sampler
from crosstrain.rollout.cache import PreallocatedCache
from crosstrain.rollout.sampler import Completion, Prompt, Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.testing import tiny_model

VOCABULARY = 61
STOPS = (2, 5)

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 16}
"""Shorter than prompts and completions, so that local layers forget, and longer than what the sampler tries a model with."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "qwen2": SHAPE,
    "qwen3": SHAPE,
    "gemma": SHAPE,
    "cohere": {**SHAPE, "logit_scale": 0.3},
    "granite": {**SHAPE, "logits_scaling": 3.0},
    "phi3": SHAPE,
    "gpt_neox": SHAPE,
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": None,
        "eos_token_id": None,
    },
    "mistral": {**SHAPE, **WINDOW},
    "gemma2": {**SHAPE, **WINDOW, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "attn_implementation": "eager"},
    "gemma3_text": {**SHAPE, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2 local": {**SHAPE, **WINDOW, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "llama eager": {**SHAPE, "attn_implementation": "eager"},
}  # fmt: skip


def family(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of about 30,000 parameters whose distributions are far from flat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(FAMILIES[name])
    attention = settings.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(name.split()[0], **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(5.0) if p.ndim >= 2 else None
    return model.to(dtype).eval()


def mixed_prompts(count: int, n: int = 1, longest: int = 24, seed: int = 0, greedy: bool = False) -> list[Prompt]:
    rng = random.Random(seed)
    return [
        Prompt(tuple(rng.choices(range(6, VOCABULARY), k=rng.randint(1, longest))), n, f"p{i}", greedy) for i in range(count)
    ]


def generated(model: Any, prompts: Sequence[Prompt], limit: int, stops: Sequence[int]) -> list[tuple[int, ...]]:
    """Greedy completions by transformers, prompts of equal length together so that nothing is padded."""
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    for length in {len(p.tokens) for p in prompts}:
        index = [i for i, p in enumerate(prompts) if len(p.tokens) == length]
        out = model.generate(
            input_ids=torch.tensor([prompts[i].tokens for i in index]),
            attention_mask=torch.ones(len(index), length, dtype=torch.long),
            do_sample=False, max_new_tokens=limit, eos_token_id=list(stops), pad_token_id=0, use_cache=True,
        )  # fmt: skip
        for i, row in zip(index, out[:, length:].tolist(), strict=True):
            end = next((k + 1 for k, t in enumerate(row) if t in stops), len(row))
            answers[i] = tuple(row[:end])
    return answers


def plain_log_probs(model: Any, prompt: Prompt, tokens: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Of each completion token, from one unpadded forward pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt.tokens, *tokens]]), use_cache=False).logits[0].to(torch.float64)
    logp = torch.log_softmax(logits[len(prompt.tokens) - 1 : -1] / temperature, dim=1)
    return logp.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def flat(answers: list[list[Completion]]) -> list[tuple[int, ...]]:
    return [c.tokens for group in answers for c in group]


def test_greedy_equals_transformers_generate_on_200_prompts_of_mixed_length() -> None:
    model = family("llama")
    prompts = mixed_prompts(200)
    sampler = TorchSampler(model, stop_token_ids=STOPS)
    found = sampler.sample(prompts, Sampling(temperature=0, max_completion_length=16), seed=0, step=0)
    expected = generated(model, prompts, 16, STOPS)
    assert sampler.path == "cached"
    assert flat(found) == expected
    assert {c.finished for group in found for c in group} == {True, False}, "the test needs both endings"


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_completions_that_part_get_plain_log_probs_on_every_architecture(
    name: str, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions of these models often begin alike; the budget makes some wait, so that parted ones are put together anew."""
    model = family(name)
    sampler = TorchSampler(model, stop_token_ids=STOPS, token_budget=1500)
    assert sampler.path == "cached"
    happened: list[str] = []
    fork, merge = PreallocatedCache.fork, decode.merge

    def fork_and_note(cache: PreallocatedCache, source: torch.Tensor) -> None:
        happened.append("fork")
        fork(cache, source)

    def merge_and_note(*args: Any, **more: Any) -> PreallocatedCache:
        happened.append("merge")
        return merge(*args, **more)

    monkeypatch.setattr(PreallocatedCache, "fork", fork_and_note)
    monkeypatch.setattr(decode, "merge", merge_and_note)
    prompts = [replace(p, tokens=(*range(8, 8 + start), *p.tokens)) for p in mixed_prompts(10, n=12, seed=1)]
    found = sampler.sample(prompts, Sampling(temperature=0.6, max_completion_length=14), seed=0, step=0)
    first, last = happened.index("fork"), len(happened) - 1 - happened[::-1].index("fork")
    assert "merge" in happened[first:last], "lines must part before and after they are put together anew"
    for prompt, group in zip(prompts, found, strict=True):
        for c in group:
            expected = plain_log_probs(model, prompt, c.tokens, temperature=0.6)
            assert torch.allclose(torch.tensor(c.logp, dtype=torch.float64), expected, atol=1e-3)


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_architecture_equals_generate_and_plain_log_probs_with_the_cache(name: str, start: int) -> None:
    """start: tokens that all prompts begin with, as they do with a system prompt."""
    model = family(name)
    prompts = [replace(p, tokens=(*range(8, 8 + start), *p.tokens)) for p in mixed_prompts(12, seed=1)]
    sampler = TorchSampler(model, stop_token_ids=STOPS)
    found = sampler.sample(prompts, Sampling(temperature=0, max_completion_length=14), seed=0, step=0)
    assert (sampler.path, sampler.path_reason) == ("cached", "")
    assert flat(found) == generated(model, prompts, 14, STOPS)
    for prompt, [completion] in zip(prompts, found, strict=True):
        expected = plain_log_probs(model, prompt, completion.tokens)
        assert torch.allclose(torch.tensor(completion.logp, dtype=torch.float64), expected, atol=2e-4)


def test_log_probs_of_samples_are_those_of_a_plain_forward_pass_at_the_temperature() -> None:
    model = tiny_model()
    prompts = mixed_prompts(6, n=5)
    found = TorchSampler(model, stop_token_ids=STOPS).sample(
        prompts, Sampling(temperature=0.7, top_p=0.8, top_k=20, max_completion_length=12), seed=3, step=4
    )
    for prompt, group in zip(prompts, found, strict=True):
        for c in group:
            expected = plain_log_probs(model, prompt, c.tokens, temperature=0.7)
            assert torch.allclose(torch.tensor(c.logp, dtype=torch.float64), expected, atol=1e-9)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.0, 0.8, 0), (1.0, 1.0, 6)])
def test_first_and_second_tokens_come_as_often_as_the_model_says(temperature: float, top_p: float, top_k: int) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    model, n = tiny_model(), 12_000
    prompt = Prompt((7, 8, 9), n, "p")
    sampling = Sampling(temperature, top_p, top_k, max_completion_length=2)
    [group] = TorchSampler(model, stop_token_ids=()).sample([prompt], sampling, seed=0, step=0)
    common = Counter(c.tokens[0] for c in group).most_common(1)[0][0]
    for given, tokens in (
        ((), [c.tokens[0] for c in group]),
        ((common,), [c.tokens[1] for c in group if c.tokens[0] == common]),
    ):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt.tokens, *given]])).logits[0, -1]
        scores = (logits / temperature)[None]
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
        expected = scores[0].softmax(dim=0).numpy() * len(tokens)
        observed = torch.bincount(torch.tensor(tokens), minlength=VOCABULARY).numpy()
        assert not observed[expected == 0].any()
        often = expected >= 5
        seen, hoped = [*observed[often]], [*expected[often]]
        if expected[~often].sum() > 0:
            seen, hoped = [*seen, observed[~often].sum()], [*hoped, expected[~often].sum()]
        assert len(tokens) > 300, "too few to tell"
        assert stats.chisquare(seen, hoped).pvalue > 1e-3


def test_a_completion_does_not_depend_on_its_neighbours_their_order_or_the_budget() -> None:
    model = tiny_model()  # fp64: rounding cannot change a token
    prompts = mixed_prompts(10, n=3)
    sampling = Sampling(max_completion_length=10)
    together = TorchSampler(model, stop_token_ids=STOPS).sample(prompts, sampling, seed=5, step=6)
    alone = [TorchSampler(model, stop_token_ids=STOPS).sample([p], sampling, seed=5, step=6)[0] for p in prompts]
    backwards = TorchSampler(model, stop_token_ids=STOPS).sample(prompts[::-1], sampling, seed=5, step=6)[::-1]
    narrow = TorchSampler(model, stop_token_ids=STOPS, token_budget=150).sample(prompts, sampling, seed=5, step=6)
    one = TorchSampler(model, stop_token_ids=STOPS, token_budget=1).sample(prompts, sampling, seed=5, step=6)
    fewer = TorchSampler(model, stop_token_ids=STOPS).sample(
        [Prompt(p.tokens, 1, p.key) for p in prompts], sampling, seed=5, step=6
    )
    for other in (alone, backwards, narrow, one):
        assert flat(other) == flat(together)
    assert flat(fewer) == [group[0].tokens for group in together]
    assert len(set(flat(together))) > 20, "samples of one prompt differ"


def test_seed_step_and_key_each_change_the_samples() -> None:
    sampler = TorchSampler(tiny_model(), stop_token_ids=())
    prompt = Prompt((7, 8, 9), 4, "a")

    def run(prompt: Prompt, seed: int, step: int) -> list[tuple[int, ...]]:
        return flat(sampler.sample([prompt], Sampling(max_completion_length=12), seed=seed, step=step))

    base = run(prompt, 0, 0)
    assert run(prompt, 0, 0) == base
    others = [run(prompt, 1, 0), run(prompt, 0, 1), run(Prompt(prompt.tokens, 4, "b"), 0, 0)]
    assert all(other != base for other in others)


def test_completions_end_at_the_first_stop_token_or_at_the_limit() -> None:
    prompts = mixed_prompts(8, n=6)
    found = TorchSampler(tiny_model(), stop_token_ids=STOPS).sample(prompts, Sampling(max_completion_length=9), seed=0, step=0)
    assert [len(group) for group in found] == [6] * 8
    ends = Counter()
    for c in (c for group in found for c in group):
        assert not set(c.tokens[:-1]) & set(STOPS)
        assert c.finished == (c.tokens[-1] in STOPS)
        assert c.finished or len(c.tokens) == 9
        assert 1 <= len(c.tokens) == len(c.logp) <= 9
        ends[c.tokens[-1] if c.finished else "limit"] += 1
    assert set(ends) == {*STOPS, "limit"}
    assert type(found[0][0].tokens[0]) is int
    assert type(found[0][0].logp[0]) is float


def test_a_limit_of_one_token_and_no_stop_tokens() -> None:
    found = TorchSampler(tiny_model(), stop_token_ids=()).sample(
        mixed_prompts(3, n=2), Sampling(max_completion_length=1), seed=0, step=0
    )
    assert all(len(c.tokens) == 1 and not c.finished for group in found for c in group)


def test_no_prompts_no_completions() -> None:
    assert TorchSampler(tiny_model(), stop_token_ids=()).sample([], Sampling(), seed=0, step=0) == []


def test_greedy_prompts_beside_sampled_ones() -> None:
    model = tiny_model()
    sampled, greedy = mixed_prompts(4, n=2), [Prompt(p.tokens, 1, p.key + "g", greedy=True) for p in mixed_prompts(4)]
    sampling = Sampling(temperature=0.8, top_k=9, top_p=0.9, max_completion_length=8)
    found = TorchSampler(model, stop_token_ids=STOPS).sample([*sampled, *greedy], sampling, seed=0, step=0)
    assert flat(found[4:]) == generated(model, greedy, 8, STOPS)
    assert flat(found[:4]) == flat(TorchSampler(model, stop_token_ids=STOPS).sample(sampled, sampling, seed=0, step=0))


class Watched:
    """Counts a decoder's forward passes when sampling: [rows, columns] of each."""

    def __init__(self, sampler: TorchSampler) -> None:
        self.shapes: list[tuple[int, int]] = []
        sampler.model.get_decoder().register_forward_pre_hook(self.see, with_kwargs=True)
        assert sampler.path == "cached"  # which is tried again with the hook
        self.shapes.clear()

    def see(self, module: Any, args: Any, kwargs: Any) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_prompt_is_prefilled_once_for_its_group_texts_are_decoded_once_and_finished_ones_leave(temperature: float) -> None:
    model = tiny_model()
    sampler = TorchSampler(model, stop_token_ids=tuple(range(2, 12)))  # a sixth of the vocabulary ends a row
    watched = Watched(sampler)
    prompts = mixed_prompts(5, n=8)
    found = sampler.sample(prompts, Sampling(temperature=temperature, max_completion_length=30), seed=0, step=0)
    prefills, steps = [s for s in watched.shapes if s[1] > 1], [rows for rows, columns in watched.shapes if columns == 1]
    assert sum(rows for rows, _ in prefills) == 5
    running = [
        len({(i, c.tokens[:t]) for i, group in enumerate(found) for c in group if len(c.tokens) > t}) for t in range(1, 30)
    ]
    running = [r for r in running if r]
    going_on = sum(len(c.tokens) > 1 for group in found for c in group)
    assert temperature == 1.0 or running[0] < 0.7 * going_on, "completions of a prompt begin alike, or this test could not fail"
    assert len(steps) == len(running)
    assert all(r <= rows <= r / decode.COMPACT_BELOW for rows, r in zip(steps, running, strict=True))


def test_waiting_prompts_come_in_when_few_lines_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight prompts four have room at a time: they are run to their end, or replaced as they finish."""
    model = tiny_model()
    prompts = [Prompt((3 + i, 7, 11), 1, f"{i}") for i in range(8)]
    most: dict[int, int] = {}
    found = []
    for enough in (1, 64):
        monkeypatch.setattr(decode, "ENOUGH_LINES", enough)
        sampler = TorchSampler(model, stop_token_ids=tuple(range(2, 12)), token_budget=4 * (3 + 20))
        watched = Watched(sampler)
        found.append(sampler.sample(prompts, Sampling(max_completion_length=20), seed=0, step=0))
        steps = [rows for rows, columns in watched.shapes if columns == 1]
        most[enough] = sum(1 for s in steps if s == 1)
    assert [[c.tokens for c in cs] for cs in found[0]] == [[c.tokens for c in cs] for cs in found[1]]
    assert most[1] > most[64], "batches that run to their end have more steps of a single line"


def test_what_all_prompts_start_with_is_computed_once() -> None:
    model = tiny_model()
    sampler = TorchSampler(model, stop_token_ids=STOPS)
    watched = Watched(sampler)
    prompts = [Prompt((*range(10, 30), 31 + i), 2, f"p{i}") for i in range(6)]
    sampler.sample(prompts, Sampling(max_completion_length=2), seed=0, step=0)
    assert watched.shapes[:2] == [(1, 20), (6, 1)]


@pytest.mark.parametrize("start", [(), (9,)], ids=["all differ", "the first token is the same"])
def test_waiting_rows_replace_finished_ones_within_the_budget(start: tuple[int, ...]) -> None:
    model = tiny_model()
    prompts = [replace(p, tokens=(*start, *p.tokens[len(start) :])) for p in mixed_prompts(30, n=2)]
    sampling = Sampling(max_completion_length=20)
    sampler = TorchSampler(model, stop_token_ids=tuple(range(2, 12)), token_budget=500)
    watched, held = Watched(sampler), []
    merge = decode.merge

    def merge_and_note(*args: Any, **kwargs: Any) -> Any:
        cache = merge(*args, **kwargs)
        held.append(len(cache.keys[0]) * cache.capacity)
        return cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "merge", merge_and_note)
        found = sampler.sample(prompts, sampling, seed=0, step=0)
    assert max(held) <= 500
    longest = max(len(c.tokens) for group in found for c in group)
    batches = 30 * 2 * (24 + 20) / 500
    steps = sum(columns == 1 for _, columns in watched.shapes)
    assert steps < 0.7 * batches * longest, "waiting for each batch's longest row would take more steps"


def test_prefill_pads_little() -> None:
    rng = random.Random(0)
    asks = [decode.Ask((0,) * n, 0, 1) for n in sorted((rng.randint(10, 400) for _ in range(200)), reverse=True)]
    chunks = decode._chunks(asks, shares_start=False)
    assert [a for chunk in chunks for a in chunk] == asks
    padded = sum(len(chunk[0].tokens) * len(chunk) for chunk in chunks)
    assert sum(len(a.tokens) for a in asks) > 0.9 * padded
    assert len(chunks) < 40
    assert max(len(chunk[0].tokens) * len(chunk) for chunk in chunks) <= decode.PREFILL_TOKENS


def test_prompts_that_start_alike_are_prefilled_together() -> None:
    """Two tasks, each with a long start of its own, in turn."""
    asks = [decode.Ask((1, *([2 + i % 2] * 60), *range(10, 14 + i % 3)), i, 1) for i in range(60)]
    chunks = decode._chunks(asks, shares_start=True)
    assert sorted(a.first for chunk in chunks for a in chunk) == list(range(60))
    assert [len(c) for c in chunks] == [30, 30]
    assert [decode._shared(c) for c in chunks] == [64, 64]
    assert sum(decode._forward_tokens(c, True) for c in chunks) == 2 * (64 + 30 * 3)


def test_a_model_in_training_mode_samples_without_dropout_and_is_put_back_module_by_module() -> None:
    model = family("gpt2")  # it has dropout
    prompts = mixed_prompts(4)
    expected = generated(model, prompts, 8, STOPS)
    model.train()
    frozen = model.get_decoder().h[0]
    frozen.eval()
    before = [module.training for module in model.modules()]
    sampler = TorchSampler(model, stop_token_ids=STOPS)
    found = sampler.sample(prompts, Sampling(temperature=0, max_completion_length=8), seed=0, step=0)
    assert sampler.path == "cached"
    assert flat(found) == expected
    assert [module.training for module in model.modules()] == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_how_a_model_is_sampled_from_does_not_depend_on_its_mode_when_asked() -> None:
    assert TorchSampler(family("gpt2").train(), stop_token_ids=STOPS).path == "cached"


def test_sampling_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    TorchSampler(tiny_model(), stop_token_ids=STOPS).sample(mixed_prompts(2), Sampling(max_completion_length=3), seed=0, step=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_lora_on_body_and_head_is_sampled_from() -> None:
    from peft import LoraConfig, get_peft_model

    plain_model, model = family("llama"), family("llama")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.3)
    prompts = mixed_prompts(12)
    sampler = TorchSampler(model, stop_token_ids=STOPS)
    found = sampler.sample(prompts, Sampling(temperature=0, max_completion_length=8), seed=0, step=0)
    assert sampler.path == "cached"
    assert flat(found) == generated(model, prompts, 8, STOPS)
    assert flat(found) != generated(plain_model, prompts, 8, STOPS)
    expected = plain_log_probs(model, prompts[0], found[0][0].tokens)
    assert torch.allclose(torch.tensor(found[0][0].logp, dtype=torch.float64), expected, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_the_cache_and_log_probs_in_fp32(dtype: torch.dtype) -> None:
    model = family("llama", dtype)
    sampler = TorchSampler(model, stop_token_ids=STOPS)
    prompts = mixed_prompts(10, n=3)
    found = sampler.sample(prompts, Sampling(max_completion_length=8), seed=0, step=0)
    assert sampler.path == "cached"
    from crosstrain.head import head_logits

    for prompt, group in zip(prompts, found, strict=True):
        with torch.no_grad():
            hidden = model.get_decoder()(torch.tensor([prompt.tokens])).last_hidden_state[0, -1]
            logp = torch.log_softmax(head_logits(model, hidden), dim=0)
        for c in group:  # the body's rounding moves with the batch, the head adds none
            assert abs(float(logp[c.tokens[0]]) - c.logp[0]) < 0.1


@pytest.mark.parametrize("longest", [4, 640])
def test_bf16_prompts_that_start_alike_may_be_longer_than_short_attention(
    monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    monkeypatch.setattr(attention, "LONGEST", {torch.bfloat16: longest})
    model = family("llama", torch.bfloat16)
    use_short_attention(model)
    start = tuple(range(5, 15))
    prompts = [Prompt((*start, *range(20 + i, 24 + 2 * i)), 2, f"{i}") for i in range(3)]
    sampler = TorchSampler(model, stop_token_ids=STOPS)
    found = sampler.sample(prompts, Sampling(max_completion_length=6), seed=0, step=0)
    assert sampler.path == "cached"
    for prompt, group in zip(prompts, found, strict=True):
        for c in group:
            expected = plain_log_probs(model, prompt, c.tokens)
            assert float((torch.tensor(c.logp, dtype=torch.float64) - expected).abs().max()) < 0.1


def mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()


def test_a_model_without_keys_and_values_takes_the_plain_path_and_says_so() -> None:
    model = mamba()
    sampler = TorchSampler(model, stop_token_ids=STOPS, token_budget=100)
    prompts = mixed_prompts(6, n=2)
    found = sampler.sample(prompts, Sampling(max_completion_length=5), seed=0, step=0)
    assert sampler.path == "plain"
    assert sampler.path_reason
    for prompt, group in zip(prompts, found, strict=True):
        for c in group:
            expected = plain_log_probs(model, prompt, c.tokens)
            assert torch.allclose(torch.tensor(c.logp, dtype=torch.float64), expected, atol=1e-4)


def test_the_plain_path_gives_the_completions_of_the_cached_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    prompts = mixed_prompts(7, n=3)
    sampler = TorchSampler(model, stop_token_ids=STOPS)
    with_cache = sampler.sample(prompts, Sampling(max_completion_length=9), seed=0, step=0)
    assert sampler.path == "cached"
    monkeypatch.setattr(torch_sampler, "_find_path", lambda model: torch_sampler.Found("plain", "forced", True))
    assert sampler.path == "plain"
    assert flat(sampler.sample(prompts, Sampling(max_completion_length=9), seed=0, step=0)) == flat(with_cache)


def test_a_kind_of_layer_the_cache_cannot_serve_is_named() -> None:
    model = tiny_model()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert (
        TorchSampler(model, stop_token_ids=()).path_reason
        == "it has layers of kind chunked_attention, which the cache cannot serve"
    )


def test_logits_changed_in_an_unknown_way_are_taken_from_the_models_own_forward() -> None:
    model = family("llama")
    forward = model.forward

    def halved(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out

    model.forward = halved
    sampler = TorchSampler(model, stop_token_ids=STOPS)
    prompts = mixed_prompts(4)
    found = sampler.sample(prompts, Sampling(max_completion_length=6), seed=0, step=0)
    assert sampler.path == "plain"
    assert "changes logits after the head" in sampler.path_reason
    for prompt, [c] in zip(prompts, found, strict=True):
        expected = plain_log_probs(model, prompt, c.tokens)
        assert torch.allclose(torch.tensor(c.logp, dtype=torch.float64), expected, atol=1e-4)


def test_nan_logits_stop_with_the_prompts_name() -> None:
    model = tiny_model()
    sampler = TorchSampler(model, stop_token_ids=())
    assert sampler.path == "cached"
    with torch.no_grad():
        model.get_input_embeddings().weight[33] = float("nan")
    with pytest.raises(FloatingPointError, match="prompt bad: the model's logits are not finite"):
        sampler.sample([Prompt((7, 33), 1, "bad")], Sampling(max_completion_length=2), seed=0, step=0)


def test_a_broken_model_is_not_blamed_on_a_prompt_that_nobody_gave() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"^the model's logits are not finite.* weights may be damaged"):
        TorchSampler(model, stop_token_ids=()).sample([Prompt((7, 33), 1, "mine")], Sampling(), seed=0, step=0)


def test_running_lines_are_moved_only_for_a_prompt_that_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six completions leave no room for six more until they have ended, however few of them still run."""
    merges: list[int] = []

    def merge_and_note(parts: Any, *args: Any, **more: Any) -> PreallocatedCache:
        merges.append(len(parts))
        return merge(parts, *args, **more)

    merge = decode.merge
    model = tiny_model()
    sampler = TorchSampler(model, stop_token_ids=STOPS, token_budget=1000)
    assert sampler.path == "cached"
    monkeypatch.setattr(decode, "merge", merge_and_note)
    prompts = [Prompt(tuple(7 + (i * k) % 50 for i in range(100)), 6, str(k)) for k in (1, 3)]
    found = sampler.sample(prompts, Sampling(temperature=1.5, max_completion_length=50), seed=1, step=0)
    assert len({len(c.tokens) for c in found[0]}) > 3, "the test needs completions that end one after another"
    assert len(merges) == 2


def test_a_batch_that_has_ended_is_let_go_before_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[PreallocatedCache]] = []
    alive: list[int] = []

    def merge_and_note(*args: Any, **more: Any) -> PreallocatedCache:
        cache = merge(*args, **more)
        made.append(weakref.ref(cache))
        return cache

    def prefill_and_note(*args: Any) -> Any:
        alive.append(sum(cache() is not None for cache in made))
        return prefill(*args)

    merge, prefill = decode.merge, decode._prefill
    sampler = TorchSampler(tiny_model(), stop_token_ids=(), token_budget=50)
    assert sampler.path == "cached"
    monkeypatch.setattr(decode, "merge", merge_and_note)
    monkeypatch.setattr(decode, "_prefill", prefill_and_note)
    sampler.sample(mixed_prompts(6, n=3), Sampling(max_completion_length=4), seed=0, step=0)  # all end together
    assert len(alive) > 2 and not any(alive)


def test_learned_positions_that_would_run_out_are_refused_before_the_start() -> None:
    sampler = TorchSampler(family("gpt2"), stop_token_ids=STOPS)
    prompt = Prompt(tuple(7 + i % 50 for i in range(250)), 3, "long")
    with pytest.raises(UserError, match=r"prompt long: its 250 tokens.* need 257 positions; the model has 256"):
        sampler.sample([prompt], Sampling(max_completion_length=8), seed=0, step=0)
    [group] = sampler.sample([prompt], Sampling(max_completion_length=7), seed=0, step=0)
    assert len(group) == 3


def test_repeated_keys_are_refused() -> None:
    prompts = [Prompt((7,), 1, "a"), Prompt((8,), 1, "a")]
    with pytest.raises(ValueError, match="repeated"):
        TorchSampler(tiny_model(), stop_token_ids=()).sample(prompts, Sampling(), seed=0, step=0)


@pytest.mark.real_model
@pytest.mark.slow
def test_greedy_equals_generate_on_200_prompts_on_the_real_model() -> None:
    from crosstrain.models import load_model

    model, tokenizer = load_model("smollm2-135m-instruct", dtype=torch.float32)
    rng = random.Random(0)
    words = tokenizer.decode(range(1000, 1400)).split()
    prompts = []
    for i in range(200):
        text = " ".join(rng.choices(words, k=rng.randint(1, 40))) + f" {rng.randint(1, 99)} + {rng.randint(1, 99)} ="
        prompts.append(Prompt(tuple(tokenizer(text)["input_ids"]), 1, str(i)))
    stops = (tokenizer.eos_token_id,)
    sampler = TorchSampler(model, stop_token_ids=stops)
    found = sampler.sample(prompts, Sampling(temperature=0, max_completion_length=16), seed=0, step=0)
    assert sampler.path == "cached"
    assert flat(found) == generated(model, prompts, 16, stops)
