from .curves import error_curves as error_curves
from .modalities import modality_dots as modality_dots
from .scores import head_maps as head_maps
from .scores import layer_profiles as layer_profiles
from .scores import overlap_curve as overlap_curve
from .vectors import method_dots as method_dots
from .vectors import training_history as training_history
from .vectors import weight_travel as weight_travel
