"""Short measurements of the machine: what is multiplied, how it is counted, and that random numbers stay as they were."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from crosstrain.testing import tiny_model
from crosstrain.training import probe
from crosstrain.training.optimizer import Precision

CPU = torch.device("cpu")


def test_the_shapes_are_those_of_every_linear_layer_and_the_head() -> None:
    expected = {(24, 24): 2 * 2, (12, 24): 2 * 2, (48, 24): 2 * 2, (24, 48): 2, (61, 24): 1}  # q and o, k and v, MLP, head
    assert probe.linear_shapes(tiny_model()) == Counter(expected)
    assert probe.linear_shapes(nn.Sequential(Conv1D(3, 2), nn.LayerNorm(3))) == Counter({(3, 2): 1})


def test_speed_is_all_flops_over_all_seconds_and_a_wide_head_is_measured_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is made to take a second: two layers and a head that is four times the measured part take six."""
    asked: list[tuple[int, int]] = []

    def second(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> float:
        asked.append((outputs, inputs))
        return 1.0

    monkeypatch.setattr(probe, "_products_seconds", second)
    monkeypatch.setattr(probe, "WIDEST", 8)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 32))
    assert probe.matmul_speed(model, torch.float64, CPU) == pytest.approx(6 * probe.ROWS * (2 * 16 + 128) / 6.0)
    assert sorted(asked) == [(4, 4), (8, 4)]
    probe.matmul_speed(model, torch.float64, CPU)
    assert len(asked) == 2, "measured once per process"


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_probes_take_time_and_no_random_numbers(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ELEMENTS", 2**16)
    before = torch.get_rng_state()
    assert 0 < probe.optimizer_seconds.__wrapped__(precision, CPU) < 1e-3
    assert 0 < probe._products_seconds(24, 24, torch.float32, CPU) < 1
    assert torch.equal(torch.get_rng_state(), before)
