"""What is measured of a model: held-out questions, what it forgot, how far it moved from the base."""

from crosstrain.evaluate.divergence import BaseAnswers
from crosstrain.evaluate.run import Evaluated, evaluate_model, measure_dev

__all__ = ["BaseAnswers", "Evaluated", "evaluate_model", "measure_dev"]
