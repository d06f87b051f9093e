"""Strategies × tasks × sizes × seeds under a FLOP budget: `hf-pretrain compare`.

`arms.py` says what an arm costs and runs it, `halving.py` shares a budget out, and `grid.py` goes through the tasks and keeps
every run in a file. `report.py` makes the table and the plot.
"""

from hf_pretrain.transfer.comparison.arms import ComparisonArm, tuned_scores
from hf_pretrain.transfer.comparison.grid import ComparisonSettings, Entry, Group, StrategyComparison
from hf_pretrain.transfer.comparison.halving import Rung, better_half, plan_rungs, successive_halving

__all__ = [
    "ComparisonArm",
    "StrategyComparison",
    "Entry",
    "Group",
    "Rung",
    "ComparisonSettings",
    "better_half",
    "plan_rungs",
    "successive_halving",
    "tuned_scores",
]
