"""Lower bounds of the time of a set of sequences on N ranks, and of a whole step with barriers.

Sets        i sequences, d degrees (powers of two up to N)
Data        t[i,d] work, infinite where l_i > E_d;  c_d time of a pass;  alone[i,d] = c_d + t[i,d]
Area        a pass on d ranks takes d rank-seconds per second, of which N ranks have N Z, so

    sum_i min_{d: alone[i,d] <= Z} area[i,d] <= N Z                                   (area bound)

    area[i,d] = d alone[i,d]             a pass for each sequence
              = d (t[i,d] + c_d l_i/E_d) packed passes: n sequences need sum l / E_d of them or more
              = d t[i,d]                 one pass per group, with N (Z - min c) on the right

The left side falls with Z and the right side grows, so that the smallest Z is found by bisection.

Groups of one micro-batch (linear programme at a fixed Z; Z by bisection between the area bound and
the time reached):

    variables   x[i,d] in [0,1] share of i on groups of d;  n_d >= 0 groups, integer or not
    minimise    sum_d d n_d                                  Z is possible only if this is <= N
    subject to  sum_d x[i,d] = 1                             each sequence
                sum_i t[i,d] x[i,d] <= (Z - c_d) n_d         time
                sum_i l_i x[i,d] <= E_d n_d                  tokens
                sum_{i: t[i,d] > (Z-c_d)/2 or l_i > E_d/2} x[i,d] <= n_d       two do not fit
                sum_{i: t[i,d] > (Z-c_d)/3 or l_i > E_d/3} x[i,d] <= 2 n_d     three do not fit

A step of micro-batches m = 1..M with barriers: with S = sum_m Z_m - M min_d c_d no work takes more
than S, and the area bounds of all m add up to

    sum_i min_{d: t[i,d] <= S} d t[i,d] <= N S,     M >= sum_i l_i / (N max_d E_d/d)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .costs import Costs, Floats, Ints

CLOSE = 1e-4
"""Relative width at which the bisection of a linear programme ends."""
MOST_NODES = 200
"""Of one integer programme; its bound until then counts."""


def area_bound(alone: Floats, area: Floats, num_ranks: int, given_s: float = 0.0) -> float:
    """Smallest Z with sum_i min_{d: alone <= Z} area <= N (Z - given), from below.

    `alone` and `area` have shape (K, D); `area` counts rank-seconds.
    """
    cheapest = float(np.sum(np.min(area, axis=1)))
    low = max(float(np.max(np.min(alone, axis=1))), cheapest / num_ranks + given_s)

    def possible(z: float) -> bool:
        needed = np.min(np.where(alone <= z, area, np.inf), axis=1)
        return bool(np.sum(needed) <= num_ranks * (z - given_s))

    if possible(low):
        return low
    high = 2 * low
    while not possible(high):
        low, high = high, 2 * high
    while high - low > 1e-6 * low:
        middle = (low + high) / 2
        low, high = (low, middle) if possible(middle) else (middle, high)
    return low


def step_bound(lengths: Ints, costs: Costs, num_ranks: int) -> float:
    """No cut into micro-batches with barriers takes less."""
    work = costs.seconds(lengths)
    area = work * np.array(costs.degrees, dtype=np.float64)
    num_batches = fewest_micro_batches(lengths, costs, num_ranks)
    return area_bound(work, area, num_ranks) + num_batches * min(costs.pass_s)


def tokens_of_all(costs: Costs, num_ranks: int) -> int:
    """Tokens that all ranks hold together, in the groups that hold most per rank."""
    pairs = zip(costs.capacity_tokens, costs.degrees, strict=True)
    return max(num_ranks // degree * capacity for capacity, degree in pairs)


def fewest_micro_batches(lengths: Ints, costs: Costs, num_ranks: int) -> int:
    """Micro-batches that the tokens need at least."""
    return math.ceil(int(lengths.sum()) / tokens_of_all(costs, num_ranks))


def groups_bound(
    lengths: Ints, costs: Costs, num_ranks: int, reached_s: float, *,
    integer: bool = True, out_of_time: Callable[[], bool] = lambda: False,
) -> float:  # fmt: skip
    """No groups for these sequences in one micro-batch take less; `reached_s` is what some take.

    The linear programme first, then, with `integer`, whole groups.
    """
    seconds, fixed = costs.seconds(lengths), np.array(costs.pass_s)
    degrees = np.array(costs.degrees, dtype=np.float64)
    low = area_bound(seconds + fixed, seconds * degrees, num_ranks, min(costs.pass_s))
    low = min(low, reached_s)
    for whole in (False, True) if integer else (False,):
        high = reached_s
        while high - low > CLOSE * high and not out_of_time():
            middle = (low + high) / 2
            if _fewest_ranks(lengths, seconds, costs, middle, whole, num_ranks) > num_ranks + 1e-6:
                low = middle
            else:
                high = middle
    return low


def _fewest_ranks(
    lengths: Ints, seconds: Floats, costs: Costs, z: float, whole: bool, num_ranks: int
) -> float:
    """Ranks of the programme above at the time z; infinite where a sequence cannot be done in z."""
    import scipy.optimize
    from scipy.sparse import coo_array

    num_degrees = len(costs.degrees)
    room_s = z - np.array(costs.pass_s)
    item, degree = np.nonzero((seconds <= room_s) & np.isfinite(seconds))
    if len(np.unique(item)) < len(lengths):
        return math.inf
    num_x = len(item)
    t = seconds[item, degree] / room_s[degree]
    l = lengths[item] / np.array(costs.capacity_tokens)[degree]
    large = np.maximum(t, l)
    x = np.arange(num_x)
    rows = [item]
    columns, values = [x], [np.ones(num_x)]
    for block, (value, keep) in enumerate(
        ((t, t > 0), (l, l > 0), (np.ones(num_x), large > 1 / 2), (np.ones(num_x), large > 1 / 3))
    ):
        start = len(lengths) + block * num_degrees
        rows += [start + degree[keep], start + np.arange(num_degrees)]
        columns += [x[keep], num_x + np.arange(num_degrees)]
        values += [value[keep], np.full(num_degrees, -2.0 if block == 3 else -1.0)]
    num_rows = len(lengths) + 4 * num_degrees
    matrix = coo_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))),
        shape=(num_rows, num_x + num_degrees),
    ).tocsc()
    lower = np.concatenate([np.ones(len(lengths)), np.full(4 * num_degrees, -np.inf)])
    upper = np.concatenate([np.ones(len(lengths)), np.zeros(4 * num_degrees)])
    optimize: Any = scipy.optimize  # its stubs know no arrays as limits
    with _quiet():
        solved = optimize.milp(
            np.concatenate([np.zeros(num_x), np.array(costs.degrees, dtype=np.float64)]),
            constraints=optimize.LinearConstraint(matrix, lower, upper),
            bounds=optimize.Bounds(
                0.0, np.concatenate([np.ones(num_x), np.full(num_degrees, np.inf)])
            ),
            integrality=np.concatenate([np.zeros(num_x), np.full(num_degrees, float(whole))]),
            options={"node_limit": MOST_NODES, "mip_rel_gap": 0.0},
        )
    if solved.status == 2:
        return math.inf
    bound = getattr(solved, "mip_dual_bound", None) if whole else solved.fun
    return 0.0 if bound is None else float(bound)


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS prints notes of integer programmes on stdout from C, whatever its options say."""
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
