"""Direct preference optimisation: prefer the chosen answer to the rejected one."""

from __future__ import annotations

from crosstrain.methods.plans import preference_pairs
from crosstrain.methods.registry import method
from crosstrain.objective.terms import by, pairwise_logistic
from crosstrain.types import Method, Source


@method(paper="arXiv:2305.18290", family="preference")
def dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
    """Direct preference optimisation.

    Loss: mean over pairs of -log sigmoid(beta (d_chosen - d_rejected)), d = sum_t log pi(y_t) - log ref(y_t).
    Weight on grad log pi: +- beta sigmoid(-beta (d_chosen - d_rejected)) / N_pairs on every token of the answer.
    The reference is the model the stage started from. label_smoothing e in [0, 0.5) is conservative DPO
    (TRL's setting of that name belongs to its loss `robust`, another formula).
    """
    if beta <= 0:
        raise ValueError(f"beta: got {beta}; it must be positive")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: got {label_smoothing}; it must be in [0, 0.5)")
    term = pairwise_logistic("dpo", beta=beta, label_smoothing=label_smoothing, on=by(Source.EXPERT))
    return Method(terms=(term,), plan=preference_pairs(), reference="stage_start")
