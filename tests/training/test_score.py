"""`score` equals the model's own logits, whatever the architecture, the layout, the chunks or the attention."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from crosstrain.testing import tiny_model
from crosstrain.training import score as score_module
from crosstrain.training.batching import to_batch
from crosstrain.training.score import CHANNELS, choose_layout, score, trajectory_logps
from crosstrain.types import Batch, Example, Group, Source, Trajectory

LETTERS = {"P": Source.PROMPT, "E": Source.EXPERT, "O": Source.POLICY, "T": Source.TOOL}
V = 53
TINY = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**TINY, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}


def build(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A random model of an architecture, by the name of its transformers classes."""
    import transformers

    sizes: dict[str, Any] = {"head_dim": 4} if name in ("Qwen3", "Gemma", "Gemma2") else {}
    if name == "GPT2":
        config = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=128, **settings)
        model = "GPT2LMHeadModel"
    else:
        config = getattr(transformers, f"{name}Config")(**{**GROUPED, **sizes, **settings})
        model = f"{name}ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = getattr(transformers, model)(config)
        with torch.no_grad():
            for p in made.parameters():
                if p.ndim >= 2:
                    p.mul_(4.0)
    return made.to(dtype).eval()


def trajectory(prompt: tuple[int, ...], response: str, seed: int) -> Trajectory:
    tokens = torch.randint(1, V, (len(response),), generator=torch.Generator().manual_seed(seed)).tolist()
    return Trajectory((*prompt, *tokens), (Source.PROMPT,) * len(prompt) + tuple(LETTERS[x] for x in response))


def mixed() -> Batch:
    """Groups of three, one and two rows, of one and of several turns; one pair whose prompts part in the middle."""
    a, b, c = (3, 9, 14, 7), (21, 8), (30, 31, 32, 33, 34)
    groups = [
        Group(Example("a", "", a), tuple(trajectory(a, r, i) for i, r in enumerate(("OOO", "O", "OOPOTTO")))),
        Group(Example("b", "", b), (trajectory(b, "EPPEE", 4),)),
        Group(Example("c", "", c), (trajectory(c, "EE", 5), trajectory((*c[:3], 40, 41), "EEEE", 6))),
    ]
    return to_batch(groups)


