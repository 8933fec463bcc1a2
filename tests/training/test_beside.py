"""Another distribution beside the policy's: the right logits at the right tokens, whatever the layout, cut and prompt."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crosstrain.assemble import make_reference
from crosstrain.errors import UserError
from crosstrain.objective.divergences import generalised_jsd, reverse_kl
from crosstrain.objective.terms import by, of_channel
from crosstrain.testing import made_up_other, tiny_model
from crosstrain.training import score as score_module
from crosstrain.training.batching import to_batch
from crosstrain.training.beside import beside, beside_cost, in_context, sampling_cost
from crosstrain.training.collect import Usage
from crosstrain.training.engine import Engine, Teacher
from crosstrain.training.score import score
from crosstrain.types import Batch, Comparison, Example, Group, Method, Per, Source, Trajectory, Weights

HINT = "{prompt}{privileged_context}"
PROMPT = (5, 9, 11)


def row(answer: tuple[int, ...], context: tuple[int, ...], prompt: tuple[int, ...] = PROMPT) -> Trajectory:
    source = (Source.PROMPT,) * len(prompt) + (Source.POLICY,) * len(answer)
    return Trajectory(prompt + answer, source, contexts={HINT: context})


def batch_of(*groups: tuple[Trajectory, ...]) -> Batch:
    return to_batch([Group(Example(f"train:{i}", "", PROMPT), ts) for i, ts in enumerate(groups)])


def mixed() -> Batch:
    """Two examples of one prompt and of answers that start alike, with other demonstrations; one with a turn of somebody else."""
    turns = Trajectory(
        (8, 7, 20, 21, 22, 23),
        (Source.PROMPT, Source.POLICY, Source.POLICY, Source.PROMPT, Source.TOOL, Source.POLICY),
        contexts={HINT: (30,)},
    )
    return batch_of(
        (row((7, 8, 13), (40, 41, 5)), row((7, 8), (40, 41, 5))),
        (row((7, 8, 13, 2), (50, 5)), row((7, 30), (50, 5))),
        (turns,),
    )


def method_of(*comparisons: tuple[str, Comparison]) -> Method:
    terms = tuple(
        of_channel(name, name, on=by(Source.POLICY, Source.TOOL), per=Per(("own_tokens",))) for name, _ in comparisons
    )
    return Method(terms=terms, comparisons=dict(comparisons), name="made up")


def engine_of(model: Any, layout: Any = "plain", **more: Any) -> Engine:
    other = made_up_other(model, 7)
    return Engine(
        model=model,
        parameters=10,
        layout=layout,
        device=torch.device("cpu"),
        streams={},
        reference=lambda: nullcontext(made_up_other(model, 8)),
        teacher=Teacher(lambda: nullcontext(other), 1000, layout),
        **more,
    )


def by_row(model: Any, other: Any, batch: Batch, context: str, temperature: float, beta: float) -> Tensor:
    """Every row alone through both models' own forward; [B, T]."""
    found = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    for r in range(len(batch)):
        n = int(batch.length[r])
        tokens = batch.tokens[r, :n].tolist()
        start = int(torch.nonzero(batch.source[r] != 0)[0])
        prompt = list(batch.contexts[context][r]) if context else tokens[:start]
        own = model(torch.tensor([tokens])).logits[0] / temperature
        theirs = other(torch.tensor([prompt + tokens[start:]])).logits[0].detach() / temperature
        for t in range(start, n):
            if bool(batch.trained[r, t]):
                at = len(prompt) + t - start - 1
                found[r, t] = generalised_jsd(beta)(own[t - 1 : t], theirs[at : at + 1], torch.tensor([tokens[t]]))[0]
    return found


