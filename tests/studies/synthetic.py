"""A made-up study's folder with every file that a real one leaves: plausible arms, and failures and hostile text on request.

Run as a script it writes one and its report: `synthetic.py DIR`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crosstrain.config import StudySpec, config_hash, load_study
from crosstrain.studies.layout import study_runs

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic.yaml"
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> & <b>17</b>"
MODEL = "SmolLM2-135M-Instruct from its 4-bit (Q4_1) file, dequantised"

# log-odds of a right answer in distribution, of one out of distribution, what is forgotten (nats per token), seconds, samples?
STRENGTH: dict[str, tuple[float, float, float, float, bool]] = {
    "base": (-1.7, -1.6, 0.0, 0.0, False),
    "sft": (0.5, -0.6, 0.34, 62.0, False),
    "dft": (0.1, -0.5, 0.12, 66.0, False),
    "grpo": (-0.6, -0.8, 0.03, 118.0, True),
    "sft -> grpo": (0.9, 0.1, 0.27, 96.0, True),
    "luffy": (0.6, -0.1, 0.21, 121.0, True),
    "hpt": (0.2, -0.4, 0.17, 124.0, True),
}


def write_study(
    folder: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    fail: Sequence[tuple[str, int]] = (),
    quick: bool = False,
    hostile: bool = False,
    seed_sd: float = 0.12,
    arms: Sequence[str] | None = None,
) -> StudySpec:
    """Fill `folder` with a study of the bundled example's arms; runs in `fail` have failed. Returns its spec."""
    sizes = {"out_of_distribution": 24, "in_distribution": 64}
    overrides = [f"shared.evaluation.{k}.{i}.size={n}" for k, n in sizes.items() for i in range(4 if n == 24 else 2)]
    more = ["shared.evaluation.samples_per_question=8", "shared.evaluation.pass_at_k=[1,2,4]"]
    spec = load_study(EXAMPLE, [*overrides, *more, "shared.evaluation.forgetting_questions=null"])
    kept = [arm for arm in spec.arms if arms is None or arm.name in arms]
    spec = spec.model_copy(update={"seeds": list(seeds), "arms": kept})
    rng = np.random.default_rng(7)
    world = _World(spec, rng, hostile)
    _write(folder / "runs/base/evaluation.json", world.evaluation("base", 0.0))
    _write(folder / "runs/base/record.json", {"status": "finished", "model": MODEL, "cost": {"seconds": 41.0}})
    _write_lines(folder / "runs/base/samples.jsonl", world.samples("base", rng))
    runs = study_runs(spec)
    for run in runs:
        where = folder / run.folder
        _write(where / "recipe.json", {"recipe": spec.recipe(run.arm, run.seed).model_dump(mode="json")})
        lines = _metrics(run.arm, rng)
        if (run.arm, run.seed) in fail:
            _write_lines(where / "metrics.jsonl", lines[:7])
            error = {"type": "FloatingPointError", "message": "step 8: the loss is NaN <b>here</b>", "traceback": "..."}
            _write(where / "record.json", {"status": "failed", "error": error})
            continue
        _write_lines(where / "metrics.jsonl", lines)
        _write(where / "evaluation.json", world.evaluation(run.arm, float(rng.normal(0, seed_sd))))
        _write_lines(where / "samples.jsonl", world.samples(run.arm, rng))
        _write(where / "record.json", _record(run.arm, lines))
    _write(folder / "study.json", _study(spec, runs, quick))
    return spec


class _World:
    """Questions with their difficulty, the same for every model."""

    def __init__(self, spec: StudySpec, rng: np.random.Generator, hostile: bool) -> None:
        self.sets = [("in_distribution", s) for s in spec.shared.evaluation.in_distribution]
        self.sets += [("out_of_distribution", s) for s in spec.shared.evaluation.out_of_distribution]
        self.n = spec.shared.evaluation.samples_per_question
        self.rng, self.hostile = rng, hostile
        self.difficulty = {s.name: rng.normal(0, 1.4, s.size) for _, s in self.sets}
        self.gain = {(a, s.name): rng.normal(0, 0.5, s.size) for a in STRENGTH for _, s in self.sets}
        self.gold = rng.gamma(2.0, 1.1, 160)
        self.tokens = rng.integers(1, 6, 160)
        self.prose = rng.normal(3.1, 0.4, 24)
        self.correct: dict[str, np.ndarray[Any, Any]] = {}

    def evaluation(self, arm: str, luck: float) -> dict[str, Any]:
        own, other, forgets, _, _ = STRENGTH[arm]
        rng, sets = self.rng, {}
        for kind, s in self.sets:
            level = (own if kind == "in_distribution" else other) + luck
            p = 1 / (1 + np.exp(-(level + self.difficulty[s.name] + self.gain[arm, s.name] + rng.normal(0, 0.3, s.size))))
            self.correct[s.name] = correct = (rng.random((s.size, self.n)) < p[:, None]).astype(float)
            questions = [
                {
                    "id": f"{s.name}:{i}",
                    "correct": row.tolist(),
                    "parsed": [bool(x) for x in rng.random(self.n) < (0.8 if arm == "base" else 0.98)],
                    "lengths": rng.integers(2, 10, self.n).tolist(),
                    "distinct": int(1 + rng.integers(0, 5 if arm in ("base", "grpo") else 3)),
                }
                for i, row in enumerate(correct)
            ]
            sets[s.name] = {"kind": kind, "task": s.task, "task_version": "1", "n": self.n, "questions": questions}
        nll = np.maximum(self.gold + forgets + luck * 0.1 + rng.normal(0, 0.25, 160) * (arm != "base"), 0.01) * self.tokens
        prose = (self.prose + 0.3 * forgets + rng.normal(0, 0.03, 24) * (arm != "base")) * 60
        moved = 0.0 if arm == "base" else 3.0 * abs(forgets) + 0.8
        return {
            "schema_version": 1,
            "sets": sets,
            "forgetting": {
                "suite_version": 1,
                "questions": [
                    {"id": f"q{i}", "nll": float(v), "tokens": int(t), "correct": int(rng.random() < math.exp(-v / t))}
                    for i, (v, t) in enumerate(zip(nll, self.tokens, strict=True))
                ],
                "prose": [{"id": f"p{i}", "nll": float(v), "tokens": 60} for i, v in enumerate(prose)],
            },
            "divergence": {
                "prompts": [f"sums:{i}" for i in range(32)],
                "forward_kl": (moved * rng.gamma(4, 0.25, 32)).tolist(),
                "reverse_kl": (1.2 * moved * rng.gamma(4, 0.25, 32)).tolist(),
                "entropy": (rng.gamma(4, 0.6, 32) / (1 + moved)).tolist(),
            },
            "metrics": {},
            "seconds": {"sampling": 10.0},
        }

    def samples(self, arm: str, rng: np.random.Generator) -> list[dict[str, Any]]:
        lines = []
        for _, s in self.sets:
            for i, row in enumerate(self.correct[s.name]):
                a, b = 3 + 7 * i % 40, 5 + 11 * i % 50
                for right in row:
                    said = str(a + b + (0 if right else int(rng.integers(1, 9))))
                    if arm == "base" and not right:
                        said = f"To find the sum of {a} and {b}, we first add the ones and then the tens, so"
                    if self.hostile and i == 0:
                        said = HOSTILE
                    prompt = f"What is {a} + {b}? Answer with just the number."
                    lines.append({"set": s.name, "id": f"{s.name}:{i}", "prompt": prompt, "completion": said, "correct": right})
        return lines


