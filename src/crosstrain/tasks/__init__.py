"""Verifiable tasks: questions with a reward that checks the answer."""

from crosstrain.tasks.registry import TASKS, Task, get_task

__all__ = ["TASKS", "Task", "get_task"]
