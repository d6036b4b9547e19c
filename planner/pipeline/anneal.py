"""Annealing of orders: one action of the critical path at a time is moved along its rank.

    state     the order of each rank, with the backward pass split
    move      an action of the critical path goes 1 place (half of the time) or up to 11 places
              earlier or later; as far as it passes neither an action of its own micro-batch and
              stage nor one of its own kind and stage
    refuse    when the activations kept exceed the limit anywhere, or the ranks wait in a circle
    accept    when makespan(new) <= makespan(old) + T e,  e exponential with mean 1;
              T falls linearly to zero

Actions that start before the place of a move stay as they are, so that only the rest is played
again, and no further than until a rank's remaining work shows that the move is not accepted. The
random numbers do not depend on the loops, which give the same with and without numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...orders import Orders
from .actions import Pipeline
from .play import FLOATS, INTS, durations_s, floats, ints, loop, makespan_s, orders_of, rows_of

SEGMENT = 250
"""Moves between two looks at the clock."""
START = 0.05
"""The first T, in mean durations of a rank's F, I and W of one micro-batch."""
FARTHEST = 11
SLACK = 1e-9
"""Relative to the makespan: times nearer than this are equal."""


def anneal(
    pipeline: Pipeline,
    seed: Orders,
    limit: float,
    *,
    moves: int,
    target_s: float = 0.0,
    expired: Callable[[], bool] = lambda: False,
    stream: int = 0,
) -> tuple[float, Orders, int]:
    """Better orders from complete ones with the backward pass split, within the memory limit.

    Parameters
    ----------
    moves : how many are tried at most.
    target_s : a makespan at which to stop, such as a lower bound.
    expired : whether a time limit has struck; asked every `SEGMENT` moves.
    stream : which sequence of random numbers.

    Returns
    -------
    The shortest makespan met, never above the seed's; its orders; the moves tried.
    """
    import numpy as np

    search = _Search(pipeline, seed, limit)
    mean_s = sum(map(pipeline.busy_s, range(pipeline.num_ranks))) / (3 * pipeline.num_ranks)
    random = np.random.default_rng(stream)
    tried = 0
    while tried < moves and search.best_s > target_s + search.slack_s and not expired():
        count = min(SEGMENT, moves - tried)
        warmth_s = START * mean_s * (1 - (tried + np.arange(count)) / moves)
        allowed_s = warmth_s * random.exponential(size=count)
        draws = zip(*random.random((3, count)).tolist(), allowed_s.tolist(), strict=True)
        for which, how_far, direction, extra_s in draws:
            search.step(which, how_far, direction < 0.5, extra_s)
            tried += 1
            if search.best_s <= target_s + search.slack_s:
                break
    return search.best_s, orders_of(pipeline, search.best), tried


class _Search:
    """The state of one annealing: rows of slots, when each ends, the critical path, the best."""

    def __init__(self, pipeline: Pipeline, seed: Orders, limit: float) -> None:
        p, num_slots = pipeline.num_ranks, len(pipeline.waits_for)
        self.num_ranks, self.micros = p, pipeline.num_micro_batches
        self.limit = limit + SLACK
        self.rows = ints(rows_of(pipeline, seed))
        self.width = len(self.rows) // p
        graph = (ints(pipeline.waits_for), floats(pipeline.transfers_s))
        self.duration = floats(durations_s(pipeline))
        self.graph = (p, self.rows, self.duration, *graph)
        self.gain = floats(_gains(pipeline))
        self.end = floats([-1.0] * num_slots)
        self.trial = floats([-1.0] * num_slots)
        self.path = ints([0] * num_slots)
        self.place = ints([0] * num_slots)
        ends = f"{FLOATS}, {INTS}, {FLOATS}, {FLOATS}"
        self._shift = loop(
            shift_rows, f"int64({INTS}, {FLOATS}, int64, int64, int64, int64, float64)"
        )
        self._replay = loop(
            replay_rows, f"float64(int64, {INTS}, {ends}, {FLOATS}, int64, float64)"
        )
        self._trace = loop(
            trace_rows, f"int64(int64, {INTS}, {ends}, {INTS}, {INTS}, boolean, float64)"
        )
        self.now_s = self.best_s = makespan_s(pipeline, seed)
        self.slack_s = SLACK * self.now_s
        self._replay(*self.graph, self.end, self.trial, 0, float("inf"))
        self.end[:] = self.trial
        self.best = self.rows[:] if isinstance(self.rows, list) else self.rows.copy()
        self.length = 0
        self.flip = False
        self._find_path()

    def _find_path(self) -> None:
        self.flip = not self.flip
        found = (self.end, self.place, self.path, self.flip, self.slack_s)
        self.length = self._trace(*self.graph, *found)

    def step(self, which: float, how_far: float, earlier: bool, extra_s: float) -> None:
        """Try one move, given by three numbers in [0, 1) and the loss at which it is accepted."""
        source = self.path[int(which * self.length)]
        distance = 1 if how_far < 0.5 else 1 + int((2 * how_far - 1) * FARTHEST)
        first = source // self.width * self.width
        target = source - distance if earlier else source + distance
        target = min(max(target, first), first + self.width - 1)
        row = (self.rows, self.gain, self.micros, first)
        reached = self._shift(*row, source, target, self.limit)
        if reached == source:
            return
        accepted_s = self.now_s + extra_s + self.slack_s
        low = min(source, reached)
        new_s = self._replay(*self.graph, self.end, self.trial, low, accepted_s)
        if new_s > accepted_s:
            self._shift(*row, reached, source, float("inf"))
            self.trial[:] = self.end
            return
        self.end[:] = self.trial
        self.now_s = new_s
        if new_s < self.best_s - self.slack_s:
            self.best_s = new_s
            self.best[:] = self.rows
        self._find_path()


