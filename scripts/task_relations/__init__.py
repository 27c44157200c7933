"""The relations behind the shipped tasks: which pairs, in which order, and where they come from.

Word lists are ours (`scripts/task_words`). Forms, names and facts come from pinned libraries
(`scripts/requirements-tasks.txt`), with corrections spelled out where a library is wrong, ambiguous
or out of date.
"""

from task_relations.core import Relation
from task_relations.numbers import numbers, series
from task_relations.words import letters, meaning, morphology, picking, translations
from task_relations.world import elements, geography, names_abroad


def all_relations() -> list[Relation]:
    """Every shipped task, theme by theme."""
    themes = (morphology, letters, picking, meaning, translations, numbers, series)
    world = (geography, names_abroad, elements)
    return [relation for theme in themes + world for relation in theme()]
