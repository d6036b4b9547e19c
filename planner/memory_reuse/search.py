"""An arena of a given capacity: the tree search in several orders, with growing limits on nodes.

One order of the buffers solves in a thousand nodes what another does not in a million, and no order
is best on every instance. Each gets 2n nodes in turn, then 8n, 32n and so on: the total is at most
a small multiple of what the best order alone needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from .. import jit
from .buffers import Buffers, Ints
from .sections import Sections, sections_of
from .tree import FOUND, INFEASIBLE, SIGNATURE, search_tree
from .tree_arrays import search_arrays

KEYS = ("TWA", "TAW", "WAT", "AWT", "WTA", "ATW")
"""Orders (module `tree`): T largest sum of unplaced sizes among a buffer's sections, W length of
life, A area."""
FIRST_KEYS = 3
"""The others join when these have failed `LATE_ROUND` times."""
LATE_ROUND = 4
GROWTH = 4
FEW = 200
"""Up to this many buffers the first round takes the NumPy loop: often it is enough, and compiling
or loading the other takes longer."""
NODE_WORK_S = 4e-9
"""Seconds per unit of `node_work` in the compiled loop (measured, about), for the first limit."""
Status = Literal["found", "infeasible", "nodes", "time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Buffers prepared for any number of searches."""

    sections: Sections
    ranks: dict[str, tuple[Ints, Ints]]
    """Per key, ranks by the letters before T and after it: `tree`'s `before` and `after`."""

    def __len__(self) -> int:
        return len(self.sections.first)

    @property
    def node_work(self) -> int:
        """What one node looks at: the buffers, and about an eighth of the sections' members."""
        return len(self) + len(self.sections.members) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a search for one capacity came to."""

    status: Status
    nodes: int
    key: str = ""
    """The order that settled it."""
    offsets: Ints | None = None
    """In the order of the buffers, when found."""


def prepare(buffers: Buffers) -> Problem:
    """Sections and orders of some buffers."""
    sections = sections_of(buffers)
    length = (buffers.upper - buffers.lower)[sections.order]
    area = sections.size_bytes * length.astype(np.float64)
    values = {"W": -length.astype(np.float64), "A": -area}
    ranks: dict[str, tuple[Ints, Ints]] = {}
    for key in KEYS:
        ahead, behind = ([values[letter] for letter in part] for part in key.split("T"))
        ranks[key] = (_dense(ahead, len(buffers)), _unique(behind, len(buffers)))
    return Problem(sections=sections, ranks=ranks)


def _dense(columns: list[np.ndarray], count: int) -> Ints:
    """Ranks where equal rows share one."""
    if not columns:
        return np.zeros(count, dtype=np.int64)
    _, place = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    return place.reshape(-1).astype(np.int64)


def _unique(columns: list[np.ndarray], count: int) -> Ints:
    """Ranks where equal rows follow each other."""
    order = np.lexsort(columns[::-1]) if columns else np.arange(count)
    found = np.empty(count, dtype=np.int64)
    found[order] = np.arange(count)
    return found


@cache
def _compiled() -> Callable[..., int]:
    return jit.compiled(search_tree, SIGNATURE)


def search_once(
    problem: Problem,
    key: str,
    capacity_bytes: int,
    max_nodes: int,
    expired: Callable[[], bool] | None = None,
    fast: bool = True,
) -> Outcome:
    """One search in one order.

    `fast` takes the compiled loop where numba is installed. `expired` is asked by the NumPy loop
    only: the compiled one has no clock, and its time is limited by its nodes.
    """
    sections = problem.sections
    before, after = problem.ranks[key]
    offset = np.zeros(len(problem), dtype=np.int64)
    nodes = np.zeros(1, dtype=np.int64)
    arguments = (
        sections.first,
        sections.last,
        sections.size_bytes,
        sections.rounded_bytes,
        sections.alignment_bytes,
        before,
        after,
        sections.total_bytes.copy(),
        capacity_bytes + sections.slack_bytes,
        sections.cuts.copy(),
        sections.member_start,
        sections.members,
        offset,
        capacity_bytes,
        max_nodes,
        np.zeros(len(problem), dtype=np.int64),
        nodes,
    )
    if fast and jit.has_numba():
        code = _compiled()(*arguments)
    else:
        code = search_arrays(*arguments, expired)
    if code == INFEASIBLE:
        return Outcome(status="infeasible", nodes=int(nodes[0]), key=key)
    if code == FOUND:
        offsets = np.empty_like(offset)
        offsets[sections.order] = offset
        return Outcome(status="found", nodes=int(nodes[0]), key=key, offsets=offsets)
    return Outcome(status="nodes", nodes=int(nodes[0]), key=key)


def search(
    problem: Problem,
    capacity_bytes: int,
    max_nodes: int,
    clock: Callable[[], float],
    deadline_s: float,
) -> Outcome:
    """Offsets within a capacity, the proof that there are none, or the limit that struck.

    At most `max_nodes` nodes over all orders. The clock is read between searches, and what is left
    of the time limits the nodes of the next one at the pace so far.
    """
    count = len(problem)
    if capacity_bytes < problem.sections.lower_bound_bytes:
        return Outcome(status="infeasible", nodes=0, key="bound")
    spent, limit, since = 0, 2 * count, clock()
    expired = lambda: clock() >= deadline_s  # noqa: E731
    for attempt in range(64):
        for key in KEYS if attempt >= LATE_ROUND else KEYS[:FIRST_KEYS]:
            now = clock()
            if now >= deadline_s:
                return Outcome(status="time", nodes=spent)
            allowed = min(limit, max_nodes - spent)
            if allowed <= 0:
                return Outcome(status="nodes", nodes=spent)
            node_s = (now - since) / spent if spent else NODE_WORK_S * problem.node_work
            if node_s > 0:
                allowed = min(allowed, 64 + int((deadline_s - now) / node_s))
            fast = attempt > 0 or count > FEW
            found = search_once(problem, key, capacity_bytes, allowed, expired, fast)
            spent += found.nodes
            if found.status != "nodes":
                return Outcome(status=found.status, nodes=spent, key=key, offsets=found.offsets)
        limit *= GROWTH
    return Outcome(status="nodes", nodes=spent)
