from .run import Run as Run
from .steps import Memory as Memory
from .steps import Steps as Steps
