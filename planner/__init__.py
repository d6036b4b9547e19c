"""The planner: the best layout of a training run, how sure that is, and why the others lost."""

from .candidates import CostModel, Ranked
from .explain import RuledOut, why
from .infeasible import Infeasible
from .pins import Pins
from .search import SearchResult, SearchStats, search

__all__ = [
    "CostModel", "Infeasible", "Pins", "Ranked", "RuledOut", "SearchResult", "SearchStats",
    "search", "why",
]  # fmt: skip
