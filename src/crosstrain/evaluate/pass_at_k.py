"""pass@k: the chance that at least one of k samples is right, from n samples per question."""

from __future__ import annotations

from crosstrain.errors import UserError


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of pass@k for one question, in [0, 1].

    1 - C(n - correct, k) / C(n, k), computed as a product so that no large number appears (Chen et al. 2021, arXiv 2107.03374).
    Raises UserError unless n >= 2k: with fewer samples than that the estimate is unbiased but too noisy to report.

    >>> pass_at_k(8, 2, 1), round(pass_at_k(8, 2, 4), 4)
    (0.25, 0.7857)
    """
    if k < 1:
        raise UserError(f"pass@{k}: k must be at least 1")
    if n < 2 * k:
        raise UserError(f"pass@{k} needs at least {2 * k} samples per question (twice k), got {n}; sample more, or lower k")
    if not 0 <= correct <= n:
        raise UserError(f"pass@{k}: got {correct} right answers of {n}; it must be between 0 and {n}")
    wrong = n - correct
    if wrong < k:
        return 1.0
    all_wrong = 1.0
    for i in range(k):
        all_wrong *= (wrong - i) / (n - i)
    return 1.0 - all_wrong
