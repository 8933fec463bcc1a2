"""What a CUDA device computes against a processor. `CROSSTRAIN_TEST_DEVICE=cuda` runs whole recipes there, see test_run.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crosstrain.head import fp32_product, head_logits
from crosstrain.methods import METHODS, load_method
from crosstrain.rollout.sampler import Completion, Prompt, Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.served import why_not
from crosstrain.testing import check_method, gradient, made_up_batch, tiny_model
from crosstrain.training.optimizer import Optimizer
from crosstrain.training.score import choose_layout, score
from crosstrain.training.token_logp import token_logp
from test_llama import SERVED, make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

CLOSE = 1e-7
"""In fp64: transformers' rotary angles are fp32 in any model, and devices differ in the last digits of an angle's cosine."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(name: str) -> None:
    check_method(load_method(name), "cuda")


@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_log_probs_and_gradients_are_those_of_a_processor(layout: Any) -> None:
    model, there = tiny_model(), tiny_model().cuda()
    method = load_method("grpo")
    batch = made_up_batch(method, model)
    found = score(there, batch.to("cuda"), layout=layout, watch=True)
    expected = score(model, batch, layout=layout, watch=True)
    torch.testing.assert_close(found.logp.cpu(), expected.logp, rtol=0, atol=CLOSE)
    for name, values in expected.channels.items():
        torch.testing.assert_close(found.channels[name].cpu(), values, rtol=0, atol=CLOSE)
    wanted = gradient(method, model, batch, layout=layout)
    for name, g in gradient(method, there, batch.to("cuda"), layout=layout).items():
        torch.testing.assert_close(g.cpu(), wanted[name], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_served_kinds_are_written_out_packed_and_sampled_with_a_cache(kind: str, dtype: torch.dtype) -> None:
    model = make(kind).to("cuda", dtype)
    assert why_not(model) == ""
    assert choose_layout(model) == "shared"
    sampler = TorchSampler(model, stop_token_ids=())
    assert (sampler.path, sampler.path_reason) == ("cached", "")


def test_tokens_and_their_log_probs_are_those_of_a_processor() -> None:
    def sample(model: Any) -> list[list[Completion]]:
        prompts = [Prompt((3, 5, 7, 9), 3, "a"), Prompt((3, 5), 2, "b"), Prompt((11, 13, 17), 1, "c", greedy=True)]
        return TorchSampler(model, stop_token_ids=(2,), token_budget=60).sample(
            prompts, Sampling(max_completion_length=12), seed=0, step=0
        )

    here, there = sample(tiny_model()), sample(tiny_model().cuda())
    assert [[c.tokens for c in cs] for cs in here] == [[c.tokens for c in cs] for cs in there]
    for one, other in zip((c for cs in here for c in cs), (c for cs in there for c in cs), strict=True):
        assert one.logp == pytest.approx(other.logp, abs=CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_heads_sums_are_not_rounded_to_the_models_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 512, generator=generator).to("cuda", dtype) for n in (40, 3000))
    exact = hidden.double() @ weight.double().T
    memory = torch.full((64, 3000), torch.nan, device="cuda")
    for found in (fp32_product(hidden, weight), fp32_product(hidden, weight, memory), memory[:40]):
        assert found.dtype == torch.float32
        assert float((found - exact).abs().max()) < 1e-3 < float((exact.to(dtype) - exact).abs().max())
    targets = torch.randint(3000, (40,), generator=generator).cuda()
    logp = torch.log_softmax(exact, dim=1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(token_logp(hidden, weight, targets).logp.double(), logp, rtol=0, atol=1e-3)


def test_logits_of_a_half_precision_model_are_its_own_in_fp32() -> None:
    model = tiny_model(dtype=torch.bfloat16).cuda()
    hidden = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    weight = model.get_output_embeddings().weight
    expected = hidden.double() @ weight.double().T
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = head_logits(model, hidden)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sampled_log_probs_of_a_half_precision_model_are_in_fp32(dtype: torch.dtype) -> None:
    """The first token's: after the prompt's hidden state comes the head alone. Rounded logits would be off by 0.01 and more."""
    model = make("llama").to("cuda", dtype)
    for p in model.get_output_embeddings().parameters():
        p.data.mul_(30)
    prompts = [Prompt((3, 5, 7, 9), 4, "a")]
    [found] = TorchSampler(model, stop_token_ids=()).sample(prompts, Sampling(max_completion_length=1), seed=0, step=0)
    with torch.no_grad():
        hidden = model.get_decoder()(torch.tensor([prompts[0].tokens], device="cuda")).last_hidden_state[0, -1]
        exact = torch.log_softmax(hidden.double() @ model.get_output_embeddings().weight.double().T, dim=0)
    assert [c.logp[0] for c in found] == pytest.approx([float(exact[c.tokens[0]]) for c in found], abs=5e-3)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_gradient_checkpointing_computes_the_same_attention_again(precision: torch.dtype) -> None:
    """In bf16 cuDNN's attention would be taken in backward, which keeps other tensors."""
    method = load_method("sft")
    plain, other = (make("llama").to("cuda", precision).train() for _ in range(2))
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = made_up_batch(method, plain)
    wanted = gradient(method, plain, batch)
    for name, g in gradient(method, other, batch).items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(g, wanted[name], rtol=0, atol=(0.1 if precision == torch.bfloat16 else 1e-4) * scale)


def test_masters_move_by_less_than_bf16_can_show() -> None:
    model = tiny_model(dtype=torch.float32).cuda()
    optimizer = Optimizer(model, "mixed")
    before = {name: w.clone() for name, w in optimizer.weights().items()}
    for p in model.parameters():
        p.sum().backward()
    optimizer.clip(0.0)
    optimizer.step(1e-6)
    for name, w in optimizer.weights().items():
        moved = (w - before[name]).abs()
        assert float(moved.max()) == pytest.approx(1e-6, rel=0.2) and float(moved.min()) > 5e-7, name
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
