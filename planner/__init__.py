"""The planner: the best layout of a training run, how sure that is, and why the others lost."""

from .candidates import CostModel, Ranked
from .explain import RuledOut, why
from .infeasible import Infeasible
from .pins import Pins
from .quality import Risk, risks
from .search import SearchResult, SearchStats, search
from .what_if import WhatIf, what_if

__all__ = [
    "CostModel", "Infeasible", "Pins", "Ranked", "Risk", "RuledOut", "SearchResult",
    "SearchStats", "WhatIf", "risks", "search", "what_if", "why",
]  # fmt: skip
