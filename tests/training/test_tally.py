"""What a run's record adds up over its steps, by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

from crosstrain.training.tally import Tally

MEAN, MAX = (f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max"))


def test_the_mean_is_over_steps_that_sampled_and_the_largest_over_all() -> None:
    lines = [
        {"time/backward": 1.0, MEAN: 0.1, MAX: 0.5},
        {"time/backward": 2.0},  # imitation
        {"time/backward": 0.0},  # skipped
        {"time/backward": 1.0, MEAN: 0.3, MAX: 0.4},
    ]
    tally = Tally()
    for line, flops in zip(lines, (10.0, 20.0, 0.0, 10.0), strict=True):
        tally = tally.step(line, flops)
    assert tally.sampling("bfloat16") == {"dtype": "bfloat16", "logp_diff_mean": 0.2, "logp_diff_max": 0.5}
    assert tally.backward_speed() == 10.0
    assert Tally(**json.loads(json.dumps(asdict(tally)))) == tally, "a checkpoint keeps it exactly"


def test_what_nothing_was_measured_of_is_unknown() -> None:
    assert Tally().sampling("float32") is None and Tally().backward_speed() is None


def test_the_peak_of_memory_never_sinks() -> None:
    assert Tally().held(2.0).held(1.0).peak_memory_gb == 2.0
