"""What a record says of the process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosstrain.training.record import peak_memory_gb, reset_peak_memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="only Linux can forget a process's peak")
def test_the_peak_is_that_since_it_was_reset() -> None:
    held = torch.ones(2**27)  # 0.5 GB
    del held
    high = peak_memory_gb()
    reset_peak_memory()
    low = peak_memory_gb()
    assert low <= high - 0.4
    held = torch.ones(2**27)
    assert peak_memory_gb() >= low + 0.4
    del held
