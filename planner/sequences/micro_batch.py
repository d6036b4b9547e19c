"""Groups for the sequences of one micro-batch, and which group works through which.

Sets        i sequences, longest first; d degrees; groups g, each of one degree d(g)
Variables   n_d number of groups of each degree;  g(i) the group of each sequence
Minimise    Z = max_g max(f_d(g), c_d(g) + sum_{i in g} t[i, d(g)])
Subject to  sum_d d n_d <= N;   sum_{i in g} l_i <= E_d(g)

A dozen sequences are solved exactly (`exact.py`). Otherwise compositions are tried in the order of
their estimate (`compositions.py`, `longest_first.py`), and the best few are improved
(`exchange.py`).

Source of the problem: Wang et al. 2024 (FlexSP), which solves it as a mixed-integer programme.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .bounds import area_bound
from .compositions import Counts, Estimate, candidates
from .costs import Costs, Floats, Ints
from .exact import MOST_SEQUENCES, solve_exact
from .exchange import improve
from .longest_first import MARGIN, assign, times_of

IMPROVED = 6
"""Compositions that are improved."""
ROUNDS = (32, 128, 512, 4096)
"""Compositions tried in turn, as long as a better one may follow."""
ENOUGH = 1.002
"""Times the bound at which no more are tried."""
WORK = 4_000_000
"""Sequences times groups that one micro-batch may be tried with, roughly."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """Groups of one micro-batch: degree index and positions of the sequences."""

    seconds: float
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    exact: bool = False
    """Whether nothing takes less."""


def group(
    lengths: Ints, costs: Costs, num_ranks: int, out_of_time: Callable[[], bool] = lambda: False
) -> Grouping | None:
    """Groups for lengths that descend, or None where no composition was found that holds them."""
    seconds, bound = costs.seconds(lengths), packed_bound(lengths, costs, num_ranks)
    found = _promising(Estimate(lengths, seconds, costs, num_ranks), bound, out_of_time)
    if len(lengths) <= MOST_SEQUENCES:
        return _exactly(lengths, costs, num_ranks, found, bound)
    for at, one in enumerate(found):
        better = improve(one.groups, lengths, seconds, costs, bound * ENOUGH)
        found[at] = _grouping(better, seconds, costs)
        if found[at].seconds <= bound * ENOUGH:
            break
    return min(found, key=lambda one: one.seconds, default=None)


def packed_bound(lengths: Ints, costs: Costs, num_ranks: int) -> float:
    """The area bound of one micro-batch."""
    seconds = costs.seconds(lengths)
    alone = np.maximum(seconds + np.array(costs.pass_s), np.array(costs.floor_s))
    area = seconds * np.array(costs.degrees, dtype=np.float64)
    return area_bound(alone, area, num_ranks, min(costs.pass_s))


def _exactly(
    lengths: Ints, costs: Costs, num_ranks: int, found: list[Grouping], bound: float
) -> Grouping | None:
    known = min(found, key=lambda one: one.seconds, default=None)
    below = known.seconds if known is not None else np.inf
    better = solve_exact(lengths, costs, num_ranks, below, bound)
    if better is not None:
        groups = tuple((costs.degrees.index(d), tuple(members)) for d, members in better[1])
        return Grouping(better[0], groups, True)
    return None if known is None else Grouping(known.seconds, known.groups, True)


def _promising(estimate: Estimate, bound: float, out_of_time: Callable[[], bool]) -> list[Grouping]:
    """The groupings of the compositions whose longest-first assignment ends first."""
    costs, lengths, seconds = estimate.costs, estimate.lengths, estimate.seconds_of
    counts, estimates = candidates(estimate, bound)
    tried: Counts = counts[:0]
    times: Floats = estimates[:0]
    for most in ROUNDS:
        some = counts[len(tried) : min(most, max(16, WORK // (len(lengths) * 32)))]
        best = float(times.min(initial=np.inf))
        some = some[estimates[len(tried) : len(tried) + len(some)] < best * MARGIN]
        if not len(some) or best <= bound * ENOUGH or (len(tried) and out_of_time()):
            break
        times = np.concatenate([times, times_of(some, lengths, seconds, costs, best)])
        tried = counts[: len(tried) + len(some)]
    order = np.argsort(times, kind="stable")[:IMPROVED]
    tokens, table = lengths.tolist(), seconds.tolist()
    made = [assign(tried[at].tolist(), tokens, table, costs) for at in order
            if np.isfinite(times[at])]  # fmt: skip
    return [_grouping(one[1], seconds, costs) for one in made if one is not None]


def _grouping(groups: list[tuple[int, list[int]]], seconds: Floats, costs: Costs) -> Grouping:
    used = tuple((d, tuple(members)) for d, members in groups if members)
    slowest = max(
        max(costs.floor_s[d], costs.pass_s[d] + float(seconds[list(members), d].sum()))
        for d, members in used
    )
    return Grouping(slowest, used)
