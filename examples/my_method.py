"""A method of your own in one file, outside the package: imitation that counts unlikely tokens more.

crosstrain methods show examples/my_method.py:focal
crosstrain explain examples/my_method.py:focal --batch examples/explain/sft.json --set power=2.0
crosstrain study examples/my_study.yaml
"""

from torch import Tensor

from crosstrain.methods.plans import demonstrations
from crosstrain.objective.advantages import ones
from crosstrain.objective.gates import unlikely
from crosstrain.objective.terms import by, surrogate
from crosstrain.types import Batch, Method, Per, Scores, Source


def focal(power: float = 1.0) -> Method:
    """Focal imitation: -sg((1 - p)^power) log p over all tokens of demonstrations, divided by their number N.

    Weight on grad log p: (1 - p)^power / N.
    """
    gate = unlikely(power)

    def published(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        logp = scores.logp.detach()
        return -gate(logp.exp(), logp, batch, on) * scores.logp

    term = surrogate(
        "demo",
        on=by(Source.EXPERT),
        per=Per(("own_tokens",)),
        gate=gate,
        logged=published,
        describe=f"-sg((1 - p)^{power:g}) log p",
    )
    return Method(terms=(term,), plan=demonstrations(), advantage=ones)
