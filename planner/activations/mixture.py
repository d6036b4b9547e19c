"""The best mixture of policies where the device alone is scarce: labels between a bound and a rest.

A policy with nothing, all, or as much on the host as hides for free is a *point* (bytes, seconds)
of a layer. Seconds are linear between the points of a policy, so that all layers but one may stand
on points, and that last one on a line between two of them.

    sets       tau layer types with N_tau layers; p in tau their points, non-dominated
    variables  n_p in {0, 1, ...}; one layer anywhere on the lines between points
    objective  min sum_p n_p c_p + seconds of the last layer
    rules      count_tau:  the layers of each type add up to N_tau
               device:     sum_p n_p b_p + bytes of the last layer <= M / k

The linear relaxation fills the lower convex hulls of the points in the order of their slopes; its
last slope is the price w of a byte, and m_tau = min over p of c_p + w b_p gives

    cost = bound + sum_p n_p rc_p + w (M / k - bytes used) ,    rc_p = c_p + w b_p - m_tau >= 0

Layer by layer every partial mixture whose sum of rc stays below the distance of the best solution
to the bound is kept, unless another one of as many layers has no more bytes and no more seconds.
What is left at the end is proven best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .copies import Columns, extra_s, moved_bytes
from .policies import Floats, undominated
from .problem import Limits, Problem
from .relax import lower_hull

NEAR = 1e-9
WIDTHS = (64, 1024)
"""Labels kept per layer: few to find a good mixture quickly, then many to prove it."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Whole numbers of layers per policy."""

    counts: Floats
    """Layers per column."""
    bound_s: float
    """No mixture needs less; equal to the seconds of this one where that is proven."""
    finished: bool
    """Whether the seconds are proven to be within the gap."""


@dataclass(frozen=True, slots=True)
class _Points:
    """Points of all types: their column, device bytes and seconds of one layer."""

    column: np.ndarray
    kind: np.ndarray
    bytes: Floats
    seconds: Floats

    def take(self, index: np.ndarray) -> _Points:
        return _Points(self.column[index], self.kind[index], self.bytes[index], self.seconds[index])


def mix(columns: Columns, problem: Problem, gap: float, expired: Callable[[], bool]) -> Mixture:
    """A mixture within `gap`, relative, of the best without a host limit; one must exist.

    `expired` says when to stop with the best so far.
    """
    limits = problem.limits
    room = limits.device_bytes / limits.live_micro_batches
    numbers = np.array([layer.count for layer in problem.layers])
    points = _points(columns, problem)
    bound_s, price, best = _relaxation(points, numbers, room)
    best_s = _cost(columns, points, best, problem)
    floor = np.array([np.min((points.seconds + price * points.bytes)[points.kind == t])
                      for t in range(len(numbers))])  # fmt: skip
    reduced = np.maximum(points.seconds + price * points.bytes - floor[points.kind], 0.0)
    counts = _counts(points, best, len(columns))
    search = _Search(columns, problem, points, reduced, room, price, bound_s, expired)
    lasts = range(len(numbers)) if limits.offload else (None,)
    for width in WIDTHS:
        complete = True
        for last in lasts:
            if best_s <= bound_s * (1 + gap) + NEAR * best_s:
                break
            found, whole = search.run(numbers, last, best_s / (1 + gap), width)
            complete = complete and whole
            if found is not None:
                counts, best_s = found
        if complete:
            return Mixture(counts, max(bound_s, best_s / (1 + gap)), True)
    return Mixture(counts, min(bound_s, best_s), False)


def _points(columns: Columns, problem: Problem) -> _Points:
    """The non-dominated points of every type."""
    limits = problem.limits
    one, which = np.ones(len(columns)), np.arange(len(columns))
    moved = [0.0 * one]
    if limits.offload:
        rate = limits.copy_bytes_per_s
        hidden = rate * (columns.forward_s + columns.forward_window_s)
        hidden_back = rate * (columns.backward_s + columns.backward_window_s)
        ends = (hidden, hidden_back, columns.stored_bytes)
        moved += [np.minimum(end, columns.stored_bytes) for end in ends]
    every = _Points(
        np.tile(which, len(moved)),
        np.tile(columns.kind, len(moved)),
        np.concatenate([columns.stored_bytes - m for m in moved]),
        np.concatenate([extra_s(columns, one, m, limits) for m in moved]),
    )
    kept: list[np.ndarray] = []
    for kind in range(len(problem.layers)):
        own = np.flatnonzero(every.kind == kind)
        own = own[undominated(np.stack((every.bytes[own], every.seconds[own]), axis=1))]
        kept.append(own[np.lexsort((every.seconds[own], every.bytes[own]))])
    return every.take(np.concatenate(kept))


