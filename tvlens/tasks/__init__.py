"""Text tasks: the shipped ones, files of your own, and the prompts made of them."""

from tvlens.tasks.files import load, load_file, load_folder, names
from tvlens.tasks.prompts import Pair, Prompt, PromptKind, Prompts, Split, Template
from tvlens.tasks.task import Task

__all__ = [
    "Pair",
    "Prompt",
    "PromptKind",
    "Prompts",
    "Split",
    "Task",
    "Template",
    "load",
    "load_file",
    "load_folder",
    "names",
]
