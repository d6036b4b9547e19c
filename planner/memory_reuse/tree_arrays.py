"""The search of `tree` with NumPy in place of its inner loops: same nodes, same answer.

Sets, variables, constraints and rules stand there; here a node costs a few dozen calls on arrays
instead of loops, which is what a Python without numba is quick at. Of a placed row the least offset
is NEVER, so that minima pass over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .buffers import Ints
from .sections import range_maxima
from .tree import FOUND, INFEASIBLE, MANY, NEVER, NODE_LIMIT


@dataclass(slots=True)
class Frame:
    """A sub-problem: sections [p, q), its rows, and the placement that is being tried in it."""

    p: int
    q: int
    head: int
    """First unplaced row."""
    stop: int
    """The row after the last one."""
    offset: int
    rank: int
    """The placement last tried, or the one before the sub-problem."""
    ordered: int
    """Unplaced rows when ranks were last given."""
    ceiling: int = 0
    """Candidates start below it."""
    placed: int = -1
    log_size: int = 0
    part: int = 0
    """Section to look for the next part from."""
    hat: bool = False


def search_arrays(
    first: Ints,
    last: Ints,
    size: Ints,
    rounded: Ints,
    alignment: Ints,
    before: Ints,
    after: Ints,
    total: Ints,
    room: Ints,
    cut: Ints,
    member_start: Ints,
    members: Ints,
    offset: Ints,
    capacity: int,
    max_nodes: int,
    rank: Ints,
    nodes: Ints,
    expired: Callable[[], bool] | None = None,
) -> int:
    """What `tree.search_tree` gives; also NODE_LIMIT when `expired` says so."""
    n, num_sections = len(first), len(total)
    least = np.zeros(n, dtype=np.int64)
    floor = np.zeros(num_sections, dtype=np.int64)
    log: list[tuple[Any, ...]] = []  # (array, where, values before), or (row,) placed
    frames = [Frame(p=0, q=num_sections, head=0, stop=n, offset=0, rank=-1, ordered=2 * n)]
    count = 0

    def undo(mark: int) -> None:
        while len(log) > mark:
            entry = log.pop()
            if len(entry) == 3:
                entry[0][entry[1]] = entry[2]
            else:
                i, at = entry
                least[i] = at
                total[first[i] : last[i]] += rounded[i]
                cut[first[i] : last[i] - 1] += 1

    def lift(low: int, high: int) -> bool:
        """Take the floors of sections [low, high) again; whether they still hold what is left."""
        start = member_start[low]
        values = least[members[start : member_start[high]]]
        log.append((floor, slice(low, high), floor[low:high].copy()))
        lifted = np.minimum.reduceat(values, member_start[low:high] - start)
        floor[low:high] = lifted
        left = total[low:high]
        return not bool(((lifted + left > room[low:high]) & (left > 0)).any())

    def place(frame: Frame, i: int, at: int) -> bool:
        """Place a row; whether what follows can still fit."""
        frame.log_size, frame.placed = len(log), i
        log.append((i, at))
        offset[i] = at
        least[i] = NEVER
        a, b = int(first[i]), int(last[i])
        total[a:b] -= rounded[i]
        cut[a : b - 1] -= 1
        top = at + int(rounded[i])
        frame.hat = False
        if at + size[i] > capacity:
            return False
        start = frame.head
        stop = start + int(np.searchsorted(first[start : frame.stop], b))
        old = least[start:stop]
        raised = start + np.flatnonzero((last[start:stop] > a) & (old < top))
        if not len(raised):
            frame.hat = True
            return lift(a, b)
        to = -(-top // alignment[raised]) * alignment[raised]
        log.append((least, raised, least[raised]))
        least[raised] = to
        if (to + size[raised] > capacity).any():
            return False
        return lift(min(a, int(first[raised[0]])), max(b, int(last[raised].max())))

    def candidate(frame: Frame) -> int:
        """The unplaced row that comes next by (least offset, rank), or -1."""
        values = least[frame.head : frame.stop]
        ranks = rank[frame.head : frame.stop]
        later = (values > frame.offset) | ((values == frame.offset) & (ranks > frame.rank))
        rows = np.flatnonzero(later & (values < frame.ceiling))
        if not len(rows):
            return -1
        lowest = values[rows].min()
        rows = rows[values[rows] == lowest]
        return frame.head + int(rows[np.argmin(ranks[rows])])

    def give_ranks(frame: Frame, unplaced: Ints) -> None:
        """Rank the rows of a part by what is left of its sections."""
        rows = unplaced
        log.append((rank, rows, rank[rows]))
        sums = total[frame.p : frame.q]
        fullest = range_maxima(sums, first[rows] - frame.p, last[rows] - frame.p)
        order = np.lexsort((after[rows], -fullest, before[rows]))
        rank[rows[order]] = np.arange(len(rows))

    def next_part(frame: Frame) -> Frame | None:
        """The next part of the sub-problem below the placement, or None when all are solved."""
        left = np.flatnonzero(total[frame.part : frame.q])
        if not len(left):
            return None
        start = frame.part + int(left[0])
        apart = np.flatnonzero(cut[start : frame.q - 1] == 0)
        end = start + 1 + int(apart[0]) if len(apart) else frame.q
        whole = frame.placed >= 0 and frame.part == frame.p and not total[end : frame.q].any()
        frame.part = end
        i = frame.placed
        inside = members[member_start[start] : member_start[start + 1]]
        head = int(inside[np.argmax(least[inside] < NEVER)])
        part = Frame(
            p=start,
            q=end,
            head=head,
            stop=head + int(np.searchsorted(first[head : frame.stop], end)),
            offset=int(offset[i]) if i >= 0 else 0,
            rank=int(rank[i]) if whole else -1,
            ordered=frame.ordered,
        )
        values = least[part.head : part.stop]
        if not whole:
            unplaced = part.head + np.flatnonzero(values < NEVER)
            if len(unplaced) > MANY and 10 * len(unplaced) > 9 * frame.ordered:
                part.rank = int(rank[i])
            else:
                part.ordered = len(unplaced)
                give_ranks(part, unplaced)
        ceiling = int((values + rounded[part.head : part.stop]).min())
        left = total[start:end]
        highest = int((room[start:end] - left)[left > 0].min())
        part.ceiling = min(ceiling, highest + 1)
        return part

    descend = True
    while True:
        frame = frames[-1]
        if descend:
            part = next_part(frame)
            if part is not None:
                frames.append(part)
                descend = False
            elif len(frames) == 1:
                nodes[0] = count
                return FOUND
            else:
                frames.pop()
            continue
        if frame.placed >= 0:  # the placement failed
            undo(frame.log_size)
            frame.placed = -1
            if frame.hat:
                frame.ceiling = 0
        if len(frames) == 1:
            nodes[0] = count
            return INFEASIBLE
        i = candidate(frame)
        if i < 0:
            frames.pop()
            continue
        count += 1
        if count > max_nodes or (expired is not None and count % 64 == 0 and expired()):
            nodes[0] = min(count, max_nodes)
            return NODE_LIMIT
        frame.offset, frame.rank = int(least[i]), int(rank[i])
        if place(frame, i, frame.offset):
            frame.part = frame.p
            descend = True
