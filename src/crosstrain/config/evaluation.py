"""What a recipe measures on held-out questions."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, Field, model_validator

from crosstrain.config.fields import STRICT, Count, Flag, Seed, TaskConfig, Temperature, Whole


class EvalSetSpec(BaseModel):
    """One set of held-out questions."""

    model_config = STRICT
    name: str = Field(description="Name in metrics and reports.")
    task: str = Field(description="Name of a task.")
    task_config: TaskConfig = {}
    split: str = Field("test", description="Split of the task.")
    size: Count = Field(128, description="How many questions.")
    seed: Seed = 0


class EvaluationSpec(BaseModel):
    """What is measured on held-out questions."""

    model_config = STRICT
    in_distribution: list[EvalSetSpec] = Field(default_factory=list, description="Questions like the training data.")
    out_of_distribution: list[EvalSetSpec] = Field(default_factory=list, description="Questions shifted away from it.")
    samples_per_question: Count = Field(8, description="Completions sampled per question.")
    pass_at_k: list[Count] = Field(default_factory=lambda: [1, 2, 4], description="The k of pass@k.")
    forgetting: Flag = Field(True, description="Measure what the model lost on the bundled general suite.")
    forgetting_questions: Count | None = Field(
        None, description="How many questions of that suite, spread over its topics; all of them when not given."
    )
    divergence: Flag = Field(True, description="Measure KL to the base model, both ways.")
    temperature: Temperature = Field(1.0, description="Temperature of the evaluation's samples.")
    eval_steps: Whole = Field(0, description="Steps between evaluations on `dev`; 0 is only at the end.")
    dev: EvalSetSpec | None = Field(
        None, description="Development questions, looked at during training (`eval_accuracy`, ...)."
    )
    dev_ood: EvalSetSpec | None = Field(
        None, description="Development questions shifted away from the training data, looked at too (`eval_ood_accuracy`, ...)."
    )
    dev_samples: Count = Field(1, description="Completions sampled per development question.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pass_at_k and self.samples_per_question < 2 * max(self.pass_at_k):
            raise ValueError(
                f"'samples_per_question' is {self.samples_per_question} but pass@{max(self.pass_at_k)} needs at least "
                f"{2 * max(self.pass_at_k)} (twice the largest k)"
            )
        names = [s.name for s in (*self.in_distribution, *self.out_of_distribution)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"evaluation sets need different names, got {twice[0]!r} more than once")
        if self.forgetting_questions is not None and not self.forgetting:
            raise ValueError("'forgetting_questions' has no effect: 'forgetting' is false")
        if self.dev_ood is not None and not self.eval_steps:
            raise ValueError("'dev_ood' has no effect: 'eval_steps' is 0")
        if self.eval_steps and self.dev is None and self.dev_ood is None:
            raise ValueError(f"'eval_steps' is {self.eval_steps} but there is no 'dev' set to look at")
        return self
