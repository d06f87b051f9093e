"""Models on a list of tasks: `hf-pretrain evaluate`.

`tasks.py` finds tasks by name, `models.py` opens the parts of a model that a measure needs, and `measures.py` measures. The
numbers are those of the modules beside this folder; here they get names, methods and baselines. `results.py` makes a table and a
file of them. `runs.py` measures the model of a run before and after its training, for `--evaluation_tasks` of each method.
"""

from hf_pretrain.evaluation.suite.measures import LoadedTask, MeasureOptions, beside_untrained, measure_task
from hf_pretrain.evaluation.suite.models import EvaluatedModel, LanguageModel
from hf_pretrain.evaluation.suite.tasks import How, SuiteTask, find_tasks

__all__ = [
    "EvaluatedModel",
    "How",
    "LanguageModel",
    "LoadedTask",
    "MeasureOptions",
    "SuiteTask",
    "beside_untrained",
    "find_tasks",
    "measure_task",
]