def from_logits(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Every row alone through the model's own forward: log-softmax of its logits, picked at the next token."""
    rows = []
    for r in range(len(batch)):
        ids = batch.tokens[r, : int(batch.length[r])]
        logits = model(ids[None]).logits[0]
        logp = (logits if logits.dtype == torch.float64 else logits.float()).div(temperature).log_softmax(-1)
        picked = logp[:-1].gather(1, ids[1:, None])[:, 0]
        rows.append(nn.functional.pad(picked, (1, batch.tokens.shape[1] - len(ids))))
    return torch.where(batch.trained, torch.stack(rows), 0.0)


def gradients(model: Any, logp: Tensor) -> dict[str, Tensor]:
    """The gradient of a fixed random mixture of the log-probs."""
    model.zero_grad(set_to_none=True)
    weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(0)).to(logp.dtype)
    (logp * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        scale = max(1.0, float(other[name].abs().max()))
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


SHARED_PROMPTS = ["Llama", "Qwen2", "Qwen3", "Gemma", "GPT2"]


@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize("name", SHARED_PROMPTS)
def test_equals_the_models_own_logits_and_their_gradient(name: str, layout: Any) -> None:
    model, batch = build(name), mixed()
    found, expected = score(model, batch, layout=layout).logp, from_logits(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert found.dtype == torch.float32
    assert float(found.detach()[~batch.trained].abs().max()) == 0
    assert_same(gradients(model, found), gradients(model, expected), 2e-5)


@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize(
    "make", [lambda: build("GPT2", torch.float64), lambda: tiny_model(vocab_size=V)], ids=["GPT2", "Llama"]
)
def test_equals_them_in_fp64_to_the_last_digits(make: Callable[[], Any], layout: Any) -> None:
    model, batch = make(), mixed()
    found, expected = score(model, batch, layout=layout).logp, from_logits(model, batch)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert_same(gradients(model, found), gradients(model, expected), 1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Gemma2", {"final_logit_softcapping": 5.0, "attn_logit_softcapping": None}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    ],
)
def test_what_an_architecture_does_after_the_head_is_kept(name: str, settings: dict[str, float]) -> None:
    model, batch = build(name, **settings), mixed()
    torch.testing.assert_close(score(model, batch, layout="plain").logp, from_logits(model, batch), rtol=0, atol=2e-5)


@given(
    start=st.integers(0, 5),
    groups=st.lists(st.tuples(st.integers(0, 3), st.lists(st.sampled_from(["O", "EEO", "OTO", "EPPE"]), min_size=1, max_size=3)),
                    min_size=1, max_size=6),
    longest=st.sampled_from([1, 12, 20, 256]),
    expert=st.booleans(),
)  # fmt: skip
def test_prompts_that_start_alike_share_lines_and_change_nothing(
    start: int, groups: list[tuple[int, list[str]]], longest: int, expert: bool
) -> None:
    """A common start of 0 to 5 tokens, after which prompts may end; `expert` trains a shared prefix."""
    model = tiny_model(vocab_size=V)
    common = tuple(range(2, 3 + start))
    made = []
    for i, (own, responses) in enumerate(groups):
        prompt = common + tuple((7 * i + 5 * k) % 40 + 10 for k in range(own))
        rows = [trajectory(prompt, r, 10 * i + k) for k, r in enumerate(responses)]
        if expert:
            rows = [
                replace(t, source=(Source.PROMPT, *(Source.EXPERT,) * (len(prompt) - 1), *t.source[len(prompt) :]))
                for t in rows
            ]
        made.append(Group(Example(f"g{i}", "", prompt), tuple(rows)))
    batch = to_batch(made)
    plain = score(model, batch, layout="plain").logp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_module, "PACK_TOKENS", longest)
        shared = score(model, batch, layout="shared").logp
        lines = score_module.lay_out(batch, "shared").tokens
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-12)
    assert_same(gradients(model, shared), gradients(model, plain), 1e-12)
    one_line_per_group = max(
        int(batch.prompt_length[rows][0] + (batch.length - batch.prompt_length)[rows].sum())
        for g in range(len(made))
        for rows in [batch.group == g]
    )
    assert lines.numel() <= len(made) * one_line_per_group
    assert lines.shape[1] <= max(longest, one_line_per_group)


def test_a_system_prompt_is_computed_once_for_short_rows() -> None:
    system = tuple(range(1, 22))
    groups = [Group(Example(str(i), "", (*system, 30 + i)), (trajectory((*system, 30 + i), "E" * 8, i),)) for i in range(16)]
    batch = to_batch(groups)
    assert batch.tokens.numel() == 16 * 30
    assert score_module.lay_out(batch, "shared").tokens.numel() == 21 + 16 * 9


