"""How many groups of each degree: candidates for one micro-batch, by a fractional estimate.

A composition is counts n_d with sum_d d n_d = N. For a time Z the estimate pours the sequences,
longest first, into the groups from the largest degree down,

    n_d (Z - c_d) seconds and n_d E_d tokens on degree d, whichever is full first,

which is best for divisible sequences when longer ones lose less by more ranks. What is left over,
in rank-seconds per rank, is added to Z, twice: a step of Newton's method per composition. Up to
`ALL_UP_TO` ranks every composition is estimated; beyond, counts are climbed: groups of one degree
are traded for as many ranks of another, while the estimate falls.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .costs import Costs, Floats, Ints

ALL_UP_TO = 64
NEWTON_STEPS = 2
Counts = NDArray[np.int64]
"""Compositions, (Q, D)."""


class Estimate:
    """The time of any composition for one micro-batch whose lengths descend."""

    def __init__(self, lengths: Ints, seconds: Floats, costs: Costs, num_ranks: int) -> None:
        self.costs, self.num_ranks = costs, num_ranks
        self.lengths, self.seconds_of = lengths, seconds
        self.fixed = np.array(costs.pass_s)
        self.degrees = np.array(costs.degrees)
        self.capacity = np.array(costs.capacity_tokens, dtype=np.float64)
        self.at = np.arange(len(lengths) + 1, dtype=np.float64)
        finite = np.where(np.isfinite(seconds), seconds, 0.0)
        zero = np.zeros((1, len(costs.degrees)))
        self.busy = np.ascontiguousarray(np.vstack([zero, np.cumsum(finite, axis=0)]).T)
        self.tokens = np.concatenate([[0.0], np.cumsum(lengths, dtype=np.float64)])
        self.too_long = np.sum(~np.isfinite(seconds), axis=0)
        area = np.min(seconds * self.degrees, axis=1)
        self.left_area = float(np.sum(area)) - np.concatenate([[0.0], np.cumsum(area)])

    def seconds(self, counts: Counts, start_s: float) -> Floats:
        """Estimated time of each composition (Q,), `start_s` or more."""
        z = np.full(len(counts), start_s)
        possible = np.ones(len(counts), dtype=bool)
        for _ in range(NEWTON_STEPS):
            reached, possible = self._pour(counts, z)
            left = np.interp(reached, self.at, self.left_area)
            z = np.where(possible, z + left / self.num_ranks, z)
        return np.where(possible, z, np.inf)

    def _pour(self, counts: Counts, z: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """Sequences done (a fractional count), and whether the longest have groups at all."""
        done = np.zeros(len(counts))
        possible = np.ones(len(counts), dtype=bool)
        for d in range(len(self.degrees) - 1, -1, -1):
            n = counts[:, d].astype(np.float64)
            used = n > 0
            if not used.any():
                continue
            possible &= ~used | (done >= self.too_long[d]) | (counts[:, d + 1 :].sum(axis=1) > 0)
            room_s = np.maximum(z - self.fixed[d], 0.0) * n
            by_time = np.interp(np.interp(done, self.at, self.busy[d]) + room_s,
                                self.busy[d], self.at)  # fmt: skip
            by_tokens = np.interp(np.interp(done, self.at, self.tokens) + n * self.capacity[d],
                                  self.tokens, self.at)  # fmt: skip
            further = np.maximum(np.minimum(by_time, by_tokens), done)
            done = np.where(used & (done >= self.too_long[d]), further, done)
        return done, possible


@lru_cache(maxsize=8)
def every_composition(degrees: tuple[int, ...], num_ranks: int) -> Counts:
    """All counts (Q, D) with sum of degree x count = ranks.

    >>> every_composition((1, 2, 4), 4).tolist()
    [[4, 0, 0], [2, 1, 0], [0, 2, 0], [0, 0, 1]]
    """
    result: list[list[int]] = []

    def extend(at: int, left: int, chosen: list[int]) -> None:
        if at == 0:
            if left % degrees[0] == 0:
                result.append([left // degrees[0], *chosen])
            return
        for count in range(left // degrees[at] + 1):
            extend(at - 1, left - count * degrees[at], [count, *chosen])

    extend(len(degrees) - 1, num_ranks, [])
    return np.array(result, dtype=np.int64).reshape(-1, len(degrees))


def candidates(estimate: Estimate, start_s: float) -> tuple[Counts, Floats]:
    """Compositions and their estimates from `start_s` on, the least first."""
    if estimate.num_ranks <= ALL_UP_TO:
        counts = every_composition(estimate.costs.degrees, estimate.num_ranks)
        times = estimate.seconds(counts, start_s)
    else:
        counts, times = _climb(estimate, start_s)
    order = np.argsort(times, kind="stable")
    order = order[np.isfinite(times[order])]
    return counts[order], times[order]


def _climb(estimate: Estimate, start_s: float) -> tuple[Counts, Floats]:
    """Compositions met on the way down from the best homogeneous one, with their estimates."""
    degrees, num_ranks = estimate.degrees, estimate.num_ranks
    seen = _homogeneous(degrees, num_ranks)
    times = estimate.seconds(seen, start_s)
    known = {row.tobytes() for row in seen}
    trades = _trades(degrees, num_ranks)
    best = int(np.argmin(times))
    while True:
        fresh = seen[best] + trades
        fresh = fresh[(fresh >= 0).all(axis=1)]
        fresh = np.array([row for row in fresh if row.tobytes() not in known], dtype=np.int64)
        if not len(fresh):
            return seen, times
        known.update(row.tobytes() for row in fresh)
        seen = np.vstack([seen, fresh])
        times = np.concatenate([times, estimate.seconds(fresh, start_s)])
        lowest = int(np.argmin(times))
        if times[lowest] >= times[best] * (1 - 1e-6):
            return seen, times
        best = lowest


def _homogeneous(degrees: Ints, num_ranks: int) -> Counts:
    return np.diag(num_ranks // degrees)


def _trades(degrees: Ints, num_ranks: int) -> Counts:
    """Changes of two counts that keep the ranks: 1, 2, 4, ... times the larger degree."""
    rows: list[Counts] = []
    for a in range(len(degrees)):
        for b in range(a + 1, len(degrees)):
            times = 1
            while times * degrees[b] <= num_ranks // 2:
                row = np.zeros(len(degrees), dtype=np.int64)
                row[a], row[b] = times * degrees[b] // degrees[a], -times
                rows += [row, -row]
                times *= 2
    return np.array(rows, dtype=np.int64).reshape(-1, len(degrees))
