"""Tasks: shipped text tasks, files of your own, function classes, and the prompts made of them."""

from tvlens.tasks.base import PromptKind, Split
from tvlens.tasks.regression.functions import function_class
from tvlens.tasks.regression.prompts import PointCurves, PointPrompts
from tvlens.tasks.regression.task import FunctionTask
from tvlens.tasks.text.files import load, load_file, load_folder, names
from tvlens.tasks.text.prompts import Pair, Prompt, Prompts, Template
from tvlens.tasks.text.task import Task

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
