"""Tasks by name."""

from __future__ import annotations

import pytest

from crosstrain.errors import UserError
from crosstrain.tasks import TASKS, get_task


def test_every_task_without_settings_can_be_made_and_says_what_it_is() -> None:
    for name in TASKS:
        if name != "reasoning_gym":
            task = get_task(name)
            assert (task.name, task.version) == (name, 1)
            assert task.describe.endswith(".")


def test_an_unknown_task_or_setting_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown task 'arithmetics'; did you mean 'arithmetic'"):
        get_task("arithmetics")
    with pytest.raises(UserError, match="task sums: unknown setting 'digits'; it has none"):
        get_task("sums", digits=2)
    with pytest.raises(UserError, match="unknown setting 'data_set'; did you mean 'dataset'"):
        get_task("reasoning_gym", data_set="chain_sum")
    with pytest.raises(UserError, match="setting 'dataset' is missing"):
        get_task("reasoning_gym")
