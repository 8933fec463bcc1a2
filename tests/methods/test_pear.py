"""PEAR: a token counts by how likely the policy would go on as its demonstration does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bandit import Bandit, learn, model_for
from torch import Tensor
from worked import answer, gradient_of, group, prepared, random_groups, random_logps, weights_of

from crosstrain import assemble, checks
from crosstrain.data import Stream
from crosstrain.data.chat import encode
from crosstrain.data.rows import parse_row
from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.methods.pear import suffix
from crosstrain.testing import check_method, tiny_tokenizer
from crosstrain.types import Batch, Method, Source

LN2 = math.log(2)
WIDE = {"log_ratio_low": -50.0, "log_ratio_high": 50.0, "log_weight_low": -50.0, "log_weight_high": 50.0}
THREE = [group(answer("EEE"))]
LOGP = torch.full((1, 3), -1.0, dtype=torch.float64)


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def twice_as_likely(method: Method) -> Batch:
    """Three tokens, each twice as likely under the policy as under whoever wrote them."""
    return prepared(method, THREE, behaviour_logp=LOGP - LN2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"discount": 1.0}, [4, 2, 1]),  # two more tokens to come, one, none
        ({"discount": 0.5}, [1, 1, 1]),  # the discount undoes it
        ({"discount": 1.0, "block_size": 2}, [2, 2, 1]),  # one token after the first block
        ({"discount": 1.0, "block_size": 3}, [1, 1, 1]),
        ({"level": "sequence"}, [8, 8, 8]),
        ({"discount": 1.0, "log_ratio_high": math.log(1.5)}, [2.25, 1.5, 1]),
        ({"discount": 1.0, "log_weight_high": math.log(3)}, [3, 2, 1]),
        ({"level": "sequence", "log_weight_low": math.log(9)}, [9, 9, 9]),
    ],
)
def test_pear_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    method = load_method("pear", **{**WIDE, **settings})
    found = weights_of(method, twice_as_likely(method), LOGP)
    torch.testing.assert_close(found.weights, of([expected]) / 3)
    assert found.logged == pytest.approx(sum(expected) / 3)  # -G log pi with log pi = -1


def test_the_published_clips() -> None:
    """A ratio of 2 is cut to e^0.3, one of 1/2 to e^-0.08; discount 0.999."""
    method = load_method("pear")
    up = weights_of(method, twice_as_likely(method), LOGP).weights
    down = weights_of(method, prepared(method, THREE, behaviour_logp=LOGP + LN2), LOGP).weights
    for found, step in ((up, 0.3), (down, -0.08)):
        expected = [math.exp(n * (step + math.log(0.999))) / 3 for n in (2, 1, 0)]
        torch.testing.assert_close(found, of([expected]))


def test_other_peoples_words_count_for_nothing() -> None:
    """A user's turn between two of the assistant's: two own tokens, one after the first."""
    method = load_method("pear", **{**WIDE, "discount": 1.0})
    turns = [group(answer("EPPE"))]
    logp = torch.full((1, 4), -1.0, dtype=torch.float64)
    found = weights_of(method, prepared(method, turns, behaviour_logp=logp - LN2), logp)
    torch.testing.assert_close(found.weights, of([[1.0, 0, 0, 0.5]]))


def test_bounds_above_0_hold_for_own_tokens_alone() -> None:
    """Log-ratios raised to ln 3 on two own tokens: 9 by sequence, 3 and 1 by suffix; nothing for the user's words between them."""
    logp = torch.full((1, 4), -1.0, dtype=torch.float64)
    for settings, expected in (({"level": "sequence"}, [4.5, 0, 0, 4.5]), ({"discount": 1.0}, [1.5, 0, 0, 0.5])):
        method = load_method("pear", **{**WIDE, "log_ratio_low": math.log(3), **settings})
        found = weights_of(method, prepared(method, [group(answer("EPPE"))], behaviour_logp=logp - LN2), logp)
        torch.testing.assert_close(found.weights, of([expected]))