def _metrics(arm: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    level, _, _, seconds, samples = STRENGTH[arm]
    steps = 28 if samples else 40
    lines = []
    for step in range(1, steps + 1):
        done = step / steps
        shown = 1 / (1 + math.exp(-(-1.7 + (level + 1.7) * (1 - math.exp(-3 * done)) / 0.95 + rng.normal(0, 0.25))))
        line = {
            "step": step,
            "stage": int(arm == "sft -> grpo" and done > 0.5),
            "method": arm,
            "loss": float(1.6 * math.exp(-2 * done) + rng.normal(0, 0.05)) if not samples else float(rng.normal(0, 0.02)),
            "entropy": float(0.9 * math.exp(-done) + rng.normal(0, 0.03)),
            "learning_rate": 1e-5,
            "grad_norm": float(rng.gamma(4, 0.4)),
            "cost/processed_tokens": 1250 * step * (3 if samples else 1),
            "cost/generated_tokens": 310 * step if samples else 0,
            "cost/flops": 3e13 * done * 1.01,
            "cost/demonstrations": 0 if arm == "grpo" else 8 * step,
            "cost/seconds": seconds * done * float(1 + rng.normal(0, 0.005)),
        }
        if samples and (arm != "sft -> grpo" or done > 0.5):
            line |= {"reward": shown, "reward_std": 0.3, "frac_reward_zero_std": 0.2}
        lines.append(line)
    return lines


def _record(arm: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    stages = arm.split(" -> ")
    return {
        "status": "finished",
        "model": MODEL,
        "parameters": 134_515_008,
        "precision": "mixed",
        "layout": "shared",
        "sampler": "fast",
        "template_hash": "3f5f9a",
        "data": {"train": {"hash": "d0c1", "rows": 1024}},
        "methods": [
            {
                "name": name,
                "paper": "",
                "settings": {"num_generations": 8, "beta": 0.0} if STRENGTH.get(name, STRENGTH["sft"])[4] else {},
                "updates": {"epochs": 1, "minibatches": 1},
                "terms": [{"name": name, "loss": "-log pi", "per": "own_tokens", "coef": 1.0, "needs": []}],
            }
            for name in stages
        ],
        "stages": [{"method": name, "steps": len(lines) // len(stages), "ended_by": "budget"} for name in stages],
        "warnings": [],
        "cost": {k.removeprefix("cost/"): v for k, v in lines[-1].items() if k.startswith("cost/")},
        "steps": len(lines),
        "skipped_steps": 0,
        "peak_memory_gb": 3.1,
    }


def _study(spec: StudySpec, runs: Sequence[Any], quick: bool) -> dict[str, Any]:
    return {
        "spec": spec.model_dump(mode="json"),
        "config_hash": config_hash(spec),
        "quick": quick,
        "tune": False,
        "name": spec.name,
        "title": spec.title,
        "status": "finished",
        "started_at": "2026-11-24T09:00:00+00:00",
        "finished_at": "2026-11-24T09:27:00+00:00",
        "versions": {"python": "3.11.9", "crosstrain": "0.1.0", "torch": "2.13.0"},
        "hardware": {"device": "cpu", "processor": "a processor", "cores": 2, "threads": 2, "memory_gb": 16.0},
        "base": "runs/base",
        "runs": [{"arm": r.arm, "seed": r.seed, "folder": r.folder, "save_weights": r.save_weights} for r in runs],
        "learning_rates": {"from": "study file", "arms": {a.name: [s.learning_rate for s in a.stages] for a in spec.arms}},
        "budget": {"unit": spec.budget.unit, "amount": spec.budget.amount, "equal": True, "runs": []},
    }


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def _write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    from crosstrain.studies.report import write_report

    write_study(Path(sys.argv[1]))
    print(write_report(Path(sys.argv[1])))
