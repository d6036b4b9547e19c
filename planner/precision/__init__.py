"""Precision per operator group under an error budget, and AdaPT's fixed-point word lengths."""

from .fixed_point import Word, divergence, fixed_point_options, push_down, push_up, quantise
from .problem import Limits, Option, Totals, Weights, allowed, by_group, read_options, total
from .solve import PrecisionChoice, solve_precision

__all__ = [
    "Limits", "Option", "PrecisionChoice", "Totals", "Weights", "Word", "allowed", "by_group",
    "divergence", "fixed_point_options", "push_down", "push_up", "quantise", "read_options",
    "solve_precision", "total",
]  # fmt: skip
