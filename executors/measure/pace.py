"""The speed of the machine at a moment: a reference operator, timed.

A shared machine's speed drifts within minutes. Profiles keep the median of many samples of this
operator, runs the median around their timed steps; their ratio tells how much of a prediction's
error is the machine's.
"""

from __future__ import annotations

import statistics
import time

import torch

SIZE = 256


def matmul_s(calls: int = 15) -> float:
    """Median seconds of one fp32 matmul of 256 x 256 matrices on one thread."""
    x = torch.ones(SIZE, SIZE)
    y = x * 0.01
    torch.mm(x, y)
    taken: list[float] = []
    for _ in range(calls):
        start = time.perf_counter()
        torch.mm(x, y)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
