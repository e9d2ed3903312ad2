"""Build the model and the data of a recipe for a Trainer."""

from hf_accel.tasks.task import TASKS, Task, build_task

__all__ = ["TASKS", "Task", "build_task"]
