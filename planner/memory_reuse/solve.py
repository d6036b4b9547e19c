"""The smallest arena for buffers with lifetimes: bounds, heuristics, search, and an honest gap.

    minimise    peak
    subject to  o_i + z_i <= peak                                for every buffer i
                g_i divides o_i, o_i >= 0
                o_i + z_i <= o_j  or  o_j + z_j <= o_i           where the lives of i and j meet

1. lower bound (`buffers`); 2. first and best fit in several orders until one meets the bound;
3. tree search (`search`) for an arena of the bound; where nodes run out there, for arenas between
the bound and the best so far, halving the distance. A search that ends without one raises the
bound. Where there are too many buffers for a search, orders of first fit are repaired. Every arena
is checked pair by pair (`check_offsets`) before it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import numpy as np

from ...errors import InputError, NoFeasiblePlan
from ...units import format_bytes
from . import first_fit
from .buffers import Buffers, Ints, check_offsets, max_live_bytes, offsets_by_id, peak_bytes
from .search import prepare, search
from .sections import num_memberships, sections_of

TIME_LIMIT_S = 60.0
WORK_BUDGET = 10**9
"""Limit of a search for one capacity, so that no clock decides: nodes times `Problem.node_work`,
some seconds with numba. Where it is not enough to place every buffer once, orders of first fit are
repaired instead of a search."""
REPAIRED = "load-length"
"""The order that is repaired where there are too many buffers for a search: its arenas are not the
smallest, but those that repair makes smallest."""
REPAIR_ROUNDS = 24
CLOSE = 1e-4
"""Distance of arenas, as a part of the bound, that is not worth another search."""
SHARE = 0.6
"""Part of the time left that one search may take."""
MOST_MEMBERSHIPS = 20_000_000
"""Above it (160 MB of indices) there is no search: the best fit stands, with its gap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Offsets of buffers in one arena."""

    buffers: Buffers
    offsets: Ints
    """(n,) bytes, in the order of the buffers."""
    lower_bound_bytes: int
    """No arena is smaller: max-live, or more where a search proved it."""
    method: str
    """What found the offsets."""
    nodes: int
    """Placements that searches tried."""
    limit: Literal["time", "nodes"] | None
    """What ended the search before it was done."""
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """The arena."""
        return peak_bytes(self.buffers, self.offsets)

    @property
    def optimal(self) -> bool:
        """Whether no arena is smaller."""
        return self.peak_bytes == self.lower_bound_bytes

    def document(self) -> dict[str, Any]:
        """The JSON document of `forerun solve memory`."""
        peak, live = self.peak_bytes, max_live_bytes(self.buffers)
        return {
            "offsets": dict(offsets_by_id(self.buffers, self.offsets)),
            "peak_bytes": peak,
            "lower_bound_bytes": self.lower_bound_bytes,
            "optimal": self.optimal,
            "gap": peak / self.lower_bound_bytes - 1,
            "max_live_bytes": live,
            "fragmentation": peak / live,
            "method": self.method,
            "nodes": self.nodes,
            "limit": self.limit,
            "seconds": self.seconds,
        }


def solve(
    buffers: Buffers,
    *,
    capacity_bytes: int | None = None,
    time_limit_s: float = TIME_LIMIT_S,
    clock: Callable[[], float] = perf_counter,
) -> MemoryPlan:
    """Offsets in the smallest arena that is found, or in any within `capacity_bytes`.

    With a capacity the search ends at the first arena within it; `check_capacity` says whether one
    was found. Raises InputError for a capacity below the largest buffer. The result depends on the
    clock only when its `limit` is "time".
    """
    start = clock()
    if capacity_bytes is not None:
        _check_largest(buffers, capacity_bytes)
    state = _State(buffers=buffers, capacity_bytes=capacity_bytes, bound_bytes=_bound(buffers))
    for name, offsets in first_fit.improving(buffers):
        if offsets is not None:
            state.take(offsets, name)
        if state.done or clock() - start >= time_limit_s:
            break
    if not state.done:
        _search(state, clock, start + time_limit_s)
    wrong = check_offsets(buffers, state.offsets)
    assert wrong is None, wrong
    return MemoryPlan(
        buffers=buffers,
        offsets=state.offsets,
        lower_bound_bytes=state.bound_bytes,
        method=state.method,
        nodes=state.nodes,
        limit=None if state.done and state.limit == "nodes" else state.limit,
        seconds=clock() - start,
    )


def check_capacity(plan: MemoryPlan, capacity_bytes: int) -> None:
    """Raise NoFeasiblePlan when an arena does not fit, saying by how much."""
    peak, bound = plan.peak_bytes, plan.lower_bound_bytes
    if peak <= capacity_bytes:
        return
    if bound > capacity_bytes:
        reason = f"no arena is smaller than {bound} bytes ({format_bytes(bound)})"
    elif plan.limit == "time":
        reason = "none found before the time limit, none ruled out; raise --time-limit"
    else:
        reason = "none found within the limit on nodes, none ruled out"
    raise NoFeasiblePlan(
        f"capacity={capacity_bytes}: {reason}",
        f"the best offsets need {peak} bytes, {peak - capacity_bytes} more than the capacity",
    )


def _check_largest(buffers: Buffers, capacity_bytes: int) -> None:
    largest = int(buffers.size_bytes.argmax())
    size = int(buffers.size_bytes[largest])
    if capacity_bytes < size:
        raise InputError("capacity", capacity_bytes,
                         f"below buffer {buffers.ids[largest]} alone, which has {size} bytes",
                         f"give {_bound(buffers)} or more")  # fmt: skip


def _bound(buffers: Buffers) -> int:
    """The lower bound, as a multiple of the unit of all arenas."""
    unit = buffers.unit_bytes
    if buffers.grain_bytes > 1 and num_memberships(buffers) <= MOST_MEMBERSHIPS:
        bound = sections_of(buffers).lower_bound_bytes
    else:
        bound = max_live_bytes(buffers)
    return -(-bound // unit) * unit


@dataclass(slots=True, kw_only=True)
class _State:
    """The best arena so far and what is known about smaller ones."""

    buffers: Buffers
    capacity_bytes: int | None
    bound_bytes: int
    offsets: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    peak_bytes: int = 0
    """0 before the first arena."""
    method: str = ""
    nodes: int = 0
    limit: Literal["time", "nodes"] | None = None

    @property
    def done(self) -> bool:
        """Whether the bound is met, or the capacity."""
        if not self.peak_bytes:
            return False
        within = self.capacity_bytes is not None and self.peak_bytes <= self.capacity_bytes
        return within or self.peak_bytes == self.bound_bytes

    def take(self, offsets: Ints, method: str) -> None:
        """A smaller arena."""
        self.offsets, self.method = offsets, method
        self.peak_bytes = peak_bytes(self.buffers, offsets)


def _search(state: _State, clock: Callable[[], float], deadline_s: float) -> None:
    """Search between the bound and the best arena until nothing is left between them, or time."""
    if num_memberships(state.buffers) > MOST_MEMBERSHIPS:
        _repair(state, clock, deadline_s)
        return
    problem = prepare(state.buffers)
    unit = state.buffers.unit_bytes
    budget = WORK_BUDGET // problem.node_work
    if budget < len(problem):
        _repair(state, clock, deadline_s)
        return
    hopeless = 0  # the largest arena for which nodes or time ran out
    wanted = state.capacity_bytes
    while not state.done:
        now = clock()
        if now >= deadline_s:
            state.limit = "time"
            return
        lowest = max(state.bound_bytes, hopeless + unit)
        if hopeless and state.peak_bytes - lowest <= max(unit, CLOSE * state.bound_bytes):
            return
        if wanted is not None and wanted >= state.bound_bytes and not hopeless:
            target = wanted
        elif hopeless or state.nodes:
            target = lowest + (state.peak_bytes - unit - lowest) // unit // 2 * unit
        else:
            target = lowest
        share = 1.0 if target == wanted else SHARE if target == lowest else SHARE / 2
        found = search(problem, target, budget, clock, now + share * (deadline_s - now))
        state.nodes += found.nodes
        if found.status == "found":
            assert found.offsets is not None
            state.take(found.offsets, f"search {found.key}")
        elif found.status == "infeasible":
            state.bound_bytes = max(state.bound_bytes, target // unit * unit + unit)
        else:
            hopeless = max(hopeless, target // unit * unit)
            budget = budget // 4 + 1
            state.limit = "time" if "time" in (found.status, state.limit) else "nodes"


def _repair(state: _State, clock: Callable[[], float], deadline_s: float) -> None:
    """Better orders for first fit, where there are too many buffers for a search."""
    state.limit = "nodes"
    buffers = state.buffers
    sorted_by = first_fit.orders(buffers)
    loose = int((buffers.size_bytes + buffers.alignment_bytes).sum())
    if clock() >= deadline_s:
        state.limit = "time"
        return
    offsets = first_fit.first_fit(buffers, sorted_by[REPAIRED], False, loose)
    assert offsets is not None
    for better in first_fit.repaired(
        buffers, sorted_by[REPAIRED], offsets, state.bound_bytes, REPAIR_ROUNDS
    ):
        if better is not None and peak_bytes(buffers, better) < state.peak_bytes:
            state.take(better, f"repaired first-fit {REPAIRED}")
        if state.done:
            return
        if clock() >= deadline_s:
            state.limit = "time"
            return
