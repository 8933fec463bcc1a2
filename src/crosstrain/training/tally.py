"""What a run's record says of its steps beside their cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from crosstrain.training.metrics import LOGP_DIFFERENCE, TIME


@dataclass(frozen=True)
class Tally:
    """Over all steps so far, logged or not; in every checkpoint, so that a resumed run goes on with it.

    backward_seconds, backward_flops: forward and backward passes of updates, with the FLOPs of the matrix products they computed: 6
        per token and weight of a layer, and per prediction and weight of the head.
    compared: steps in which the sampler's log-probs could be compared with the trainer's. logp_diff_sum: sum of those steps' mean
        difference. logp_diff_max: the largest of all tokens.
    peak_memory_gb: the most memory held while training.
    """

    backward_seconds: float = 0.0
    backward_flops: float = 0.0
    compared: int = 0
    logp_diff_sum: float = 0.0
    logp_diff_max: float = 0.0
    peak_memory_gb: float = 0.0

    def step(self, metrics: Mapping[str, float], backward_flops: float) -> Tally:
        """After a step with this line of metrics, whose updates took `backward_flops`.

        >>> line = {"time/backward": 2.0, LOGP_DIFFERENCE + "mean": 0.1, LOGP_DIFFERENCE + "max": 0.4}
        >>> Tally().step(line, 100.0).sampling("float32")
        {'dtype': 'float32', 'logp_diff_mean': 0.1, 'logp_diff_max': 0.4}
        """
        after = replace(
            self,
            backward_seconds=self.backward_seconds + metrics[TIME + "backward"],
            backward_flops=self.backward_flops + backward_flops,
        )
        if LOGP_DIFFERENCE + "mean" not in metrics:
            return after
        return replace(
            after,
            compared=self.compared + 1,
            logp_diff_sum=self.logp_diff_sum + metrics[LOGP_DIFFERENCE + "mean"],
            logp_diff_max=max(self.logp_diff_max, metrics[LOGP_DIFFERENCE + "max"]),
        )

    def held(self, memory_gb: float) -> Tally:
        """After `memory_gb` were held at some time."""
        return replace(self, peak_memory_gb=max(self.peak_memory_gb, memory_gb))

    def sampling(self, dtype: str) -> dict[str, str | float] | None:
        """How far the sampler, computing in `dtype`, was from the trainer: in nats, the mean over steps of each step's mean over
        own trained tokens, and the largest of all; None where nothing was compared."""
        if not self.compared:
            return None
        mean = self.logp_diff_sum / self.compared
        return {"dtype": dtype, "logp_diff_mean": mean, "logp_diff_max": self.logp_diff_max}

    def backward_speed(self) -> float | None:
        """FLOPs per second of forward and backward; None before the first update.

        >>> Tally(backward_seconds=2.0, backward_flops=10.0).backward_speed()
        5.0
        """
        return self.backward_flops / self.backward_seconds if self.backward_seconds else None
