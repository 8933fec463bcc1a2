"""results.json against numbers computed here once more, from the files and with other means."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from synthetic import write_study

from crosstrain.errors import UserError
from crosstrain.studies.results import build_results, write_results

Results = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("study")
    write_study(where, fail=[("hpt", 1)])
    return where


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return write_results(folder)


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The evaluations of finished runs, by arm, read without the code under test."""
    found = {"base": [read(folder, "runs/base/evaluation.json")]}
    for run in read(folder, "study.json")["runs"]:
        if read(folder, f"{run['folder']}/record.json")["status"] == "finished":
            found.setdefault(run["arm"], []).append(read(folder, f"{run['folder']}/evaluation.json"))
    return found


def questions(evaluation: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [q for s in evaluation["sets"].values() if s["kind"] == kind for q in s["questions"]]


def measure(results: Results, key: str) -> dict[str, Any]:
    return next(m for m in results["measures"] if m["key"] == key)


def family(results: Results, key: str) -> dict[str, Any]:
    return next(f for f in results["families"] if f["measure"] == key)


def test_the_file_holds_what_is_returned_and_is_strict_json(folder: Path, results: Results) -> None:
    text = (folder / "results.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == results


def test_every_mean_is_recomputed_from_the_evaluations(folder: Path, results: Results) -> None:
    base = runs(folder)["base"][0]

    def any_right(q: dict[str, Any], k: int) -> float:
        draws = list(combinations(q["correct"], k))
        return sum(any(d) for d in draws) / len(draws)

    def nll(part: str, e: dict[str, Any]) -> float:
        pairs = zip(e["forgetting"][part], base["forgetting"][part], strict=True)
        return float(np.mean([a["nll"] / a["tokens"] - b["nll"] / b["tokens"] for a, b in pairs]))

    own, other = "in_distribution", "out_of_distribution"
    recomputed = {
        "accuracy": lambda e: np.mean([np.mean(q["correct"]) for q in questions(e, own)]),
        "ood_accuracy": lambda e: np.mean([np.mean(q["correct"]) for q in questions(e, other)]),
        "pass@2": lambda e: np.mean([any_right(q, 2) for q in questions(e, own)]),
        "pass@4": lambda e: np.mean([any_right(q, 4) for q in questions(e, own)]),
        **{
            f"accuracy/{name}": lambda e, name=name: np.mean([np.mean(q["correct"]) for q in e["sets"][name]["questions"]])
            for name in base["sets"]
        },
        "forgetting/nll": lambda e: nll("questions", e),
        "forgetting/accuracy": lambda e: (
            np.mean([q["correct"] for q in e["forgetting"]["questions"]])
            - np.mean([q["correct"] for q in base["forgetting"]["questions"]])
        ),
        "prose/nll": lambda e: nll("prose", e),
        "forward_kl": lambda e: np.mean(e["divergence"]["forward_kl"]),
        "reverse_kl": lambda e: np.mean(e["divergence"]["reverse_kl"]),
        "entropy": lambda e: np.mean(e["divergence"]["entropy"]),
        "distinct_frac": lambda e: np.mean([q["distinct"] / 8 for q in questions(e, own)]),
        "response_length": lambda e: np.mean([np.mean(q["lengths"]) for q in questions(e, own)]),
        "unparsed_frac": lambda e: np.mean([1 - np.mean(q["parsed"]) for q in questions(e, own)]),
    }
    assert {m["key"] for m in results["measures"]} == set(recomputed)
    for key, mean in recomputed.items():
        for arm, evaluations in runs(folder).items():
            found = measure(results, key)["arms"][arm]
            by_seed = [float(mean(e)) for e in evaluations]
            assert found["mean"] == pytest.approx(np.mean(by_seed), abs=1e-12), (key, arm)
            assert found["by_seed"] == ([] if arm == "base" else pytest.approx(by_seed))


def test_a_planned_contrast_is_recomputed_from_its_formula(folder: Path, results: Results) -> None:
    """sft -> grpo against sft, all by hand: two sets of 64 questions, seeds' variance pooled over six arms."""
    every = {
        arm: np.array([[np.mean(q["correct"]) for q in questions(e, "in_distribution")] for e in found])
        for arm, found in runs(folder).items()
        if arm != "base"
    }
    total = noise = df = 0.0
    for y in every.values():
        s = len(y)
        df += s - 1
        total += (s - 1) * y.mean(1).var(ddof=1)
        for part in (y[:, :64], y[:, 64:]):
            rest = part - part.mean(1, keepdims=True) - part.mean(0) + part.mean()
            noise += (s - 1) * 0.25 * (rest**2).sum() / ((s - 1) * 63) / 64
    total, noise = total / df, noise / df
    d = every["sft -> grpo"].mean(0) - every["sft"].mean(0)
    w = [0.25 * part.var(ddof=1) / 64 for part in (d[:64], d[64:])]
    c = 2 / 3
    variance = sum(w) + c * max(0.0, total - noise)
    freedom = variance**2 / (sum(x**2 / 63 for x in w) + ((c * total) ** 2 / df if total > noise else 0.0))
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    found = next(x for x in family(results, "accuracy")["contrasts"] if (x["arm"], x["against"]) == ("sft -> grpo", "sft"))
    assert df == 11  # five arms of three seeds and one of two
    assert (found["difference"], found["se"], found["df"]) == pytest.approx((d.mean(), math.sqrt(variance), freedom))
    assert (found["low"], found["high"]) == pytest.approx((d.mean() - half, d.mean() + half))
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(d.mean()) / math.sqrt(variance), freedom))


