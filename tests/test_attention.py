"""short_attention against torch's fused attention, alone and inside models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from crosstrain import attention
from crosstrain.attention import NAME, short_attention, use_short_attention


def tensors(rows: int, heads: int, keys: int, length: int, columns: int, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, length, 8), (rows, keys, columns, 8), (rows, keys, columns, 8)]
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


@given(
    rows=st.integers(1, 3),
    shared=st.integers(1, 3),
    keys=st.integers(1, 2),
    length=st.integers(1, 6),
    past=st.integers(0, 4),
    masked=st.booleans(),
    block=st.integers(1, 7),
    memory=st.sampled_from(
        [1, 50, attention.BLOCK_SCORES]
    ),  # the last keeps weights for backward, the others compute them again
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_the_fused_kernel(
    rows: int, shared: int, keys: int, length: int, past: int, masked: bool, block: int, memory: int, seed: int
) -> None:
    columns = length + past if masked or length == 1 else length
    q, k, v = tensors(rows, shared * keys, keys, length, columns, seed)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=shared)
    mask = None
    if masked:
        mask = torch.rand(rows, 1, length, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
        mask[..., 0] = True  # what sees nothing is tested by itself
    expected, _ = sdpa_attention_forward(module, q, k, v, mask)
    g = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERIES", block)
        patch.setattr(attention, "PAIRS", 0)
        patch.setattr(attention, "BLOCK_SCORES", memory)
        found, _ = short_attention(module, q, k, v, mask)
        gradients = torch.autograd.grad(found, (q, k, v), g)
        with torch.no_grad():
            without, _ = short_attention(module, q, k, v, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(without, expected, rtol=0, atol=1e-12)
    for one, other in zip(gradients, torch.autograd.grad(expected, (q, k, v), g), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_in_bf16_the_gradient_of_a_sharp_weight_is_not_lost() -> None:
    """Weights of 0.999 and 0.001: in bf16 the first is 1, and a softmax's backward with it would be 0."""
    gap = 6.9078  # log(0.999 / 0.001)
    exact = [
        torch.tensor(x, dtype=torch.float64).requires_grad_() for x in ([[[[1.0]]]], [[[[gap], [0.0]]]], [[[[1.0], [0.0]]]])
    ]
    rounded = [t.detach().bfloat16().requires_grad_() for t in exact]
    mask = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    of_query = []
    for q, k, v in (exact, rounded):
        found = attention.attend(q, k, v, attention.blocks(mask, 1, q.dtype), 1.0)
        of_query.append(float(torch.autograd.grad(found.sum(), q)[0]))
    assert of_query[1] == pytest.approx(of_query[0], rel=0.05)


def test_values_may_have_another_size_and_masks_may_be_the_same_for_all_queries() -> None:
    q, k, v = tensors(2, 4, 2, 3, 3, 0)
    v = torch.cat([v, v[..., :3]], dim=3)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    mask = torch.tensor([True, True, False]).expand(2, 1, 1, 3)
    expected, _ = sdpa_attention_forward(module, q, k, v, mask)
    torch.testing.assert_close(short_attention(module, q, k, v, mask)[0], expected, rtol=0, atol=1e-12)


def test_a_row_that_sees_nothing_is_finite() -> None:
    q, k, v = tensors(1, 2, 1, 2, 2, 0)
    mask = torch.tensor([[[[False, False], [True, True]]]])
    found, _ = short_attention(SimpleNamespace(is_causal=True, num_key_value_groups=2), q, k, v, mask)
    assert torch.isfinite(found).all()


def test_long_rows_without_a_mask_and_unknown_requests_go_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fused(*args: Any, **kwargs: Any) -> tuple[str, None]:
        asked.append(kwargs)
        return "fused", None

    monkeypatch.setattr(attention, "sdpa_attention_forward", fused)
    monkeypatch.setattr(attention, "LONGEST_WIDE", 4)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    short, long, one = (tensors(1, 1, 1, n, m, 0) for n, m in ((4, 4), (5, 5), (1, 9)))
    assert short_attention(module, *long, None)[0] == "fused"
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    assert isinstance(short_attention(module, *long, mask)[0], torch.Tensor)  # the kernel computes what a mask hides
    assert (
        short_attention(module, *(t.bfloat16() for t in tensors(1, 1, 1, 641, 641, 0)), mask.new_ones(1, 1, 641, 641))[0]
        == "fused"
    )
    assert short_attention(module, *(t.to("meta") for t in short), None)[0] == "fused"  # not on a processor
    assert short_attention(module, *short, None, dropout=0.1)[0] == "fused"
    assert asked[-1]["dropout"] == 0.1
    with pytest.raises(ValueError, match="softcap"):
        monkeypatch.undo()
        short_attention(module, *short, None, softcap=30.0)
    assert isinstance(short_attention(module, *one, None)[0], torch.Tensor)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt2", "gpt_neox"])
def test_models_give_the_same_logits_with_it(kind: str) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3, "pad_token_id": 0, "n_embd": 32, "n_head": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    ids = torch.randint(1, 64, (3, 7))
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    real = padding.bool()
    with torch.no_grad():
        expected = [model(ids).logits, model(ids, attention_mask=padding).logits[real]]
        use_short_attention(model)
        assert model.config._attn_implementation == NAME
        found = [model(ids).logits, model(ids, attention_mask=padding).logits[real]]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_kind_of_model_that_is_not_known_keeps_its_attention() -> None:
    """Some tell their attention which keys to take, and do so by its name."""
    config = AutoConfig.for_model("opt", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=48)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    use_short_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_saved_model_does_not_ask_for_it(tmp_path: Any) -> None:
    """Whoever loads the folder without crosstrain must not be asked for an attention that only crosstrain knows."""
    from crosstrain.testing import tiny_model

    model = tiny_model(vocab_size=37)
    use_short_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_a_model_that_asks_for_its_own_attention_keeps_it() -> None:
    from crosstrain.testing import tiny_model

    model = tiny_model(vocab_size=37)
    model.set_attn_implementation("eager")
    use_short_attention(model)
    assert model.config._attn_implementation == "eager"
