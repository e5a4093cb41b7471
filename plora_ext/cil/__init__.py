"""Class-incremental learning: the task stream, the methods, the loop, its metrics and reports."""

from plora_ext.cil.engine import Images, Result, load_images, run
from plora_ext.cil.settings import Settings
from plora_ext.cil.stream import Task, TaskStream

__all__ = ["Images", "Result", "Settings", "Task", "TaskStream", "load_images", "run"]
