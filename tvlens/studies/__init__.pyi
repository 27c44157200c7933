from .functions import FunctionStudy as FunctionStudy
from .functions import study_function as study_function
from .functions import study_functions as study_functions
from .regression import RegressionSettings as RegressionSettings
from .text import StudySettings as StudySettings
from .text import TaskStudy as TaskStudy
from .text import study_task as study_task
from .text import study_tasks as study_tasks
