"""Pipeline schedules: the cut of a model into stages, and the order of actions on every rank."""

from .actions import Pipeline, make_pipeline, merged, split
from .check import Checked, check
from .cut import Cut, cut_layers
from .solution import Solution
from .solve import solve_pipeline
from .torch_csv import read_csv, write_csv

__all__ = [
    "Checked", "Cut", "Pipeline", "Solution",
    "check", "cut_layers", "make_pipeline", "merged", "read_csv", "solve_pipeline", "split",
    "write_csv",
]  # fmt: skip
