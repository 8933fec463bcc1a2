"""What a run has spent, counted in units that do not depend on the machine or on how batches are cut."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

COST_UNITS = ("processed_tokens", "generated_tokens", "flops", "demonstrations")
"""The units a budget may be given in. Seconds are recorded too, but never decide what a resumable run computes."""


@dataclass(frozen=True)
class Cost:
    """Spent so far.

    processed_tokens: tokens that went through the model in training: prompts, prefill, generation, reference and old passes,
        forward and backward, every pass counted; a prompt that the rows of a group share counts once per pass. What answers start
        with alike counts for each, though it may be computed once: a budget does not depend on how alike they are.
    generated_tokens: sampled tokens. demonstrations: expert trajectories trained on, every use counted.
    flops: 6 N per token through forward and backward, 2 N per token through forward only, N the model's parameters.
    seconds: wall-clock time of training, sampling and grading.
    """

    processed_tokens: int = 0
    generated_tokens: int = 0
    flops: float = 0.0
    demonstrations: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Both together.

        >>> Cost(flops=1.0, demonstrations=2) + Cost(flops=2.0)
        Cost(processed_tokens=0, generated_tokens=0, flops=3.0, demonstrations=2, seconds=0.0)
        """
        return Cost(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    def __mul__(self, times: float) -> Cost:
        """As much `times` over, tokens and demonstrations rounded.

        >>> Cost(processed_tokens=3, flops=3.0) * 1.5
        Cost(processed_tokens=4, generated_tokens=0, flops=4.5, demonstrations=0, seconds=0.0)
        """
        scaled = {name: getattr(self, name) * times for name in (*COST_UNITS, "seconds")}
        whole = {name: round(scaled[name]) for name in ("processed_tokens", "generated_tokens", "demonstrations")}
        return Cost(**{**scaled, **whole})

    def forward_backward(self, tokens: int, parameters: int) -> Cost:
        """After `tokens` more through forward and backward."""
        return self._processed(tokens, 6.0 * parameters)

    def forward(self, tokens: int, parameters: int) -> Cost:
        """After `tokens` more through forward only.

        >>> Cost().forward(10, parameters=5).flops
        100.0
        """
        return self._processed(tokens, 2.0 * parameters)

    def sampled(self, prefill: int, generated: int, parameters: int) -> Cost:
        """After sampling `generated` tokens from prompts of `prefill` tokens."""
        after = self.forward(prefill + generated, parameters)
        return replace(after, generated_tokens=after.generated_tokens + generated)

    def used_demonstrations(self, n: int) -> Cost:
        """After training on `n` more demonstrations."""
        return replace(self, demonstrations=self.demonstrations + n)

    def took(self, seconds: float) -> Cost:
        """After `seconds` more."""
        return replace(self, seconds=self.seconds + seconds)

    def as_metrics(self) -> dict[str, float]:
        """As `cost/<unit>` entries of a metrics line."""
        return {f"cost/{name}": value for name, value in asdict(self).items()}

    def _processed(self, tokens: int, flops_per_token: float) -> Cost:
        return replace(self, processed_tokens=self.processed_tokens + tokens, flops=self.flops + flops_per_token * tokens)
