"""The benchmark's turns, its choice of the peer's setting, and its numbers, with workers that only claim to have worked."""

import json
import subprocess
import sys
from dataclasses import replace

import benchmarks.__main__ as bench
import pytest
import torch
from benchmarks import pair
from benchmarks.checks import curves, greedy
from benchmarks.limit import training
from benchmarks.pair import Side, Steps, WorkerFailed, by_speed, in_turn_with_floor
from benchmarks.products import inputs, training_products, weights_of
from benchmarks.works import WORKS
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from crosstrain.training.optimizer import Optimizer

WORKER = """
import json, sys, time
name, journal, *lines = json.loads(sys.argv[1])
print(json.dumps({"ready": True, "needed_gb": 1.5}), flush=True)
steps = iter(lines)
for word in map(str.strip, sys.stdin):
    open(journal, "a").write(f"{name} {word}\\n")
    if word == "stop":
        break
    if word == "floor":
        print(json.dumps({"amount": 10, "products": 1.0, "kernels": 1.0}), flush=True)
        continue
    line = next(steps, None)
    if line is None:
        sys.exit("no memory is left")
    time.sleep(line.pop("sleep", 0))
    print(json.dumps({"amount": 10, "memory_gb": 3.0, **line}), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    """A side that answers with these lines, one per step, and then ends with an error."""

    def make(name, *lines, label=None):
        given = json.dumps([name, str(tmp_path / "journal"), *lines])
        return Side([sys.executable, "-c", WORKER, given], name, label or name)

    return make


def took(*seconds):
    return [{"seconds": s} for s in seconds]


def journal(tmp_path):
    return (tmp_path / "journal").read_text().splitlines()


def test_settings_are_ordered_by_their_step_and_not_by_its_warm_up(worker, tmp_path):
    slow, quick = worker("slow", *took(1.0, 5.0)), worker("quick", *took(2.0, 4.0))
    order, tried = by_speed([slow, quick], tmp_path)
    assert [side.name for side in order] == ["quick", "slow"]
    assert tried == {"slow": 2.0, "quick": 2.5}


def test_settings_whose_first_warm_up_is_long_are_compared_by_it(worker, tmp_path):
    sides = [worker("one", *took(pair.LONG + 1)), worker("other", *took(20.0))]  # a second step would be an error
    order, tried = by_speed(sides, tmp_path)
    assert [side.name for side in order] == ["other", "one"]
    assert tried == {"one": 10 / (pair.LONG + 1), "other": 0.5}


def test_a_setting_that_fails_is_left_out(worker, tmp_path, capsys):
    order, tried = by_speed([worker("broken"), worker("sound", *took(1.0, 1.0))], tmp_path)
    assert [side.name for side in order] == ["sound"]
    assert tried == {"broken": 0.0, "sound": 10.0}
    assert "broken: no memory is left" in capsys.readouterr().out


def test_no_setting_that_works_is_an_error(worker, tmp_path):
    with pytest.raises(WorkerFailed, match="none of the peer's settings works for one"):
        by_speed([worker("one"), worker("other")], tmp_path)


@pytest.mark.parametrize("late", [0, 1])
def test_a_setting_that_takes_much_longer_is_given_up(worker, tmp_path, monkeypatch, late):
    monkeypatch.setattr(pair, "SETUP", 2.0)
    lines = took(1.0, 1.0)
    lines[late]["sleep"] = 60
    order, tried = by_speed([worker("quick", *took(1.0, 1.0)), worker("slow", *lines)], tmp_path)
    assert [side.name for side in order] == ["quick"]
    assert tried == {"quick": 10.0, "slow": None}


def test_workers_begin_in_turn_and_floors_come_after_both(worker, tmp_path):
    ours, peer = worker("ours", *took(9, 1, 2, 3)), worker("peer", *took(9, 4, 5, 6))
    mine, theirs, floors, needed = in_turn_with_floor(ours, peer, tmp_path, 3)
    one, other = ["ours go", "peer go"], ["peer go", "ours go"]
    asked = [line for line in journal(tmp_path) if not line.endswith("stop")]
    assert asked == [*one, "ours floor", *one, "ours floor", *other, "ours floor", *one, "ours floor"]
    assert mine.seconds == [0.1, 0.2, 0.3]  # without the warm-up's 9
    assert theirs.seconds == [0.4, 0.5, 0.6]
    assert len(floors.lines) == 3
    assert needed == 1.5


def steps(*pairs, **more):
    return Steps(tuple({"seconds": s, "amount": a, "memory_gb": 3.0, **more} for s, a in pairs))


def test_a_row_has_medians_and_the_limits_of_neighbouring_steps():
    ours, peer = steps((1.0, 10), (2.0, 10), (4.0, 20)), steps((8.0, 10), (8.0, 20), (9.0, 15))
    peer = Steps(tuple({**line, "memory_gb": m} for line, m in zip(peer.lines, (4.0, 6.0, 5.0), strict=True)))
    floor = Steps(tuple({"amount": a, "products": 0.5, "kernels": 0.3} for a in (10, 10, 20)))
    row = bench.row_of(replace(WORKS[0], target=2.9), "fp32", ours, peer, floor, 1.5)
    # seconds per unit: ours 0.1, 0.2, 0.2; peer 0.8, 0.4, 0.6
    assert (row.ours, row.peer) == (pytest.approx(5.0), pytest.approx(10 / 6))
    assert (row.ratio, row.ratio_min, row.ratio_max) == tuple(map(pytest.approx, (3.0, 2.0, 8.0)))
    assert row.met
    assert not bench.row_of(replace(WORKS[0], target=3.1), "fp32", ours, peer, floor, 1.5).met
    # least seconds per unit: products 0.05, 0.05, 0.025; with kernels 0.08, 0.08, 0.04
    assert row.products_limit == pytest.approx(16.0)
    assert row.limit == pytest.approx(10.0)
    assert (row.memory_ratio, row.memory_limit, row.memory_met) == (0.5, 0.25, True)
    assert row.steps == 3


@pytest.fixture
def sides(worker, monkeypatch, tmp_path):
    """A benchmark whose workers are the given ones: ours, and the peer's by the label of their settings."""
    monkeypatch.setattr(bench, "FOLDER", tmp_path)

    def make(ours, peers, search=True):
        def side(self, who, python, work, precision, settings):
            name = "ours" if who == "ours" else bench.label(settings)
            return worker(name, *(ours if who == "ours" else peers[name]))

        monkeypatch.setattr(bench.Bench, "_side", side)
        return bench.Bench("model", "python", "cpu", tmp_path / "rows.json", 2, search)

    return make


