"""Orders played to a makespan: the longest path through them, in slots and flat arrays.

    start(x) = max( end(action before x on its rank), end(what x waits for) + transfer )
    end(x)   = start(x) + duration(x)
    makespan = max over x of end(x)

The loop moves along each rank until an action must wait, rank after rank, until nothing moves; what
is left then waits in a circle. It runs compiled where numba is installed and as it is where not:
columns are arrays in the first case and lists, which plain Python indexes faster, in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from ...orders import Orders
from .. import jit
from .actions import Pipeline

INTS, FLOATS = "int64[::1]", "float64[::1]"


def ints(values: Iterable[int]) -> Any:
    """A column of whole numbers for the loops."""
    return _column(values, "int64")


def floats(values: Iterable[float]) -> Any:
    """A column of real numbers for the loops."""
    return _column(values, "float64")


def _column(values: Iterable[Any], dtype: str) -> Any:
    if not jit.has_numba():
        return list(values)
    import numpy as np

    return np.array(list(values), dtype=dtype)


def loop(function: Callable[..., Any], signature: str) -> Callable[..., Any]:
    """`function`, compiled once per process where numba is installed."""
    return _compiled(function, signature) if jit.has_numba() else function


@cache
def _compiled(function: Callable[..., Any], signature: str) -> Callable[..., Any]:
    return jit.compiled(function, signature)


def rows_of(pipeline: Pipeline, orders: Orders) -> list[int]:
    """The slots of all ranks one after the other, each row filled up with -1 to one length."""
    width = max(map(len, orders))
    rows = [[pipeline.slot(action) for action in actions] for actions in orders]
    return [slot for row in rows for slot in row + [-1] * (width - len(row))]


def orders_of(pipeline: Pipeline, rows: Iterable[int]) -> Orders:
    """The actions of rows of split backward passes."""
    slots = [int(slot) for slot in rows]
    width = len(slots) // pipeline.num_ranks
    return [
        [pipeline.action(slot) for slot in slots[at : at + width]]
        for at in range(0, len(slots), width)
    ]


def durations_s(pipeline: Pipeline, orders: Orders | None = None) -> list[float]:
    """Duration per slot, of the split backward pass but where the orders have it whole."""
    per_stage = (pipeline.forward_s, pipeline.input_s, pipeline.weight_s)
    m = pipeline.num_micro_batches
    durations = [value for part in per_stage for value in part for _ in range(m)]
    for actions in orders or ():
        for action in actions:
            if action[0] == "B":
                durations[pipeline.slot(action)] = pipeline.duration_s(action)
    return durations


def makespan_s(pipeline: Pipeline, orders: Orders) -> float:
    """When the last action of complete orders ends; infinite when the ranks wait in a circle.

    >>> from forerun.costmodel.schedule import orders
    >>> from forerun.planner.pipeline.actions import make_pipeline
    >>> makespan_s(make_pipeline(8, 32, 1.0, 1.0, 1.0), orders("1f1b", 8, 1, 32))
    117.0
    """
    play = loop(play_rows, f"float64(int64, {INTS}, {FLOATS}, {INTS}, {FLOATS}, {FLOATS})")
    rows = ints(rows_of(pipeline, orders))
    ends = floats([-1.0] * len(pipeline.waits_for))
    return float(
        play(
            pipeline.num_ranks,
            rows,
            floats(durations_s(pipeline, orders)),
            ints(pipeline.waits_for),
            floats(pipeline.transfers_s),
            ends,
        )
    )


def play_rows(
    num_ranks: int, rows: Any, duration: Any, waits_for: Any, transfer: Any, end: Any
) -> float:
    """Fill `end`, which holds -1 everywhere, and give the makespan."""
    width = len(rows) // num_ranks
    position = [0] * num_ranks
    clock = [0.0] * num_ranks
    left = 0
    for slot in rows:
        if slot >= 0:
            left += 1
    moved = True
    while moved:
        moved = False
        for rank in range(num_ranks):
            at = position[rank]
            now = clock[rank]
            while at < width:
                slot = rows[rank * width + at]
                if slot < 0:
                    break
                before = waits_for[slot]
                if before >= 0:
                    ready = end[before]
                    if ready < 0.0:
                        break
                    now = max(now, ready + transfer[slot])
                now += duration[slot]
                end[slot] = now
                at += 1
                left -= 1
                moved = True
            position[rank] = at
            clock[rank] = now
    return max(clock) if left == 0 else float("inf")