def _gains(pipeline: Pipeline) -> list[float]:
    """What each slot adds to the activations of its rank."""
    m, num_slots = pipeline.num_micro_batches, len(pipeline.waits_for)
    sign = {"F": 1.0, "I": 0.0, "W": -1.0}
    actions = (pipeline.action(slot) for slot in range(0, num_slots, m))
    per_row = [sign[kind] * pipeline.activation[stage] for kind, stage, _ in actions]
    return [value for value in per_row for _ in range(m)]


def shift_rows(
    rows: Any, gain: Any, micros: int, first: int, source: int, target: int, limit: float
) -> int:
    """Move the slot at `source` to `target` or as near as may be; where it then is.

    It stays where it is when the row, which begins at `first`, would exceed the limit.
    """
    num_items = len(gain) // 3
    moved = rows[source]
    side = 1 if target > source else -1
    at = source
    while at != target:
        other = rows[at + side]
        if other % num_items == moved % num_items or other // micros == moved // micros:
            break
        rows[at] = other
        at += side
    rows[at] = moved
    if at == source or limit == float("inf"):
        return at
    live = 0.0
    for index in range(first, max(at, source) + 1):
        live += gain[rows[index]]
        if live > limit:
            while at != source:
                rows[at] = rows[at - side]
                at -= side
            rows[source] = moved
            return source
    return at


def replay_rows(
    num_ranks: int,
    rows: Any,
    duration: Any,
    waits_for: Any,
    transfer: Any,
    end: Any,
    trial: Any,
    low: int,
    accepted_s: float,
) -> float:
    """Play what a change at index `low` of the rows can reach; the makespan, or infinity.

    `end` holds the times before the change, `trial` the same and then the new ones. Infinity: the
    ranks wait in a circle, or the makespan exceeds `accepted_s`.
    """
    width = len(rows) // num_ranks
    since = 0.0 if low % width == 0 else end[rows[low - 1]]
    position = [0] * num_ranks
    clock = [0.0] * num_ranks
    left = [0.0] * num_ranks
    count = 0
    for rank in range(num_ranks):
        first = rank * width
        below, above = first, first + width
        if low == 0:
            above = first
        elif first <= low < first + width:
            below = above = low
        while below < above:
            middle = (below + above) // 2
            if end[rows[middle]] - duration[rows[middle]] < since:
                below = middle + 1
            else:
                above = middle
        position[rank] = above
        if above > first:
            clock[rank] = end[rows[above - 1]]
        for index in range(above, first + width):
            slot = rows[index]
            trial[slot] = -1.0
            left[rank] += duration[slot]
            count += 1
    moved = True
    while moved:
        moved = False
        for rank in range(num_ranks):
            at, now = position[rank], clock[rank]
            start_at = at
            while at < (rank + 1) * width:
                slot = rows[at]
                before = waits_for[slot]
                if before >= 0:
                    ready = trial[before]
                    if ready < 0.0:
                        break
                    now = max(now, ready + transfer[slot])
                now += duration[slot]
                left[rank] -= duration[slot]
                trial[slot] = now
                at += 1
            if at > start_at:
                moved = True
                count -= at - start_at
                if now + left[rank] > accepted_s:
                    return float("inf")
                position[rank], clock[rank] = at, now
    return max(clock) if count == 0 else float("inf")


def trace_rows(
    num_ranks: int,
    rows: Any,
    duration: Any,
    waits_for: Any,
    transfer: Any,
    end: Any,
    place: Any,
    path: Any,
    by_rank: bool,
    slack_s: float,
) -> int:
    """Fill `path` with the indices in the rows of a critical path; its length.

    Where both the action before on the rank and the one waited for bind, `by_rank` decides.
    `place` is working room.
    """
    width = len(rows) // num_ranks
    last = 0
    for index in range(len(rows)):
        place[rows[index]] = index
        if end[rows[index]] > end[rows[last]]:
            last = index
    length = 0
    at = last
    while at >= 0:
        path[length] = at
        length += 1
        slot = rows[at]
        start = end[slot] - duration[slot] - slack_s
        before = waits_for[slot]
        behind = at % width > 0 and end[rows[at - 1]] >= start
        waited = before >= 0 and end[before] + transfer[slot] >= start
        if behind and (by_rank or not waited):
            at -= 1
        elif waited:
            at = place[before]
        else:
            at = -1
    return length
