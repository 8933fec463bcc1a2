"""The head in fp32, and the check that nothing else happens to logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crosstrain.errors import UserError
from crosstrain.head import check_head, evaluation_mode, head_logits, head_parameters
from crosstrain.testing import tiny_model

SHAPE = {
    "vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 0.5, "attn_implementation": "eager"},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "phi": {},  # its head has a bias
}


def family(name: str, **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**FAMILIES.get(name, {}), **more}
    attention = settings.pop("attn_implementation", "sdpa")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SHAPE, **settings), attn_implementation=attention)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_logits_are_those_of_the_models_own_forward(name: str) -> None:
    model = family(name)
    check_head(model)
    ids = torch.arange(7)[None]
    expected = model(ids).logits
    found = head_logits(model, model.get_decoder()(ids).last_hidden_state)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(head_logits(model, model.get_decoder()(ids).last_hidden_state, head_parameters(model)), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_logits_are_at_least_fp32_and_the_product_is_not_rounded_to_the_models_precision(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    check_head(model)
    hidden = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = head_logits(model, hidden)
    exact = hidden.double() @ model.get_output_embeddings().weight.double().T
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_hidden_states_and_the_head() -> None:
    model = family("gemma2")
    hidden = torch.randn(3, 16, requires_grad=True)
    weight = model.get_output_embeddings().weight
    given = torch.autograd.grad(head_logits(model, hidden).pow(2).sum(), [hidden, weight])
    cap = 0.5
    own = torch.autograd.grad((torch.tanh(hidden @ weight.T / cap) * cap).pow(2).sum(), [hidden, weight])
    assert all(torch.allclose(g, o, atol=1e-5) and g.abs().max() > 0 for g, o in zip(given, own, strict=True))


def test_lora_on_the_head_counts_and_gets_a_gradient() -> None:
    from peft import LoraConfig, get_peft_model

    base = family("llama")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    head = model.get_output_embeddings()
    torch.nn.init.normal_(head.lora_B["default"].weight)
    check_head(model)
    ids = torch.arange(4)[None]
    found = head_logits(model, model.get_decoder()(ids).last_hidden_state)
    assert torch.allclose(found, model(ids).logits, atol=1e-5)
    found.pow(2).sum().backward()
    assert head.lora_B["default"].weight.grad.abs().max() > 0


def test_a_trained_copy_of_the_head_is_the_one_that_is_used() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        family("llama"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(2.0)
    ids = torch.arange(4)[None]
    assert torch.allclose(head_logits(model, model.get_decoder()(ids).last_hidden_state), model(ids).logits, atol=1e-5)


class Changed(torch.nn.Module):
    """A model whose forward does something to its logits or hidden states."""

    def __init__(self, model: Any, before: float = 1.0, cap: float | None = None) -> None:
        super().__init__()
        self.model, self.before, self.cap = model, before, cap
        self.config = model.config

    def get_decoder(self) -> Any:
        return self.model.get_decoder()

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(self, input_ids: Any, use_cache: bool) -> Any:
        out = self.model.get_decoder()(input_ids=input_ids, use_cache=use_cache)
        logits = self.model.get_output_embeddings()(out.last_hidden_state * self.before)
        out.logits = logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
        return out


def test_an_unknown_soft_cap_is_found_even_where_the_models_own_logits_are_too_small_to_show_it() -> None:
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-4)
    check_head(Changed(model))
    with pytest.raises(UserError, match="changes logits after the head"):
        check_head(Changed(model, cap=30.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_before_or_a_cap_after_the_head_is_found_in_any_precision(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    with pytest.raises(UserError, match="does not read the decoder's last hidden states as they are"):
        check_head(Changed(model, before=0.5))
    with pytest.raises(UserError, match="changes logits after the head"):
        check_head(Changed(model, cap=20.0))


def test_a_model_without_a_head_is_refused() -> None:
    model = tiny_model()
    model.get_output_embeddings = lambda: None
    with pytest.raises(UserError, match="no output embeddings"):
        check_head(model)


def test_evaluation_mode_puts_every_module_back_also_after_an_error() -> None:
    model = tiny_model().train()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_bf16_products_leave_torchs_switch_as_it_was() -> None:
    from crosstrain.head import bf16_products

    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with pytest.raises(KeyError), bf16_products():
        assert matmul.fp32_precision == "bf16"
        raise KeyError
    assert matmul.fp32_precision == before == "none"
