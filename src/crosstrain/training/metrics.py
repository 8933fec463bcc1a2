"""What a step is logged as, under TRL's metric names."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crosstrain.types import Batch, Group, Scores, Source

LOGP_DIFFERENCE = "sampling/sampling_logp_difference/"
"""What the distance between the sampler's and the trainer's log-probs of own trained tokens is called; `mean` or `max` follows."""

TIME = "time/"
"""What the seconds of a part of a step are called; the part follows."""

COMPUTED = "computed/"
"""What positions are called that went through forward and backward: `tokens` through the layers, `predictions` through the head."""


def rollout_metrics(groups: Sequence[Group], *, scored: bool = True) -> dict[str, float]:
    """Rewards and completion lengths of a step's groups as collected; empty without own completions.

    reward, reward_std: mean over completions, and mean over groups of the std with n - 1. frac_reward_zero_std: share of groups
    whose rewards are all equal. rewards/missing: completions without a reward. scored: whether rewards were asked for; where not,
    what would be of them is left out.
    reward/<context>: mean over completions that were sampled from that context in place of the prompt, which count for nothing
    else here.
    """
    # a baseline is no answer, and what was sampled from a hint no answer to the prompt
    answers = [[t for t in g.by(Source.POLICY) if not t.greedy and not t.sampled_from] for g in groups]
    own = [t for group in answers for t in group]
    if not own:
        return {}
    rewards = [[t.reward for t in group if t.reward is not None] for group in answers]
    known = [r for group in rewards for r in group]
    stds = [statistics.stdev(r) for r in rewards if len(r) > 1]  # exact: equal rewards have a std of 0, also 0.1 seven times
    lengths = [sum(s == Source.POLICY for s in t.source) for t in own]
    of_rewards = {
        "reward": _mean(known),
        "reward_std": _mean(stds),
        "frac_reward_zero_std": _mean([float(s == 0) for s in stds]),
        "rewards/missing": float(sum(t.reward is None for t in own)),
    }
    metrics = {
        **(of_rewards if scored else {}),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": _mean([float(not t.finished) for t in own]),
    }
    for name in sorted({name for t in own for name in t.rewards}):
        values = [t.rewards[name] for t in own if name in t.rewards and not math.isnan(t.rewards[name])]
        metrics[f"rewards/{name}/mean"] = _mean(values)
    helped = [t for g in groups for t in g.trajectories if t.sampled_from]
    for context in sorted({t.sampled_from for t in helped}):
        metrics[f"reward/{context}"] = _mean([t.reward for t in helped if t.sampled_from == context and t.reward is not None])
    return metrics


class Meter:
    """Sums over the micro-batches of an optimizer step; `metrics` turns them into the step's line."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[tuple[str, str], float] = {}
        self.losses: dict[str, float] = {}
        self.mismatch_max = 0.0

    def add_loss(self, term: str, value: float) -> None:
        """A term's logged loss on a micro-batch, already divided by the step's count."""
        self.losses[term] = self.losses.get(term, 0.0) + value

    def add_weights(self, term: str, weights: Tensor, batch: Batch) -> None:
        """|weight| that a term gave to the tokens of each source."""
        for source in (Source.EXPERT, Source.POLICY, Source.TOOL):
            total = float(weights.abs()[batch.source == int(source)].sum())
            if total:
                key = (term, source.name.lower())
                self.weights[key] = self.weights.get(key, 0.0) + total

    def add_scores(self, batch: Batch, logp: Tensor, entropy: Tensor, correct: Tensor, used: Tensor) -> None:
        """Token statistics of a micro-batch; `used` [B, T] bool marks tokens that any term is on."""
        self._add("tokens", float(used.sum()))
        self._add("entropy", float(entropy[used].sum()))
        self._add("correct", float(correct[used].sum()))
        for source in (Source.EXPERT, Source.POLICY):
            mask = used & (batch.source == int(source))
            self._add(f"tokens/{source.name}", float(mask.sum()))
            self._add(f"logp/{source.name}", float(logp[mask].sum()))
        if "behaviour_logp" in batch.columns:
            own = used & (batch.source == int(Source.POLICY))
            known = own & ~torch.isnan(batch.columns["behaviour_logp"]) & ~_replayed(batch)
            # in later inner updates the weights are no longer those that sampled, but the old log-probs still are
            gap = (batch.columns.get("old_logp", logp) - batch.columns["behaviour_logp"])[known].abs()
            self._add("mismatch_tokens", float(known.sum()))
            self._add("mismatch", float(gap.sum()))
            self.mismatch_max = max(self.mismatch_max, float(gap.max()) if len(gap) else 0.0)
        if "ref_logp" in batch.columns:
            d = (logp - batch.columns["ref_logp"])[used]
            self._add("kl", float((torch.exp(-d) - 1 + d).sum()))
            self._add("kl_tokens", float(used.sum()))

    def add_computed(self, scores: Scores) -> None:
        """What the model ran for a micro-batch."""
        self._add(COMPUTED + "tokens", float(scores.computed_tokens))
        self._add(COMPUTED + "predictions", float(scores.computed_predictions))

    def computed(self) -> dict[str, float]:
        """What the model ran so far."""
        return {name: value for name, value in self.sums.items() if name.startswith(COMPUTED)}

    def add_clipped(self, batch: Batch, weights: Tensor, used: Tensor) -> None:
        """Tokens with an advantage whose gradient a gate closed."""
        live = used & (batch.source == int(Source.POLICY)) & (batch.advantage != 0) & ~_replayed(batch)
        self._add("live_tokens", float(live.sum()))
        self._add("clipped_tokens", float((live & (weights == 0)).sum()))

    def add_pairs(self, batch: Batch, logp: Tensor, paired: Sequence[Tensor], beta: float) -> None:
        """DPO's rewards: beta times how far each answer's log-prob moved from the reference, or without one the log-prob itself.

        paired: where the terms are that count pairs, of which those are left out that see one side only (a likelihood beside).
        """
        better, worse = batch.pairs()
        used = torch.zeros_like(batch.trained)
        for mask in paired:
            used = used | mask if bool(mask[worse].any()) else used
        totals = torch.where(used, logp, torch.zeros_like(logp)).sum(dim=1)
        known = batch.columns.get("ref_logp", torch.zeros_like(logp))
        reward = beta * (totals - torch.where(used, known, torch.zeros_like(logp)).sum(dim=1))
        self._add("pairs", float(len(better)))
        self._add("rewards/chosen", float(reward[better].sum()))
        self._add("rewards/rejected", float(reward[worse].sum()))
        self._add("rewards/accuracies", float((reward[better] > reward[worse]).sum()))
        self._add("logps/chosen", float(totals[better].sum()))
        self._add("logps/rejected", float(totals[worse].sum()))

    def add_values(self, batch: Batch, values: Tensor, on: Tensor, *, pairs: bool) -> None:
        """Values of the tokens of a term; of preference pairs, where a row's value is its reward, also DPO's metrics."""
        self._add("values/mean", float(values[on].sum()))
        self._add("value_tokens", float(on.sum()))
        if pairs:
            better, worse = batch.pairs()
            reward = torch.where(on, values, torch.zeros_like(values)).sum(dim=1)
            self._add("pairs", float(len(better)))
            self._add("rewards/chosen", float(reward[better].sum()))
            self._add("rewards/rejected", float(reward[worse].sum()))
            self._add("rewards/accuracies", float((reward[better] > reward[worse]).sum()))

    def metrics(self) -> dict[str, float]:
        """The step's entries; a quantity nothing contributed to is left out."""
        result = {"loss": sum(self.losses.values())}
        result |= {f"loss/{term}": value for term, value in self.losses.items()} if len(self.losses) > 1 else {}
        total = sum(self.weights.values())
        result |= {f"weight_share/{t}/{s}": w / total for (t, s), w in sorted(self.weights.items())} if total else {}
        sums = self.sums
        for name, value, count in (
            ("entropy", "entropy", "tokens"),
            ("mean_token_accuracy", "correct", "tokens"),
            ("logps/expert", "logp/EXPERT", "tokens/EXPERT"),
            ("logps/policy", "logp/POLICY", "tokens/POLICY"),
            (LOGP_DIFFERENCE + "mean", "mismatch", "mismatch_tokens"),
            ("kl", "kl", "kl_tokens"),
            ("clip_ratio/region_mean", "clipped_tokens", "live_tokens"),
            ("values/mean", "values/mean", "value_tokens"),
            *((name, name, "pairs") for name in _PAIR_METRICS),
        ):
            if sums.get(count) and value in sums:
                result[name] = sums[value] / sums[count]
        if sums.get("mismatch_tokens"):
            result[LOGP_DIFFERENCE + "max"] = self.mismatch_max
        result |= self.computed()
        if "rewards/chosen" in result:
            result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
        return result

    def _add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value


def _replayed(batch: Batch) -> Tensor:
    """[B, 1] bool: rows that an earlier policy sampled."""
    return batch.columns.get("replayed", torch.zeros_like(batch.reward))[:, None] > 0


_PAIR_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")


def merge(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """A collected batch's line from those of its inner updates: times and what was computed are added up, of a `/max` the largest
    counts, else the mean.

    >>> merge([{"loss": 1.0, "time/backward": 2.0}, {"loss": 3.0, "time/backward": 2.0}])
    {'loss': 2.0, 'time/backward': 4.0}
    """
    names = list(dict.fromkeys(name for line in lines for name in line))
    return {name: _merged(name, [line[name] for line in lines if name in line]) for name in names}


def without_logp_difference(line: Mapping[str, float]) -> dict[str, float]:
    """The line of an inner update whose weights are not those that sampled, and whose old log-probs nobody computed."""
    return {name: value for name, value in line.items() if not name.startswith(LOGP_DIFFERENCE)}


def _merged(name: str, values: Sequence[float]) -> float:
    if name.startswith((TIME, COMPUTED)):
        return sum(values)
    return max(values) if name.endswith("/max") else _mean(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
