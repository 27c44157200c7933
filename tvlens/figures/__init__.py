"""Tables and maps to figures, in one style fit for print."""

from tvlens.figures.curves import error_curves
from tvlens.figures.modalities import modality_dots
from tvlens.figures.scores import head_maps, layer_profiles, overlap_curve, score_maps
from tvlens.figures.vectors import method_dots, training_history, weight_travel

__all__ = [
    "error_curves",
    "head_maps",
    "layer_profiles",
    "method_dots",
    "modality_dots",
    "overlap_curve",
    "score_maps",
    "training_history",
    "weight_travel",
]
