"""What can be done to data before it is trained on, as a table shows it: settings of a recipe's streams, for any method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DataMethod:
    """A method that acts on data alone.

    key: where a recipe says it, under `data.STREAM`. paper, year: where it was published; empty and None where no one place is.
    does: in a sentence. works, fails: when the literature finds that it helps, and when not. deviates: where ours differs from the
    paper, and what of it is a guess.
    """

    name: str
    key: str
    does: str
    paper: str = ""
    year: int | None = None
    works: str = ""
    fails: str = ""
    deviates: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


DATA_METHODS: tuple[DataMethod, ...] = (
    DataMethod(
        "sequence-level distillation",
        "teacher: {base_url, model, temperature, n}",
        "has a server's answers to the prompts as demonstrations, for whatever method learns from those",
        "arXiv:1606.07947",
        2016,
        works="For translation the best student of its teacher's answers is 4.2 BLEU better, with greedy decoding, than with no "
        "teacher, and ten times as fast as the teacher with little loss (arXiv:1606.07947).",
        fails="Answers of a stronger chat model are found to teach its style more than what it knows (arXiv:2305.15717). Where the "
        "teacher's probabilities can be had, a student does better on answers of its own that it grades (arXiv:2306.13649).",
        deviates="An answer is the teacher's greedy one, or sampled; the paper's is the best of a beam search. The paper's "
        "interpolation, which takes of a beam what is nearest to a reference, is not there.",
    ),
    DataMethod(
        "length filter",
        "filter: {min_length, max_length}",
        "leaves out rows whose answers have too few or too many tokens",
        "arXiv:2410.09335",
        2024,
        works="Keeping rows by token length is found a stable gain at the scale of millions of rows, most of all for weaker base "
        "models trained on long texts (arXiv:2410.09335).",
    ),
    DataMethod(
        "quality filter",
        "filter: {min_quality, max_quality, quality_column}",
        "leaves out rows by a number they bring: a grade, or a solve rate, of which both ends teach little",
        "arXiv:2305.11206",
        2023,
        works="A thousand answers chosen with care are found enough to teach a large model a style (LIMA, arXiv:2305.11206).",
        fails="On pools of millions of rows diversity is found to matter more than quality (arXiv:2410.09335).",
        deviates="The number is the user's; no model grades rows here.",
    ),
    DataMethod(
        "deduplication",
        "filter: {deduplicate}",
        "leaves out rows that an earlier one equals, or nearly equals by its runs of three words",
        "arXiv:2107.06499",
        2021,
        works="In pretraining, models without duplicates recite ten times less and need fewer steps (arXiv:2107.06499).",
        deviates="Near duplicates are found exactly, by Jaccard similarity of runs of three words; the paper hashes runs of five.",
    ),
    DataMethod(
        "mixture by weight",
        "mixture: [{path, weight}, ...]",
        "draws from several sources by shares that hold to a whole example at any time",
        "arXiv:2508.11953",
        2025,
        works="Weights found by small runs come within 1% of those of a grid search, and better the losses of known collections "
        "(arXiv:2508.11953).",
        deviates="Weights are given; finding them is a study of several mixtures.",
    ),
    DataMethod(
        "FisherSFT",
        "select: {rule: fisher}",
        "chooses the rows whose tokens' last hidden states span the largest volume: most information about the last layer",
        "arXiv:2505.14826",
        2025,
        works="Better than its baselines in the paper's experiments, the largest with GPT-2 (arXiv:2505.14826).",
        fails="Most ways of choosing rows are found no better than random on pools of millions (arXiv:2410.09335, "
        "arXiv:2503.01807).",
        deviates="Reconstructed from descriptions: the greedy choice by log det with kept gains as bounds is the paper's; that the "
        "design matrix starts from the identity is a guess (`ridge`). Only tokens of answers count, since only they are trained. "
        "A row of many tokens is preferred to one of few.",
    ),
    DataMethod(
        "choice by loss",
        "select: {rule: loss}",
        "chooses the rows of highest or lowest mean loss under the untrained model",
    ),
    DataMethod(
        "random choice",
        "select: {rule: random}",
        "chooses any rows, by the recipe's seed: the baseline of every other choice",
        "arXiv:2410.09335",
        2024,
        works="Hard to beat on pools of millions of rows (arXiv:2410.09335, arXiv:2503.01807).",
    ),
    DataMethod(
        "curriculum",
        "order: {by, pacing: linear | sqrt}",
        "draws from a pool that begins with the easiest (or hardest) rows and grows to all of them",
        "arXiv:1903.09848",
        2019,
        works="Found to take up to 70% less time for translation (arXiv:1903.09848).",
        fails="For mathematical reasoning of language models neither direction is best everywhere: it depends on the model and the "
        "task (arXiv:2510.19099).",
        deviates="The pool begins with a tenth of the rows; the paper's with a hundredth, of far more rows. It grows with the rows "
        "that are drawn, not with steps.",
    ),
    DataMethod(
        "sorted epochs",
        "order: {by, pacing: sorted}",
        "runs through every epoch from the easiest row to the hardest, or back",
        fails="For mathematical reasoning of language models neither direction is best everywhere (arXiv:2510.19099).",
    ),
)