def gradients(model: Any, values: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (values * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunk", [2, 512])
@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize(("of", "context"), [("teacher", ""), ("current", HINT), ("reference", HINT), ("teacher", HINT)])
def test_it_is_what_both_models_own_forwards_give(
    of: Weights, context: str, layout: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradient, also where equal predictions of two rows stand beside different distributions."""
    monkeypatch.setattr(score_module, "CHUNK", chunk)
    model, batch = tiny_model(), mixed()
    engine = engine_of(model, layout)
    method = method_of(("d", Comparison(generalised_jsd(0.3), of=of, context=context)))
    others = beside(engine, method, batch)
    found = score(model, batch, beside=others, layout=layout, temperature=0.8)
    other = {"teacher": made_up_other(model, 7), "reference": made_up_other(model, 8), "current": model}[of]
    expected = by_row(model, other, batch, context, 0.8, 0.3)
    assert float(expected.detach().abs().max()) > 1e-3
    torch.testing.assert_close(found.channels["d"], expected, rtol=0, atol=1e-11)
    plain = score(model, batch, layout="plain", temperature=0.8).logp
    torch.testing.assert_close(found.logp, plain, rtol=0, atol=1e-11)
    one, two = gradients(model, found.channels["d"]), gradients(model, expected)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_two_measures_of_one_distribution_share_its_pass_and_have_temperatures_of_their_own() -> None:
    model, batch = tiny_model(), mixed()
    both = method_of(
        ("a", Comparison(reverse_kl, of="teacher")),
        ("b", Comparison(reverse_kl, of="teacher", temperature=2.0)),
    )
    [one] = beside(engine_of(model), both, batch)
    found = score(model, batch, beside=[one], layout="plain", temperature=0.5).channels
    teacher = made_up_other(model, 7)
    for name, temperature in (("a", 0.5), ("b", 2.0)):
        expected = by_row(model, teacher, batch, "", temperature, 1.0)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-11)


def test_logits_never_exist_for_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, of the policy and of the other."""
    monkeypatch.setattr(score_module, "CHUNK", 3)
    sizes: list[int] = []
    plain = score_module.head_logits

    def watched(model: Any, hidden: Tensor, *more: Any) -> Tensor:
        sizes.append(len(hidden))
        return plain(model, hidden, *more)

    monkeypatch.setattr(score_module, "head_logits", watched)
    monkeypatch.setattr("crosstrain.training.beside.head_logits", watched)
    model, batch = tiny_model(), mixed()
    others = beside(engine_of(model), method_of(("d", Comparison(reverse_kl, of="teacher"))), batch)
    found = score(model, batch, beside=others, layout="plain")
    forward = len(sizes)
    found.channels["d"].sum().backward()
    assert max(sizes) == 3 and len(sizes) == 2 * forward, "each chunk once, and once more in backward"
    assert forward == 2 * -(-int(batch.trained.sum()) // 3)


def test_the_other_has_no_dropout_and_the_policy_keeps_its_mode() -> None:
    """With the policy's own weights and prompt, in training: the other is what the model is without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64)).double().train()
    batch = mixed()
    method = method_of(("d", Comparison(reverse_kl, of="current")))
    [other] = beside(replace(engine_of(tiny_model()), model=model), method, batch)
    assert model.training
    still = score_module.trained_states(model.eval(), batch, "plain")
    torch.testing.assert_close(other.hidden, still, rtol=0, atol=0)


def test_a_lora_models_reference_is_itself_without_the_adapter_also_in_the_head() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_model()
    frozen = tiny_model()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    batch = mixed()
    engine = replace(engine_of(tiny_model()), model=model, reference=make_reference(model, True))
    others = beside(engine, method_of(("d", Comparison(reverse_kl, of="reference", context=HINT))), batch)
    found = score(model, batch, beside=others, layout="plain").channels["d"]
    expected = by_row(model, frozen, batch, HINT, 1.0, 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    trained = [p for p in model.parameters() if p.requires_grad]
    one = torch.autograd.grad(found.sum(), trained)
    two = torch.autograd.grad(expected.sum(), trained)
    assert max(float(g.abs().max()) for g in one) > 1e-4
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_another_prompt_before_the_same_response() -> None:
    batch = in_context(mixed(), HINT)
    assert batch.tokens[0, :6].tolist() == [40, 41, 5, 7, 8, 13] and batch.length.tolist() == [6, 5, 6, 4, 6]
    assert batch.trained.sum(dim=1).tolist() == mixed().trained.sum(dim=1).tolist()
    assert batch.tokens[4].tolist() == [30, 7, 20, 21, 22, 23] and batch.trained[4].int().tolist() == [0, 1, 1, 0, 1, 1]
    assert batch.prompt_length.tolist() == [3, 3, 2, 2, 1]
    assert in_context(mixed(), "").tokens.equal(mixed().tokens)
    lacking = batch_of((Trajectory((*PROMPT, 7), (Source.PROMPT,) * 3 + (Source.POLICY,)),))
    with pytest.raises(UserError, match="train:0: the row has no demonstration"):
        in_context(lacking, HINT)


def test_what_it_costs() -> None:
    """Tokens of each row once, a prompt that a group shares once: 3 + 2 + 2 and so on; a teacher's FLOPs by its own parameters."""
    engine, batch = engine_of(tiny_model()), mixed()
    plain, hinted = 3 + 3 + 2 + 3 + 4 + 2 + 6, 3 + 3 + 2 + 2 + 4 + 2 + 6
    teacher = method_of(("d", Comparison(reverse_kl, of="teacher")), ("e", Comparison(generalised_jsd(0.5), of="teacher")))
    cost = beside_cost(engine, teacher, batch)
    assert (cost.processed_tokens, cost.flops) == (plain, 2.0 * 1000 * plain)
    itself = beside_cost(engine, method_of(("d", Comparison(reverse_kl, of="current", context=HINT))), batch)
    assert (itself.processed_tokens, itself.flops) == (hinted, 2.0 * 10 * hinted)
    wrote = sampling_cost(engine, Usage(3, 4, teacher_prefill_tokens=5, teacher_generated_tokens=6))
    assert (wrote.processed_tokens, wrote.generated_tokens, wrote.flops) == (18, 10, 2.0 * (10 * 7 + 1000 * 11))


def test_a_model_that_is_not_there_is_said_to_be_missing() -> None:
    engine = replace(engine_of(tiny_model()), teacher=None, reference=None)
    for of, message in (("teacher", "the recipe names none"), ("reference", "none was set up")):
        with pytest.raises(UserError, match=message):
            beside(engine, method_of(("d", Comparison(reverse_kl, of=of))), mixed())
