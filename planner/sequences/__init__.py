"""Sequences of unequal length on unequal groups of ranks: one answer per step, quick enough for it.

`solve_hybrid` lets ranks run unequal numbers of passes between two gradient reductions;
`solve_groups` has all ranks meet after every micro-batch. Both take lengths in tokens and `Costs`,
from the cost model (`model_costs`) or from coefficients measured elsewhere.
"""

from ...catalogs import read_lengths
from .assignment import Assignment, MicroBatch, Pass
from .check import WrongAssignment, check
from .costs import Costs, published_costs
from .groups import solve_groups
from .hybrid import hybrid_bound, solve_hybrid
from .priced import model_costs
from .static import Static, best_static, solve

__all__ = [
    "Assignment", "Costs", "MicroBatch", "Pass", "Static", "WrongAssignment", "best_static",
    "check", "hybrid_bound", "model_costs", "published_costs", "read_lengths", "solve",
    "solve_groups", "solve_hybrid",
]  # fmt: skip
