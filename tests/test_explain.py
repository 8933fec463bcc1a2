"""`explain`: the weights of a batch whose log-probs are given are those of training, and what is missing is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosstrain.cli import main
from crosstrain.config.files import load, parse
from crosstrain.errors import UserError
from crosstrain.explain import GivenBatch, explain
from crosstrain.methods import METHODS, load_method
from crosstrain.objective.reduce import count, term_loss
from crosstrain.testing import made_up_batch, made_up_examples, tiny_model
from crosstrain.types import Batch, Method, Scores, Source

EXAMPLES = sorted((Path(__file__).parents[1] / "examples" / "explain").glob("*.json"))


def batch_of(*trajectories: dict[str, Any]) -> GivenBatch:
    return parse(GivenBatch, {"groups": [{"trajectories": list(trajectories)}]})


def own(n: int, reward: float | None, **more: Any) -> dict[str, Any]:
    return {"source": ["prompt"] + ["policy"] * n, "logp": [0.0] + [-1.0] * n, "reward": reward, **more}


def shown(n: int, reward: float | None = None, **more: Any) -> dict[str, Any]:
    return own(n, reward, **more) | {"source": ["prompt"] + ["expert"] * n}


def test_grpo_by_hand() -> None:
    """Ratios 1, e^0.4 (past 1.2: no gradient) and e^-0.7 in a right answer, e^0.1 in a wrong one; A = +-0.7071."""
    given = load(GivenBatch, EXAMPLES[0].parent / "grpo.json")
    found = explain(load_method("grpo", beta=0.0), given)
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    right, wrong = (t["weights"] for t in found["groups"][0]["trajectories"])
    assert right == pytest.approx([0.0, a / 6, 0.0, math.exp(-0.7) * a / 6])
    assert wrong == pytest.approx([0.0, -math.exp(0.1) * a / 2])
    assert found["groups"][0]["advantage"] == pytest.approx([a, -a])
    assert found["terms"] == [{"name": "rl", "loss": pytest.approx(found["loss"]), "denominator": 2.0, "tokens": 4}]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_the_worked_batches_run_and_print_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", file.stem, "--batch", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    given = load(GivenBatch, file)
    assert set(found) == {"method", "settings", "loss", "terms", "groups"}
    shapes = [[len(t["weights"]) for t in g["trajectories"]] for g in found["groups"]]
    assert shapes == [[len(t.source) for t in g.trajectories] for g in given.groups]
    assert any(w for g in found["groups"] for t in g["trajectories"] for w in t["weights"])
    assert main(["explain", file.stem, "--batch", str(file)]) == 0
    assert "This step would make" in capsys.readouterr().out


def given_of(method: Method, batch: Batch, logp: Tensor) -> GivenBatch:
    """A made-up batch as a file would have it: with the demonstrations that `select` took away, if any, at the end of groups."""
    groups: dict[int, list[dict[str, Any]]] = {}
    names: dict[int, str] = {}
    for r in range(len(batch)):
        n = int(batch.length[r])
        row: dict[str, Any] = {
            "source": [Source(int(s)).name.lower() for s in batch.source[r, :n]],
            "logp": logp[r, :n].tolist(),
            "reward": None if math.isnan(float(batch.reward[r])) else float(batch.reward[r]),
        }
        row["replayed"] = bool("replayed" in batch.columns and batch.columns["replayed"][r])
        for name in ("old_logp", "ref_logp", "teacher_logp", "entropy", "behaviour_logp"):
            if name in batch.columns:
                row[name] = batch.columns[name][r, :n].nan_to_num().tolist()
        groups.setdefault(int(batch.group[r]), []).append(row)
        names[int(batch.group[r])] = batch.example_ids[r]
    if method.plan.brings("train") and method.plan.start(made_up_examples(method)[0], method.init()):
        for rows in groups.values():
            rows += [] if any("policy" not in row["source"] for row in rows) else [taken_away(rows[0])]
    stream = "demos" if "demos" in method.plan.streams(method.init()) else "train"
    listed = [{"id": names[g], "stream": stream, "trajectories": rows} for g, rows in groups.items()]
    return parse(GivenBatch, {"groups": listed})


def taken_away(row: dict[str, Any]) -> dict[str, Any]:
    """A demonstration with the same prompt as a row of a group, and the same lists."""
    n = row["source"].index("policy")
    lists = {name: [*values[:n], -9.0] for name, values in row.items() if isinstance(values, list)}
    return {**lists, "source": ["prompt"] * n + ["expert"]}


WHOLE = [name for name in METHODS if load_method(name).channels or load_method(name).comparisons]
VALUED = [name for name in METHODS if "value" in load_method(name).needs]
WITHOUT_COLUMNS = [name for name in METHODS if not load_method(name).columns and name not in (*WHOLE, *VALUED)]


@pytest.mark.parametrize("name", [n for n in WITHOUT_COLUMNS if n not in ("remax", "chord_mu", "chord_phi")])
def test_weights_are_those_that_training_reads_off(name: str) -> None:
    """The groups that a method selected, selected again, and its terms on the same numbers."""
    method = load_method(name)
    batch = made_up_batch(method, tiny_model())
    generator = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(batch.tokens.shape, generator=generator, dtype=torch.float64)
    entropy = torch.where(batch.trained, -logp / 2, torch.zeros_like(logp))
    batch = batch.with_columns(entropy=entropy) if "entropy" in method.needs else batch
    leaf = torch.where(batch.trained, logp, torch.zeros_like(logp)).requires_grad_()
    counts = count(method.terms, batch, groups=len(torch.unique(batch.group)))
    parts = [term_loss(t, Scores(leaf, {"entropy": entropy}), batch, counts) for t in method.terms]
    (gradient,) = torch.autograd.grad(sum(p.loss for p in parts if p is not None), leaf)
    found = explain(method, given_of(method, batch, logp))
    weights = [t["weights"] for g in found["groups"] for t in g["trajectories"] if t["selected"]]
    assert len(weights) == len(batch)
    for r, row in enumerate(weights):
        assert row == pytest.approx((-gradient[r, : int(batch.length[r])]).tolist(), abs=1e-6), f"row {r}"


def test_what_a_method_drops_has_no_weight() -> None:
    found = explain(load_method("raft"), batch_of(own(2, 1.0), own(1, 0.0)))
    [group] = found["groups"]
    assert [t["selected"] for t in group["trajectories"]] == [True, False]
    assert group["trajectories"][1]["weights"] == [0.0, 0.0] and group["advantage"] == [1.0, None]
    dropped = explain(load_method("raft"), batch_of(own(2, 0.0)))
    assert not dropped["groups"][0]["selected"] and dropped["loss"] == 0.0


def test_remax_takes_the_greedy_answers_reward_off() -> None:
    found = explain(load_method("remax"), batch_of(own(1, 1.0), own(2, 0.25, greedy=True)))
    assert found["groups"][0]["advantage"] == [0.75, None]
    assert [t["weights"] for t in found["groups"][0]["trajectories"]] == [pytest.approx([0.0, 0.75]), [0.0, 0.0, 0.0]]


def test_a_credit_that_differs_by_token_is_a_list() -> None:
    prefix = {"source": ["prompt", "expert", "policy"], "logp": [0, -1, -1], "entropy": [0, 1, 1], "reward": 1.0}
    plain = own(1, 0.5, entropy=[0, 1])
    found = explain(load_method("prefix_rft", entropy_share=1.0), batch_of(prefix, plain))
    assert found["groups"][0]["advantage"] == [[None, 0.5, 1.0], 0.0]


@pytest.mark.parametrize(
    ("name", "trajectories", "message"),
    [
        ("dpo", [shown(1, 1.0), shown(1, 0.0)], "method dpo needs `ref_logp`, which is absent from groups.0.trajectories.0"),
        (
            "grpo",
            [own(1, 1.0, old_logp=[0, -1]), own(1, 0.0)],
            "`old_logp` is in some trajectories and absent from groups.0.traj",
        ),
        ("rloo", [own(2, 1.0) | {"logp": [0, -1]}], r"groups.0.trajectories.0.logp: got 2 numbers for 3 tokens"),
        ("rloo", [own(1, 1.0) | {"logp": [0, 0.5]}], r"groups.0.trajectories.0.logp.1: got 0.5; a log-prob is at most 0"),
        ("rloo", [own(1, 1.0) | {"source": ["policy", "policy"]}], "put 'prompt' before it"),
        ("gem", [own(1, 1.0)], "looks at the whole next-token distribution"),
        ("prefix_rft", [own(1, 1.0), own(1, 0.0)], "method prefix_rft needs `entropy`, which is absent"),
    ],
)
def test_what_is_wrong_or_missing_is_named(name: str, trajectories: list[dict[str, Any]], message: str) -> None:
    settings = {"beta": 0.0} if name == "grpo" else {}
    with pytest.raises(UserError, match=message):
        explain(load_method(name, **settings), batch_of(*trajectories))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": [0, 1]}, "unknown key 'groups.0.trajectories.0.logps'; did you mean 'logp'"),
        ({"source": ["prompt", "model"]}, "groups.0.trajectories.0.source.1: must be 'prompt', 'expert', 'policy' or 'tool'"),
        ({"logp": [0, float("nan")]}, "finite"),
    ],
)
def test_a_file_that_is_wrong_is_told_where(tmp_path: Path, change: dict[str, Any], message: str, capsys: Any) -> None:
    file = tmp_path / "batch.json"
    file.write_text(json.dumps({"groups": [{"trajectories": [own(1, 1.0) | change]}]}))
    assert main(["explain", "rloo", "--batch", str(file)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "author", "rewards", "why"),
    [
        ("rloo", "policy", [1.0, 1.0], "no token has a weight"),
        ("dapo", "policy", [1.0, 1.0], "dapo leaves out every group"),
        (
            "rloo",
            "tool",
            [1.0, 0.0],
            "no term of rloo is on what the batch has, which is tools' words; `crosstrain methods show rloo`",
        ),
    ],
)
def test_why_a_step_would_teach_nothing(
    tmp_path: Path, method: str, author: str, rewards: list[float], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "batch.json"
    rows = [own(2, r) | {"source": ["prompt", author, author]} for r in rewards]
    file.write_text(json.dumps({"groups": [{"trajectories": rows}]}))
    assert main(["explain", method, "--batch", str(file)]) == 0
    assert f"teach nothing: {why}" in " ".join(capsys.readouterr().out.split())
