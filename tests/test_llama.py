"""Models written out against their own code, and when they are not taken."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from crosstrain.attention import use_short_attention
from crosstrain.llama import extend, hidden_states
from crosstrain.one_token import extend_one
from crosstrain.rollout.cache import PreallocatedCache
from crosstrain.served import why_not, written_out
from crosstrain.training.optimizer import Optimizer, cast_parameters
from tensors import equal

SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "gemma": {"head_dim": 12},
}


def make(kind: str, **more: Any) -> Any:
    """A tiny model of a kind with random weights, norms and biases among them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        **{**SERVED.get(kind, {}), **more},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("kind", SERVED)
def test_hidden_states_and_gradients_are_the_models_own(kind: str, short: bool) -> None:
    model = make(kind).double()
    if short:
        use_short_attention(model)
    decoder, ids = model.get_decoder(), torch.randint(0, 50, (3, 7))
    expected = decoder(input_ids=ids, use_cache=False).last_hidden_state
    llama = written_out(model)
    assert llama is not None and why_not(model) == ""
    parameters = list(decoder.parameters())
    g = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, parameters, g)
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    for given in (None, mask.expand(3, 1, 7, 7)):
        found = hidden_states(llama, ids, torch.arange(7)[None], given)
        # transformers computes norms and angles in fp32 whatever the model's dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
        for one, other in zip(torch.autograd.grad(found, parameters, g), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("one", [extend, extend_one])  # a card runs single columns as any others
def test_columns_added_to_a_cache_get_the_models_own_hidden_states(kind: str, one: Any) -> None:
    model = make(kind)
    llama = written_out(model)
    assert llama is not None
    prompts = [[3, 5, 7, 9], [11, 13]]  # the second with two unused columns on its left
    tokens = torch.tensor([[3, 5, 7, 9], [0, 0, 11, 13]])
    real = torch.tensor([[True] * 4, [False, False, True, True]])
    cache = PreallocatedCache(torch.cat([real, torch.ones(2, 3, dtype=torch.bool)], dim=1))
    positions = (real.cumsum(1) - 1).clamp(min=0)
    states = [extend(llama, tokens, positions, cache)]
    # as the sampler does: room for what follows
    for tensors in (cache.keys, cache.values):
        for i, t in enumerate(tensors):
            tensors[i] = torch.cat([t, t.new_zeros(2, t.shape[1], 3, t.shape[3])], dim=2)
    more = torch.tensor([[21, 22, 23], [24, 25, 26]])
    states += [extend(llama, more[:, :2], torch.tensor([[4, 5], [2, 3]]), cache)]
    states += [one(llama, more[:, 2:], torch.tensor([[6], [4]]), cache)]
    for row, prompt in enumerate(prompts):
        whole = torch.tensor([[*prompt, *more[row].tolist()]])
        expected = model.get_decoder()(input_ids=whole, use_cache=False).last_hidden_state[0]
        found = torch.stack([s[row] for s in states])
        n = len(prompt)
        torch.testing.assert_close(found, expected[[n - 1, n + 1, n + 2]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SERVED)
def test_a_single_line_gets_what_it_gets_among_others(kind: str) -> None:
    """A single column has products of its own."""
    model = make(kind)
    llama = written_out(model)
    assert llama is not None
    tokens, positions = torch.tensor([[3, 5, 7]]), torch.arange(3)[None]
    caches = [PreallocatedCache(torch.ones(n, 5, dtype=torch.bool)) for n in (1, 2)]
    found = []
    for cache in caches:
        n = cache.lines
        extend(llama, tokens.expand(n, 3), positions.expand(n, 3), cache)
        for tensors in (cache.keys, cache.values):
            tensors[:] = [torch.cat([t, t.new_zeros(n, t.shape[1], 2, t.shape[3])], dim=2) for t in tensors]
        found.append([extend_one(llama, torch.full((n, 1), 9 + i), torch.full((n, 1), 3 + i), cache)[0] for i in (0, 1)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_weights_stay_the_models_parameters() -> None:
    model = make("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.tensor([[1, 2, 3]])
    llama = written_out(model)
    assert llama is not None
    assert equal(dict(model.named_parameters()), before)
    optimizer = Optimizer(model, "fp32")
    optimizer.begin()
    hidden_states(llama, ids, torch.arange(3)[None], None).square().sum().backward()
    optimizer.step(1e-2)
    again = written_out(model)
    assert again is not None and again.layers[0].qkv is llama.layers[0].qkv  # the same memory, with the step in it
    expected = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden_states(again, ids, torch.arange(3)[None], None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("move", [lambda m: cast_parameters(m, torch.float64), copy.deepcopy, lambda m: m.double()])
def test_weights_that_were_moved_are_fused_again(move: Any) -> None:
    model = make("qwen2")
    assert written_out(model) is not None
    moved = move(model) or model
    llama = written_out(moved)
    assert llama is not None
    layer = moved.get_decoder().layers[1]
    assert llama.layers[1].qkv.dtype == layer.self_attn.q_proj.weight.dtype
    layer.self_attn.k_proj.weight.data.zero_()
    first = layer.self_attn.q_proj.out_features
    assert not llama.layers[1].qkv[first : first + layer.self_attn.k_proj.out_features].any()


def test_a_model_is_saved_and_loaded_as_any_other(tmp_path: Path) -> None:
    model = make("llama")
    assert written_out(model) is not None
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert equal(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": False}])
def test_no_weight_of_a_served_model_keeps_its_file_in_memory(tmp_path: Path, more: dict[str, Any]) -> None:
    make("llama", **more).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    # what transformers maps from a file cannot be resized
    assert not any(p.untyped_storage().resizable() for p in model.parameters()), "the test needs weights in a file"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert written_out(model) is not None
    assert equal(dict(model.named_parameters()), before)
    assert all(p.untyped_storage().resizable() for p in model.parameters())


def test_what_is_not_written_out_is_named() -> None:
    assert "gpt2" in why_not(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2)))
    assert "local attention" in why_not(make("mistral", sliding_window=4))
    assert "biases" in why_not(make("llama", mlp_bias=True))
    eager = make("llama")
    eager.set_attn_implementation("eager")
    assert "eager" in why_not(eager)
    adapted = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"]))
    assert written_out(adapted) is None and why_not(adapted)
    hooked = make("llama")
    assert written_out(hooked) is not None
    hooked.get_decoder().layers[0].register_forward_hook(lambda *_: None)
    assert "hooks" in why_not(hooked)
    patched = make("llama")
    patched.get_decoder().layers[0].input_layernorm.forward = lambda x: 2 * x
    assert "forward of its own" in why_not(patched)
    checkpointed = make("llama")
    checkpointed.gradient_checkpointing_enable()
    assert why_not(checkpointed.train())


def test_a_model_that_computes_something_else_is_found_by_trying() -> None:
    model = make("llama")
    model.get_decoder().layers[0].mlp.act_fn = torch.nn.ReLU()
    assert "otherwise" in why_not(model)
    assert written_out(model) is None