def test_rows_of_a_group_need_not_be_neighbours() -> None:
    model, batch = tiny_model(vocab_size=V), mixed()
    order = torch.tensor([3, 0, 5, 2, 4, 1])
    found = score(model, batch.rows(order), layout="shared").logp
    torch.testing.assert_close(found, score(model, batch, layout="shared").logp[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_temperature_divides_the_logits(layout: Any) -> None:
    model, batch = tiny_model(vocab_size=V), mixed()
    found = score(model, batch, temperature=0.7, layout=layout).logp
    torch.testing.assert_close(found, from_logits(model, batch, 0.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int, layout: Any) -> None:
    model, batch = tiny_model(vocab_size=V), mixed()
    whole = score(model, batch, channels=CHANNELS, layout=layout)
    expected = gradients(model, whole.logp + 0.1 * whole.channels["entropy"])
    monkeypatch.setattr(score_module, "CHUNK", chunk)
    cut = score(model, batch, channels=CHANNELS, layout=layout)
    torch.testing.assert_close(cut.logp, whole.logp, rtol=0, atol=1e-13)
    assert_same(gradients(model, cut.logp + 0.1 * cut.channels["entropy"]), expected, 1e-12)


def test_entropy_is_that_of_the_next_token_distribution() -> None:
    model, batch = tiny_model(vocab_size=V), mixed()
    found = score(model, batch, channels=CHANNELS, temperature=1.5).channels["entropy"]
    ids = batch.tokens[3, : int(batch.length[3])]
    p = (model(ids[None]).logits[0] / 1.5).softmax(-1)
    expected = -(p * p.log()).sum(-1)[:-1]
    trained = batch.trained[3, 1 : len(ids)]
    torch.testing.assert_close(found[3, 1 : len(ids)], torch.where(trained, expected, 0.0), rtol=0, atol=1e-12)


def test_the_value_head_reads_the_state_before_each_token() -> None:
    model, batch = tiny_model(vocab_size=V), mixed()
    head = nn.Linear(24, 1).double()
    found = score(model, batch, value_head=lambda h: head(h)[:, 0]).channels["value"]
    ids = batch.tokens[3, : int(batch.length[3])]
    states = model.get_decoder()(ids[None]).last_hidden_state[0]
    expected = torch.where(batch.trained[3, 1 : len(ids)], head(states)[:-1, 0], 0.0)
    torch.testing.assert_close(found[3, 1 : len(ids)], expected, rtol=0, atol=1e-12)


def test_the_embed_hook_changes_what_the_model_reads() -> None:
    """NEFTune's use: noise on the embeddings. With no change it changes nothing, with noise it equals the model on that noise."""
    model, batch = tiny_model(vocab_size=V), mixed()
    for layout in ("plain", "shared"):
        same = score(model, batch, embed=lambda e, b: e, layout=layout).logp  # type: ignore[arg-type]
        torch.testing.assert_close(same, score(model, batch, layout=layout).logp, rtol=0, atol=1e-13)  # type: ignore[arg-type]

    def noisy(embeddings: Tensor, batch: Batch | None) -> Tensor:
        columns = torch.arange(embeddings.shape[1], dtype=embeddings.dtype)[None, :, None]
        return embeddings + 0.1 * torch.sin(columns)

    found = score(model, batch, embed=noisy, layout="plain").logp
    r, n = 3, int(batch.length[3])
    ids = batch.tokens[r, :n]
    logits = model(inputs_embeds=noisy(model.get_input_embeddings()(ids[None]), None)).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(found[r, 1:n], torch.where(batch.trained[r, 1:n], expected, 0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_eager_and_sdpa_attention_agree(layout: Any) -> None:
    batch = mixed()
    sdpa, eager = (build("Qwen2", attn_implementation=a) for a in ("sdpa", "eager"))
    eager.load_state_dict(sdpa.state_dict())
    one, other = (score(m, batch, layout=layout).logp for m in (sdpa, eager))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    assert_same(gradients(sdpa, one), gradients(eager, other), 2e-5)


def test_an_embed_hook_sees_one_line_per_row_whatever_the_layout() -> None:
    model, batch = tiny_model(vocab_size=V), mixed()
    seen = []

    def look(embeddings: Tensor, given: Batch) -> Tensor:
        seen.append((len(embeddings), len(given)))
        return embeddings

    score(model, batch, embed=look, layout="shared")
    assert seen == [(len(batch), len(batch))]


@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_gradient_checkpointing_changes_nothing(layout: Any) -> None:
    model, batch = tiny_model(vocab_size=V), mixed()
    model.train()
    expected = gradients(model, score(model, batch, layout=layout).logp)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert_same(gradients(model, score(model, batch, layout=layout).logp), expected, 1e-12)


@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_a_lora_model_is_scored_with_its_adapter(layout: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model, batch = tiny_model(vocab_size=V), mixed()
    base = score(model, batch, layout=layout).logp.detach()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).double()
    found = score(adapted, batch, layout=layout).logp
    expected = from_logits(adapted, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert float((found - base).abs().max()) > 1e-3, "the adapter had no effect"
    assert_same(gradients(adapted, found), gradients(adapted, expected), 1e-12)
    with adapted.disable_adapter():
        torch.testing.assert_close(score(adapted, batch, layout=layout).logp, base, rtol=0, atol=1e-12)


# --- which layout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHARED_PROMPTS)
def test_an_architecture_that_honours_custom_masks_shares_prompts(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    model.train()
    frozen = model.get_decoder().eval()  # a part that its user keeps in evaluation
    assert choose_layout(model) == "shared"
    assert model.training and not frozen.training, "looking must not change the mode of any part"


def deaf(model: Any) -> Any:
    """The same model, but one that ignores masks and positions, as a linear attention would."""
    decoder = model.get_decoder()

    def forward(input_ids: Tensor, use_cache: bool = False, **ignored: Any) -> Any:
        return decoder(input_ids=input_ids, use_cache=use_cache)

    return types.SimpleNamespace(
        config=model.config,
        parameters=model.parameters,
        modules=lambda: [],
        eval=lambda: None,
        get_decoder=lambda: forward,
        get_output_embeddings=model.get_output_embeddings,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [1.0, 0.1])
def test_a_model_that_ignores_custom_masks_gets_plain_lines(dtype: torch.dtype, strength: float) -> None:
    """Also where looking at other responses changes little, which bf16 arithmetic must not hide."""
    model = build("Llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(strength)
    assert choose_layout(deaf(model.to(dtype))) == "plain"


def test_a_model_that_refuses_custom_masks_gets_plain_lines() -> None:
    refusing = deaf(build("Llama"))
    inner = refusing.get_decoder()

    def forward(input_ids: Tensor, use_cache: bool, **more: Any) -> Any:
        if more:
            raise ValueError(f"unexpected {sorted(more)}")
        return inner(input_ids, use_cache)

    refusing.get_decoder = lambda: forward
    assert choose_layout(refusing) == "plain"


@pytest.mark.parametrize("window", [4, 8, 4096])
def test_sliding_windows_are_kept_by_plain_lines(window: int) -> None:
    """A shared line's mask has no window, and its columns are not positions."""
    model = build("Mistral", sliding_window=window)
    assert choose_layout(model) == "plain"
    batch = to_batch(
        [Group(Example("a", "", (1, 2)), (trajectory((1, 2), "OOOOOOOOOOOO", 1), trajectory((1, 2), "OOOOOOO", 2)))]
    )
    torch.testing.assert_close(
        score(model, batch, layout=choose_layout(model)).logp, from_logits(model, batch), rtol=0, atol=2e-5
    )


# --- log-probs of trajectories --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 30, 4096])
@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_trajectory_logps_come_back_in_order(tokens: int, layout: Any) -> None:
    model, batch = tiny_model(dtype=torch.float32, vocab_size=V), mixed()
    a, b = (3, 9, 14, 7), (21, 8)
    several = [trajectory(a, "OOO", 0), trajectory(b, "E", 4), trajectory(a, "O", 1), trajectory(b, "EE", 5)]
    found = trajectory_logps(model, several, tokens_per_micro_batch=tokens, layout=layout)
    for t, logp in zip(several, found, strict=True):
        batch = to_batch([Group(Example("", "", ()), (t,))])
        assert not logp.requires_grad and len(logp) == len(t.tokens)
        torch.testing.assert_close(logp, from_logits(model, batch)[0].detach(), rtol=0, atol=2e-5)
    assert trajectory_logps(model, []) == []


def test_answers_that_begin_alike_are_one_path_and_equal_predictions_are_made_once() -> None:
    prompt = (1, 2, 3)
    source = (Source.PROMPT,) * 3 + (Source.POLICY,) * 3
    answers = [(4, 5, 6), (4, 5, 7), (8, 5, 6), (4, 5, 6)]
    group = Group(Example("g", "", prompt), tuple(Trajectory((*prompt, *a), source) for a in answers))
    batch = to_batch([group])
    lines = score_module.lay_out(batch, "shared")
    assert lines.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 5, 6]]
    assert lines.positions.tolist() == [[0, 1, 2, 3, 4, 5, 5, 3, 4, 5]]
    assert lines.mask is not None
    seen = [[column for column in range(10) if lines.mask[0, 0, token, column]] for token in (5, 6, 9)]
    assert seen == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6], [0, 1, 2, 7, 8, 9]]
    assert len(lines.target) == 7, "4 and 8 after the prompt, 5 after each, and 6, 7 and 6"
    assert len(lines.prediction) == 12
    model = tiny_model(vocab_size=V)
    shared, plain = (score(model, batch, watch=True, layout=layout) for layout in ("shared", "plain"))
    torch.testing.assert_close(shared.logp, plain.logp, rtol=0, atol=1e-12)
    for name in ("entropy", "correct"):
        torch.testing.assert_close(shared.channels[name], plain.channels[name], rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 2, batch.tokens.numel()).reshape(batch.tokens.shape)  # each row has weights of its own
    assert_same(gradients(model, weight * shared.logp), gradients(model, weight * plain.logp), 1e-12)