SFT = ["micro-batch 16", "micro-batch 16, attention eager", "micro-batch 8"]


def test_the_peer_is_measured_at_its_fastest_setting(sides):
    peers = dict(zip(SFT, (took(9, 3, 3), took(9, 2, 2), took(9, 4, 4)), strict=True))
    chosen = {}
    row = bench.compare(sides(took(9, 1, 1), peers), WORKS[0], "bf16", chosen)
    assert row.peer_settings == "TRL: micro-batch 16, attention eager"
    assert row.ratio == 2
    assert list(row.peer_tried) == SFT
    # the choice of the first precision holds for the others
    slower = dict(zip(SFT, (took(9, 1, 1), took(9, 8, 8), took(9, 1, 1)), strict=True))
    assert bench.compare(sides(took(9, 1, 1), slower), WORKS[0], "mixed", chosen).ratio == 8


def test_the_next_setting_is_measured_where_the_fastest_fails_beside_ours(sides, capsys):
    # alone it manages two steps, and three beside ours are asked for
    peers = dict(zip(SFT, (took(9, 2), took(9, 3, 3), took(9, 4, 4)), strict=True))
    row = bench.compare(sides(took(9, 1, 1), peers), WORKS[0], "fp32", {})
    assert row.peer_settings == "TRL: micro-batch 16, attention eager"
    assert row.ratio == pytest.approx(3)
    assert "micro-batch 16 failed beside ours: no memory is left" in capsys.readouterr().out


def test_our_own_failure_is_not_the_peers(sides):
    peers = {name: took(9, 2, 2) for name in SFT}
    with pytest.raises(WorkerFailed, match="ours ended without an answer") as caught:
        bench.compare(sides(took(9), peers), WORKS[0], "fp32", {})
    assert caught.value.side.name == "ours"


def test_curves_are_compared_by_their_largest_difference(worker, tmp_path):
    def losses(*values):
        return [{"seconds": 1.0, "loss": v} for v in values]

    ours, peer = worker("ours", *losses(1.0, 2.0, 3.0)), worker("peer", *losses(1.0, 2.5, 2.75))
    [check] = curves(ours, peer, tmp_path, 3, "SFT", ["loss"])
    assert (check.value, check.met) == (0.5, False)
    [check] = curves(ours, peer, tmp_path, 3, "SFT", ["loss"], limit=0.5)
    assert check.met


@pytest.mark.parametrize(("tokens", "share"), [([[1, 2], [3, 4]], 0.0), ([[1, 2], [3, 5]], 0.5)])
def test_greedy_answers_are_compared_by_the_share_that_differs(worker, tmp_path, tokens, share):
    line = {"seconds": 1.0, "tokens": [[1, 2], [3, 4]]}
    check = greedy(worker("ours", line), worker("peer", {**line, "tokens": tokens}), tmp_path)
    assert (check.value, check.met) == (share, share == 0)


def test_a_worker_says_what_a_step_took_and_nothing_else():
    code = """
from benchmarks.worker import Pace, serve
import time
def step():
    print("noise")
    time.sleep(0.05)
    return {"amount": 7, "loss": 0.5}
serve(Pace(), step, lambda: {"products": 0.25}, more_gb=2.0)
"""
    done = subprocess.run([sys.executable, "-c", code], input="go\nfloor\nstop\n", capture_output=True, text=True, check=True)
    ready, went, floor = map(json.loads, done.stdout.splitlines())
    assert ready["ready"]
    assert 2.0 < ready["needed_gb"] < 2.5
    assert (went["amount"], went["loss"]) == (7, 0.5)
    assert 0.05 <= went["seconds"] < 5
    assert (floor["amount"], floor["products"]) == (7, 0.25)
    assert "noise" in done.stderr


def test_the_products_of_a_limit_are_those_that_training_takes():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    rows, length = 8, 64
    texts = [[i + 1, *((7 * i + 3 * j) % 40 + 1 for j in range(length - 1))] for i in range(rows)]
    step = training(model, Optimizer(model, "fp32"), texts)
    weights = weights_of(model)
    tokens, predictions = rows * length, rows * (length - 1)
    with FlopCounterMode(display=False) as real:
        step()
    with FlopCounterMode(display=False) as alone:
        training_products(weights, inputs(weights, tokens, predictions), tokens, predictions)

    taken = real.get_flop_counts()["Global"]
    # attention's products are batched ones
    assert alone.get_total_flops() == taken[torch.ops.aten.mm] + taken[torch.ops.aten.addmm]
