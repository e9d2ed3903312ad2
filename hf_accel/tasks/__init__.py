"""Tasks: from the model and the data of a recipe to what a Trainer needs."""

from hf_accel.tasks.task import TASKS, Task, build_task

__all__ = ["TASKS", "Task", "build_task"]
