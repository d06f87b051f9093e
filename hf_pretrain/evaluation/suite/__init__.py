"""Models on a list of tasks: `hf-pretrain evaluate`.

`tasks.py` finds tasks by name. `models.py` opens the parts of a model that a measure needs; `adapters.py` puts an adapter into
the model below it, and `language.py` has the score of a text that fits each kind. `measures.py` measures, and `results.py` makes
a table of the numbers, and keeps them in a file beside the weights that they belong to. `runs.py` measures the model of a run
before and after its training, for `--evaluation_tasks` of each method. The numbers are those of the modules beside this folder;
here they get names, methods and baselines.
"""

from hf_pretrain.evaluation.suite.language import LanguageModel
from hf_pretrain.evaluation.suite.measures import (
    LoadedTask,
    MeasureOptions,
    beside_untrained,
    measure_task,
    over_seeds,
)
from hf_pretrain.evaluation.suite.models import EvaluatedModel
from hf_pretrain.evaluation.suite.results import is_results_file, results_of, write_results
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
    "is_results_file",
    "measure_task",
    "over_seeds",
    "results_of",
    "write_results",
]
