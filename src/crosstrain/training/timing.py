"""The time at which a device is done."""

from __future__ import annotations

import time

import torch


def clock(device: torch.device) -> float:
    """Seconds as `time.perf_counter` has them, read once the device has done all that it was asked to.

    Cards take work faster than they do it: without waiting, a part of a step would be charged for the part before it.

    >>> clock(torch.device("cpu")) <= clock(torch.device("cpu"))
    True
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
