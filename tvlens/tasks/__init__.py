"""Tasks: shipped text tasks, files of your own, function classes, and the prompts made of them."""

from tvlens.tasks.files import load, load_file, load_folder, names
from tvlens.tasks.function_task import FunctionTask
from tvlens.tasks.functions import function_class
from tvlens.tasks.points import PointCurves, PointPrompts
from tvlens.tasks.prompts import Pair, Prompt, PromptKind, Prompts, Split, Template
from tvlens.tasks.task import Task

__all__ = [
    "FunctionTask",
    "Pair",
    "PointCurves",
    "PointPrompts",
    "Prompt",
    "PromptKind",
    "Prompts",
    "Split",
    "Task",
    "Template",
    "function_class",
    "load",
    "load_file",
    "load_folder",
    "names",
]
