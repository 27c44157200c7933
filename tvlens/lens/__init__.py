"""The instrument: a frozen model, what is changed in it, and how its answers are read."""

from tvlens.lens.edits import AddHeads, AddToResidual, Edit, NoEdit, ReplaceHeads
from tvlens.lens.lens import Lens

__all__ = ["AddHeads", "AddToResidual", "Edit", "Lens", "NoEdit", "ReplaceHeads"]
