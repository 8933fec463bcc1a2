"""SFT and DFT: imitate demonstrations, every token alike or by its own probability."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from worked import Line, agrees, answer, gradient_of, group, prepared, random_groups, random_logps, weights_of

from crosstrain.methods import load_method

LN2 = math.log(2)
DEMONSTRATIONS = [group(answer("EEE"), name="long"), group(answer("E"), name="short")]
LOGP = -LN2 * torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]])
"""Probabilities 1/2, 1/4, 1/8 for the long answer and 1/2 for the short one."""


def test_sft_by_hand() -> None:
    """Four tokens with -log p of 1, 2, 3 and 1 times ln 2.

    Token mean: (1 + 2 + 3 + 1) ln 2 / 4 = 7/4 ln 2, every token weighs 1/4.
    Sequence mean: ((1 + 2 + 3) / 3 + 1) ln 2 / 2 = 3/2 ln 2; a token of the long answer weighs 1/6, the short one's 1/2.
    """
    by_token = load_method("sft")
    found = weights_of(by_token, prepared(by_token, DEMONSTRATIONS), LOGP)
    assert found.loss == pytest.approx(7 / 4 * LN2) == found.logged
    assert found.weights.tolist() == [[0.25, 0.25, 0.25], [0.25, 0, 0]]

    by_sequence = load_method("sft", average="sequences")
    found = weights_of(by_sequence, prepared(by_sequence, DEMONSTRATIONS), LOGP)
    assert found.loss == pytest.approx(3 / 2 * LN2)
    torch.testing.assert_close(found.weights, torch.tensor([[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0]], dtype=torch.float64))


def test_demonstrations_of_one_prompt_count_as_those_of_two() -> None:
    method = load_method("sft", average="sequences")
    one, two = (weights_of(method, prepared(method, g), LOGP) for g in ([group(answer("EEE"), answer("E"))], DEMONSTRATIONS))
    torch.testing.assert_close(one.weights, two.weights)


def test_plain_sft_reads_no_distribution_and_leaves_the_inputs_alone() -> None:
    plain, smooth, noisy = (load_method("sft", **s) for s in ({}, {"label_smoothing": 0.1}, {"neftune_noise_alpha": 5.0}))
    assert not plain.channels and smooth.channels.keys() == {"uniform_nll"} == smooth.needs
    assert plain.embed is None and noisy.embed is not None


def test_dft_by_hand() -> None:
    """-p log p is (1/2, 2/4, 3/8 and 1/2) ln 2, together 15/8 ln 2, over four tokens. A token's weight is p / 4."""
    method = load_method("dft")
    found = weights_of(method, prepared(method, DEMONSTRATIONS), LOGP)
    assert found.logged == pytest.approx(15 / 32 * LN2)
    torch.testing.assert_close(found.weights, torch.tensor([[1 / 8, 1 / 16, 1 / 32], [1 / 8, 0, 0]], dtype=torch.float64))


def sft_of_tokens(groups: list[list[Line]]) -> Tensor:
    """Cross-entropy over all answer tokens."""
    total, n = torch.zeros(()), 0
    for line in (line for g in groups for line in g):
        for logp in line.logp:
            total, n = total - logp, n + 1
    return total / n


def sft_of_sequences(groups: list[list[Line]]) -> Tensor:
    """The mean over answers of their mean token cross-entropy."""
    means = [-sum(line.logp) / len(line) for g in groups for line in g]
    return sum(means) / len(means)


def dft_paper(groups: list[list[Line]]) -> Tensor:
    """arXiv:2508.05629 eq. 9: -sg(p) log p, averaged over tokens."""
    tokens = [logp for g in groups for line in g for logp in line.logp]
    return sum(-logp.exp().detach() * logp for logp in tokens) / len(tokens)


@pytest.mark.parametrize("seed", range(3))
def test_second_implementations(seed: int) -> None:
    groups = random_groups(seed, demonstration=True)
    agrees(load_method("sft"), sft_of_tokens, groups, seed)
    agrees(load_method("sft", average="sequences"), sft_of_sequences, groups, seed)
    agrees(load_method("dft"), dft_paper, groups, seed)


def test_dft_maximises_the_sum_of_probabilities() -> None:
    """-sg(p) log p and -p have the same gradient."""
    method = load_method("dft")
    logp, batch = random_logps(method, random_groups(7, demonstration=True), 7)
    tokens = int(batch.trained.sum())
    _, expected = gradient_of(
        lambda groups: -sum(x.exp() for g in groups for line in g for x in line.logp) / tokens, batch, logp
    )
    torch.testing.assert_close(weights_of(method, batch, logp).weights, expected, rtol=0, atol=1e-12)


def test_dft_is_sft_where_the_model_is_certain_and_silent_where_it_knows_nothing() -> None:
    sft, dft = load_method("sft"), load_method("dft")
    batch = prepared(dft, DEMONSTRATIONS)
    certain = torch.zeros(2, 3)
    assert torch.equal(weights_of(dft, batch, certain).weights, weights_of(sft, batch, certain).weights)
    assert float(weights_of(dft, batch, torch.full((2, 3), -50.0)).weights.abs().max()) < 1e-20


def test_only_expert_tokens_are_imitated() -> None:
    """Later turns of the prompt and tool answers are conditioned on, never trained."""
    method = load_method("sft")
    batch = prepared(method, [group(answer("EPTE"))])
    assert weights_of(method, batch, torch.zeros(1, 4)).weights.tolist() == [[0.5, 0, 0, 0.5]]