def test_holm_and_the_verdicts_are_recomputed(results: Results) -> None:
    for one in results["families"]:
        ps = sorted((c["p"], i) for i, c in enumerate(one["contrasts"]))
        running = 0.0
        for rank, (p, i) in enumerate(ps):
            running = max(running, min(1.0, p * (len(ps) - rank)))
            c = one["contrasts"][i]
            assert c["p_holm"] == pytest.approx(running)
            good = (c["difference"] > 0) == (one["direction"] == "higher")
            assert c["verdict"] == ("cannot tell" if running >= 0.05 else "better" if good else "worse")


def test_the_planned_contrasts_are_those_of_the_issue(results: Results) -> None:
    """Every arm against the base; every arm that samples against sft and against sft -> grpo, and no pair twice."""
    found = [(c["arm"], c["against"]) for c in family(results, "accuracy")["contrasts"]]
    assert found == [
        *((arm, "base") for arm in ("sft", "dft", "grpo", "sft -> grpo", "luffy", "hpt")),
        *((arm, "sft") for arm in ("grpo", "sft -> grpo", "luffy", "hpt")),
        *((arm, "sft -> grpo") for arm in ("grpo", "luffy", "hpt")),
    ]
    assert [f["role"] for f in results["families"]] == ["primary", "secondary", "secondary"]
    assert family(results, "forgetting/nll")["direction"] == "lower"


def test_the_leader_is_compared_with_everyone_under_all_pairs(results: Results) -> None:
    one = family(results, "accuracy")
    means = {name: found["mean"] for name, found in measure(results, "accuracy")["arms"].items()}
    assert one["leader"] == max((n for n in means if n != "base"), key=means.__getitem__)
    assert one["all_pairs"] == 21
    assert {c["against"] for c in one["leader_against"]} == set(means) - {one["leader"]}
    for c in one["leader_against"]:
        assert c["difference"] == pytest.approx(means[one["leader"]] - means[c["against"]])
        assert c["low"] <= c["difference"] <= c["high"]
        assert c["p_holm"] >= c["p"]


def test_costs_and_runs_are_those_of_the_records(folder: Path, results: Results) -> None:
    arms = {arm["name"]: arm for arm in results["arms"]}
    for unit in ("processed_tokens", "generated_tokens", "flops", "demonstrations", "seconds"):
        spent = [read(folder, f"runs/hpt/seed-{s}/record.json")["cost"][unit] for s in (0, 2)]
        assert arms["hpt"]["cost"][unit] == pytest.approx(np.mean(spent))
    assert [run["status"] for run in arms["hpt"]["runs"]] == ["finished", "failed", "finished"]
    assert arms["hpt"]["runs"][1]["error"].startswith("step 8: the loss is NaN")
    assert arms["hpt"]["seeds"] == [0, 2]
    assert [arm["rewarded"] for arm in results["arms"]] == [False, False, False, True, True, True, True]


def test_pass_at_k_goes_to_half_the_samples_and_starts_at_the_accuracy(results: Results) -> None:
    for arm, points in results["pass_at_k"].items():
        assert [p["k"] for p in points] == [1, 2, 3, 4]
        assert points[0]["mean"] == pytest.approx(measure(results, "accuracy")["arms"][arm]["mean"])
        assert [p["mean"] for p in points] == sorted(p["mean"] for p in points)


def test_one_seed_says_nothing_about_methods(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=[0], arms=["sft", "grpo"])
    found = build_results(tmp_path)
    assert found["scope"] == "these models"
    for c in family(found, "accuracy")["contrasts"]:
        assert c["verdict"] == "cannot tell"
        assert c["smallest_detectable"] is None
        assert c["low"] < c["difference"] < c["high"]  # about these very models
    arm = measure(found, "accuracy")["arms"]["sft"]
    assert arm["seed_sd"] is None


def test_an_arm_without_a_finished_run_is_listed_and_not_compared(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=[0, 1], arms=["sft", "grpo"], fail=[("grpo", 0), ("grpo", 1)])
    found = build_results(tmp_path)
    assert "grpo" not in measure(found, "accuracy")["arms"]
    against = {c["arm"]: c for c in family(found, "accuracy")["contrasts"]}
    assert against["grpo"]["difference"] is None
    assert against["grpo"]["verdict"] == "cannot tell"
    assert against["sft"]["p_holm"] == against["sft"]["p"]  # one comparison was made


def test_a_study_that_has_just_begun(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=[0], arms=["sft"])
    for file in (tmp_path / "runs/sft/seed-0").iterdir():
        file.unlink()
    found = build_results(tmp_path)
    assert found["arms"][1]["runs"][0]["status"] == "not started"
    assert family(found, "accuracy")["leader"] is None


def test_other_questions_are_refused(tmp_path: Path) -> None:
    write_study(tmp_path, arms=["sft", "grpo"])
    file = tmp_path / "runs/grpo/seed-1/evaluation.json"
    evaluation = json.loads(file.read_text())
    evaluation["sets"]["sums"]["questions"][3]["id"] = "sums:999"
    file.write_text(json.dumps(evaluation))
    with pytest.raises(UserError, match="grpo, seed 1 was asked other questions"):
        build_results(tmp_path)


def test_a_folder_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no study\.json"):
        build_results(tmp_path)
