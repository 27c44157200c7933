from .garg import load_garg as load_garg
from .training import TrainSettings as TrainSettings
from .training import preset as preset
from .training import train as train
from .transformer import RegressionSizes as RegressionSizes
from .transformer import RegressionTransformer as RegressionTransformer
from .transformer import load_regression as load_regression
from .transformer import save_regression as save_regression