def _relaxation(points: _Points, numbers: np.ndarray, room: float) -> tuple[float, float, Floats]:
    """The bound, the price of a byte, and whole numbers of layers per point below the bound's."""
    counts = np.zeros(len(points.bytes))
    segments: list[tuple[float, int, int]] = []
    for kind, number in enumerate(numbers):
        own = np.flatnonzero(points.kind == kind)
        corners = own[lower_hull(points.bytes[own], points.seconds[own])]
        counts[corners[0]] = number
        for left, right in pairwise(corners):
            width = points.bytes[right] - points.bytes[left]
            slope = (points.seconds[right] - points.seconds[left]) / width
            segments.append((float(slope), int(left), int(right)))
    seconds = float(counts @ points.seconds)
    left_over = room - float(counts @ points.bytes)
    for slope, left, right in sorted(segments):
        number = float(numbers[points.kind[left]])
        width = points.bytes[right] - points.bytes[left]
        if left_over < number * width:
            whole = np.floor(left_over / width * (1 + 1e-12))
            counts[left] -= whole
            counts[right] += whole
            return max(0.0, float(seconds + slope * left_over)), -slope, counts
        counts[left] -= number
        counts[right] += number
        seconds += slope * number * width
        left_over -= number * width
    return max(0.0, seconds), 0.0, counts


def _counts(points: _Points, numbers: Floats, num_columns: int) -> Floats:
    """Layers per column from layers per point."""
    return np.bincount(points.column, weights=numbers, minlength=num_columns).astype(float)


def _cost(columns: Columns, points: _Points, numbers: Floats, problem: Problem) -> float:
    counts = _counts(points, numbers, len(columns))
    moved = moved_bytes(columns, counts, problem.limits)
    assert moved is not None
    return float(np.sum(extra_s(columns, counts, moved, problem.limits)))


@dataclass(frozen=True, slots=True)
class _Search:
    """The labels: arrays of bytes, seconds, sums of rc, and rows of layers per point."""

    columns: Columns
    problem: Problem
    points: _Points
    reduced: Floats
    room: float
    price: float
    bound_s: float
    expired: Callable[[], bool]

    def run(
        self, numbers: np.ndarray, last: int | None, target_s: float, width: int
    ) -> tuple[tuple[Floats, float] | None, bool]:
        """Counts per column and seconds, if below `target_s`; whether no label was given up.

        `last` is the type of the layer that may stand between points; `width` the number of labels
        kept per layer.
        """
        slack = (target_s - self.bound_s) * (1 - NEAR)
        near = np.flatnonzero(self.reduced < slack)
        points, reduced = self.points.take(near), self.reduced[near]
        remaining, complete = numbers.copy(), True
        if last is not None:
            remaining[last] -= 1
        least = np.array([np.min(points.bytes[points.kind == t]) for t in range(len(numbers))])
        if last is not None:
            least[last] = min(least[last], 0.0)
        bytes_, seconds, sums = np.zeros(1), np.zeros(1), np.zeros(1)
        rows = np.zeros((1, len(near)), dtype=np.int32)
        for kind in range(len(numbers)):
            own = np.flatnonzero(points.kind == kind)
            for _ in range(int(remaining[kind])):
                if self.expired():
                    return None, False
                remaining[kind] -= 1
                most = self.room * (1 + 1e-12) - float(remaining @ least)
                next_bytes = (bytes_[:, None] + points.bytes[own]).ravel()
                next_sums = (sums[:, None] + reduced[own]).ravel()
                alive = np.flatnonzero((next_bytes <= most) & (next_sums < slack))
                if not len(alive):
                    return None, complete
                next_seconds = (seconds[:, None] + points.seconds[own]).ravel()[alive]
                pairs = np.stack((next_bytes[alive], next_seconds), axis=1)
                alive = alive[undominated(pairs)]
                if len(alive) > width:
                    complete = False
                    alive = np.sort(alive[np.argsort(next_sums[alive], kind="stable")[:width]])
                parent, chosen = np.divmod(alive, len(own))
                rows = rows[parent]
                rows[np.arange(len(rows)), own[chosen]] += 1
                bytes_, sums = next_bytes[alive], next_sums[alive]
                seconds = seconds[parent] + points.seconds[own[chosen]]
        return self._close(points, rows, bytes_, seconds, last, target_s), complete

    def _close(
        self,
        points: _Points,
        rows: np.ndarray,
        bytes_: Floats,
        seconds: Floats,
        last: int | None,
        target_s: float,
    ) -> tuple[Floats, float] | None:
        """The best label, with its last layer where there is one."""
        columns, limits = self.columns, self.problem.limits
        own = np.zeros(1, dtype=np.intp)
        if last is not None:
            own = np.flatnonzero(columns.kind == last)
            left = np.maximum(self.room - bytes_, 0.0)
            seconds = seconds[:, None] + _between(columns.take(own), left, limits)
        at = int(np.argmin(seconds))
        if seconds.flat[at] >= target_s:
            return None
        label, chosen = np.divmod(at, len(own))
        counts = np.bincount(points.column, weights=rows[label], minlength=len(columns))
        counts = counts.astype(float)
        if last is not None:
            counts[own[chosen]] += 1
        return counts, float(seconds.flat[at])


def _between(columns: Columns, left_bytes: Floats, limits: Limits) -> Floats:
    """Seconds of one layer (labels, columns) that has `left_bytes` on the device."""
    rate = limits.copy_bytes_per_s
    copying_s = np.maximum(columns.stored_bytes - left_bytes[:, None], 0.0) / rate
    there = np.maximum(columns.forward_s, copying_s - columns.forward_window_s)
    return there + np.maximum(columns.backward_s, copying_s - columns.backward_window_s)
