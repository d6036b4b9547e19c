"""Sweeps: tables of plans over many clusters and jobs, and inverse questions about them."""

from .asking import Conditions
from .fewest import MAX_NODES, fewest_gpus
from .largest import largest_model, longest_context
from .pareto import pareto_front
from .prices import check_prices, read_prices, with_prices
from .result import Answer, SweepResult, why_none
from .rows import Ask, Row
from .table import cheapest, sweep_table

__all__ = [
    "MAX_NODES", "Answer", "Ask", "Conditions", "Row", "SweepResult", "cheapest", "check_prices",
    "fewest_gpus", "largest_model", "longest_context", "pareto_front", "read_prices",
    "sweep_table", "why_none", "with_prices",
]  # fmt: skip