def paper(batch: Batch, method: Method) -> Any:
    """Algorithm 1 of arXiv:2602.01058 by loops, from the back."""
    s = method.settings
    behaviour = [row[on].tolist() for row, on in zip(batch.columns["behaviour_logp"], batch.trained, strict=True)]

    def loss(groups: list[list[Any]]) -> Tensor:
        total, n, rows = torch.zeros((), dtype=torch.float64), 0, iter(behaviour)
        for line in (line for g in groups for line in g):
            written, length = next(rows), len(line)
            d = [
                min(max(float(x.detach()) - b, s["log_ratio_low"]), s["log_ratio_high"])
                for x, b in zip(line.logp, written, strict=True)
            ]
            for t, x in enumerate(line.logp):
                end = min((t // s["block_size"] + 1) * s["block_size"], length)
                log_g = sum(d) if s["level"] == "sequence" else (length - end) * math.log(s["discount"]) + sum(d[end:])
                total, n = total - math.exp(min(max(log_g, s["log_weight_low"]), s["log_weight_high"])) * x, n + 1
        return total / n

    return loss


SETTINGS: list[dict[str, Any]] = [
    {},
    {"block_size": 2, "discount": 0.9},
    {"level": "sequence", "log_weight_high": 0.3},
    {"log_ratio_low": -1.0, "log_ratio_high": 1.0, "log_weight_low": -0.5, "log_weight_high": 0.5, "block_size": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_second_implementation(settings: dict[str, Any], seed: int) -> None:
    method, groups = load_method("pear", **settings), random_groups(seed, demonstration=True, n=5)
    logp, batch = random_logps(load_method("iw_sft"), groups, seed)  # with a reference column near the policy
    batch = batch.with_columns(behaviour_logp=batch.columns["ref_logp"])
    ours = weights_of(method, batch, logp)
    value, weights = gradient_of(paper(batch, method), batch, logp)
    torch.testing.assert_close(ours.weights, weights, rtol=0, atol=1e-10)
    assert ours.logged == pytest.approx(value, rel=1e-10)


def test_identities() -> None:
    """Undiscounted, with the policy as author, it is SFT; by sequences from the base, iw-SFT."""
    groups = random_groups(1, demonstration=True)
    logp, batch = random_logps(load_method("iw_sft"), groups, 1)
    own = prepared(load_method("sft"), groups, behaviour_logp=logp)
    one = weights_of(load_method("pear", discount=1.0), own, logp).weights
    torch.testing.assert_close(one, weights_of(load_method("sft"), own, logp).weights)
    sequence = load_method("pear", level="sequence", behaviour="reference", **{**WIDE, "log_weight_high": math.log(16.0)})
    iw = load_method("iw_sft")
    torch.testing.assert_close(weights_of(sequence, batch, logp).weights, weights_of(iw, batch, logp).weights)


def test_blocks_are_cut_among_own_tokens_whatever_stands_around_them() -> None:
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    gaps = torch.tensor([[False, True, True, False, True, True, False, False, True]])
    spread = torch.zeros(1, 9, dtype=torch.float64).masked_scatter(gaps, d)
    close = suffix(d, torch.ones(1, 5, dtype=torch.bool), 2, -0.1)
    torch.testing.assert_close(suffix(spread, gaps, 2, -0.1)[gaps], close[0])


@pytest.mark.parametrize("settings", [{"behaviour": "reference"}, {"level": "sequence"}, {"block_size": 2}], ids=str)
def test_settings_keep_the_contract(settings: dict[str, Any]) -> None:
    check_method(load_method("pear", **settings))


def test_it_imitates() -> None:
    model = model_for()
    bandit = Bandit.out_of_reach()
    learn(load_method("pear", behaviour="reference"), model, bandit, steps=60)
    assert min(bandit.success(model)) > 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": "token"}, "level: got 'token'; allowed: suffix, sequence"),
        ({"behaviour": "base"}, "behaviour: got 'base'; allowed: data, reference"),
        ({"block_size": 0}, "block_size=0"),
        ({"discount": 1.5}, "discount=1.5"),
        ({"level": "sequence", "block_size": 2}, "block_size and discount have no effect"),
        ({"log_ratio_low": 0.5}, "low must be below high"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method("pear", **settings)


# --- the column ------------------------------------------------------------------------------------------------------


def row(behaviour: Any, **more: Any) -> Any:
    return parse_row({"prompt": "1+1=", "completion": "2", "behaviour_logp": behaviour, **more}, "rows.jsonl:1")


def test_log_probs_of_the_author_come_with_the_row() -> None:
    example = encode(row([-0.5, -0.25]), tiny_tokenizer(), id="train:0")
    [demo] = example.expert
    known = [x for x, s in zip(demo.behaviour_logp, demo.source, strict=True) if s == Source.EXPERT]
    assert known == [-0.5, -0.25]
    assert all(math.isnan(x) for x in demo.behaviour_logp[: demo.response_start])
    cut = encode(row([-0.5, -0.25]), tiny_tokenizer(), id="train:0", max_length=len(demo.tokens) - 1)
    assert cut.expert[0].behaviour_logp[-1] == -0.5, "a demonstration that is cut keeps those of its first tokens"
    chat = {
        "prompt": [{"role": "user", "content": "1"}],
        "completion": [{"role": "assistant", "content": "ab"}],
        "behaviour_logp": [-1.0, -2.0, -3.0],
    }
    talked = encode(parse_row(chat, "rows.jsonl:2"), tiny_tokenizer(), id="train:1").expert[0]
    assert [x for x in talked.behaviour_logp if not math.isnan(x)] == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ([-0.5], "for each of the 2 tokens .* got 1 entries"),
        ([-0.5, 0.5], "at most 0"),
        ([-0.5, None], "got 2 entries"),
        (-0.5, "got float"),
    ],
)
def test_log_probs_that_cannot_be_are_told(behaviour: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: column 'behaviour_logp'.*" + message):
        encode(row(behaviour), tiny_tokenizer(), id="train:0")


def test_rows_without_them_are_named_before_step_1() -> None:
    examples = tuple(
        encode(r, tiny_tokenizer(), id=f"train:{i}")
        for i, r in enumerate((row([-0.5, -0.25]), parse_row({"prompt": "1", "completion": "2"}, "rows.jsonl:2")))
    )
    loaded = assemble.Loaded({"train": Stream("train", examples)}, {}, {}, (), {}, 0)
    with pytest.raises(UserError, match=r"`behaviour_logp`.* which 1 of 2 rows of 'train' lack: rows\.jsonl:2"):
        checks.check_data(load_method("pear"), loaded)
    checks.check_data(load_method("pear", behaviour="reference"), loaded)
    checks.check_data(load_method("sft"), loaded)
