"""What a step is logged as, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from crosstrain.training.batching import to_batch, with_advantage
from crosstrain.training.metrics import Meter, merge, rollout_metrics, without_logp_difference
from crosstrain.types import Example, Group, Source, Trajectory

DIFFERENCE = "sampling/sampling_logp_difference/"


def own(reward: float | None, n: int = 1, *, finished: bool = True, **rewards: float) -> Trajectory:
    source = (Source.PROMPT,) + (Source.POLICY,) * n
    return Trajectory((1,) * (n + 1), source, reward=reward, rewards=rewards, finished=finished)


def expert(reward: float | None = None, n: int = 1) -> Trajectory:
    return Trajectory((1,) * (n + 1), (Source.PROMPT,) + (Source.EXPERT,) * n, reward=reward)


def group(*trajectories: Trajectory, name: str = "a") -> Group:
    return Group(Example(name, "", (1,)), trajectories)


def test_rollout_metrics_by_hand() -> None:
    groups = [
        group(own(1.0, 2, exact=1.0), own(0.0, 4, finished=False, exact=0.0), expert(1.0, 9)),
        group(own(0.5, 3, exact=math.nan), own(0.5, 3), name="b"),
    ]
    found = rollout_metrics(groups)
    assert found["reward"] == 0.5
    assert found["reward_std"] == pytest.approx(math.sqrt(0.5) / 2)
    assert found["frac_reward_zero_std"] == 0.5
    assert (found["completions/mean_length"], found["completions/min_length"], found["completions/max_length"]) == (3, 2, 4)
    assert found["completions/clipped_ratio"] == 0.25
    assert found["rewards/exact/mean"] == 0.5
    assert found["rewards/missing"] == 0


def test_equal_rewards_are_seen_as_equal_whatever_their_rounding() -> None:
    groups = [group(*(own(0.1) for _ in range(7)))]
    assert rollout_metrics(groups)["frac_reward_zero_std"] == 1.0
    assert rollout_metrics(groups)["reward_std"] == 0.0


def test_missing_rewards_are_counted_and_left_out() -> None:
    found = rollout_metrics([group(own(None), own(1.0))])
    assert found["rewards/missing"] == 1 and found["reward"] == 1.0
    assert math.isnan(rollout_metrics([group(own(None))])["reward"])


def test_without_own_completions_there_is_nothing_to_say() -> None:
    assert rollout_metrics([group(expert())]) == {}


def test_token_statistics_are_means_over_all_micro_batches() -> None:
    batch = to_batch([group(own(1.0, 2)), group(expert(None, 1), name="b")])
    meter = Meter()
    logp = torch.tensor([[0, -1.0, -2.0], [0, -4.0, 0]])
    entropy, correct = torch.full((2, 3), 0.5), torch.tensor([[0, 1.0, 0], [0, 1.0, 0]])
    for r in range(2):
        one = batch.rows(torch.tensor([r]))
        meter.add_scores(one, logp[r : r + 1], entropy[r : r + 1], correct[r : r + 1], one.trained)
        meter.add_loss("rl", 0.25)
    found = meter.metrics()
    assert found["loss"] == 0.5 and "loss/rl" not in found
    assert found["entropy"] == 0.5 and found["mean_token_accuracy"] == pytest.approx(2 / 3)
    assert (found["logps/policy"], found["logps/expert"]) == (-1.5, -4.0)
    assert not {"kl", "rewards/chosen", "clip_ratio/region_mean", DIFFERENCE + "mean", DIFFERENCE + "max"} & set(found)


def test_several_terms_are_logged_by_name_with_their_share_of_the_weight() -> None:
    batch = to_batch([group(own(1.0), expert())])
    meter = Meter()
    meter.add_loss("rl", 1.0)
    meter.add_loss("demo", 3.0)
    meter.add_weights("rl", torch.tensor([[0, -0.1], [0, 0]]), batch)
    meter.add_weights("demo", torch.tensor([[0, 0], [0, 0.3]]), batch)
    found = meter.metrics()
    assert (found["loss"], found["loss/rl"], found["loss/demo"]) == (4.0, 1.0, 3.0)
    assert found["weight_share/rl/policy"] == pytest.approx(0.25)
    assert found["weight_share/demo/expert"] == pytest.approx(0.75)


def test_kl_mismatch_and_clipping() -> None:
    """k3 at d = ln 2 is 1/2 - 1 + ln 2; the sampler's log-probs are off by 0.25 and 0.5; of two tokens with an advantage one is
    clipped."""
    t = Trajectory((1, 1, 1), (Source.PROMPT, Source.POLICY, Source.POLICY), 1.0, behaviour_logp=(math.nan, -0.75, -1.5))
    batch = to_batch([group(t)])
    logp = torch.tensor([[0, -1.0, -1.0]])
    batch = with_advantage(batch, torch.ones(1)).with_columns(ref_logp=logp - math.log(2))
    meter = Meter()
    meter.add_scores(batch, logp, torch.zeros(1, 3), torch.zeros(1, 3), batch.trained)
    meter.add_clipped(batch, torch.tensor([[0, 0.5, 0]]), batch.trained)
    found = meter.metrics()
    assert found["kl"] == pytest.approx(math.log(2) - 0.5)
    assert found[DIFFERENCE + "mean"] == pytest.approx(0.375)
    assert found[DIFFERENCE + "max"] == pytest.approx(0.5)
    assert found["clip_ratio/region_mean"] == 0.5


def test_dpos_rewards_by_hand() -> None:
    batch = to_batch([group(expert(1.0, 2), expert(0.0, 1)), group(expert(0.0, 1), expert(1.0, 1), name="b")])
    batch = batch.with_columns(ref_logp=torch.tensor([[0, -2.0, -2.0], [0, -1.0, 0], [0, -1.0, 0], [0, -1.0, 0]]))
    meter = Meter()
    meter.add_pairs(batch, torch.tensor([[0, -1.0, -1.0], [0, -3.0, 0], [0, -1.0, 0], [0, -2.0, 0]]), [batch.trained], beta=0.5)
    found = meter.metrics()
    assert (found["rewards/chosen"], found["rewards/rejected"]) == ((1.0 - 0.5) / 2, -0.5)
    assert found["rewards/margins"] == 0.75 and found["rewards/accuracies"] == 0.5
    assert (found["logps/chosen"], found["logps/rejected"]) == (-2.0, -2.0)


def test_inner_updates_are_averaged_entry_by_entry() -> None:
    assert merge([{"loss": 1.0, "kl": 2.0}, {"loss": 3.0}]) == {"loss": 2.0, "kl": 2.0}
    assert merge([]) == {}


def test_of_inner_updates_times_add_up_and_the_largest_difference_stays() -> None:
    assert merge([{"computed/tokens": 8.0}, {"computed/tokens": 4.0}]) == {"computed/tokens": 12.0}
    lines = [{"time/backward": 1.0, DIFFERENCE + "max": 0.5, DIFFERENCE + "mean": 0.25}, {"time/backward": 2.0}]
    assert merge(lines) == {"time/backward": 3.0, DIFFERENCE + "max": 0.5, DIFFERENCE + "mean": 0.25}
    lines[1] |= {DIFFERENCE + "max": 0.75, DIFFERENCE + "mean": 0.75}
    assert merge(lines) == {"time/backward": 3.0, DIFFERENCE + "max": 0.75, DIFFERENCE + "mean": 0.5}
    assert without_logp_difference(lines[1]) == {"time/backward": 2.0}


def test_the_sampler_is_compared_with_the_weights_that_sampled() -> None:
    """Later inner updates score with weights that moved; the old log-probs are those of the weights that sampled."""
    t = Trajectory((1, 1), (Source.PROMPT, Source.POLICY), 1.0, behaviour_logp=(math.nan, -1.0))
    batch = to_batch([group(t)]).with_columns(old_logp=torch.tensor([[0, -1.125]]))
    meter = Meter()
    meter.add_scores(batch, torch.tensor([[0, -3.0]]), torch.zeros(1, 2), torch.zeros(1, 2), batch.trained)
    assert meter.metrics()[DIFFERENCE + "max"] == 0.125
