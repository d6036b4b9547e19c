"""Predictions against a table of published runs.

`read_table` reads rows, `build_cases` makes the plans that each may stand for, `outcomes` prices
them, `validate` scores them; `evaluate` prices settled cases again with other stack constants.
"""

from __future__ import annotations

from .build import Candidate, Case, build_cases
from .predict import Outcome, Prediction, evaluate, outcomes, predict, settled
from .score import validate
from .table import METRICS, Row, Unread, read_table

__all__ = [
    "METRICS",
    "Candidate",
    "Case",
    "Outcome",
    "Prediction",
    "Row",
    "Unread",
    "build_cases",
    "evaluate",
    "outcomes",
    "predict",
    "read_table",
    "settled",
    "validate",
]
