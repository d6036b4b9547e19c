"""First fit and best fit in several orders: quick arenas, and often the smallest.

Buffers are placed one after the other, each at the lowest offset where it fits beside those that
live with it (first fit), or in the tightest gap (best fit). The order decides; no order is best on
every trace, so all are tried until one meets the lower bound. An order that exceeds the best arena
so far is given up at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np

from .. import jit
from .buffers import Buffers, Ints, live_bytes, peak_bytes
from .sections import range_maxima

SIGNATURE = "int64(" + "int64[::1], " * 6 + "boolean, int64, int64[::1])"
ORDERS = ("size", "area", "length", "start", "load-size", "load-area", "load-length")
"""What sorts the buffers: size, size x life, life (all descending), start, or first the largest sum
of live sizes that a buffer meets."""
VARIANTS = (
    *((order, False) for order in ORDERS),
    *((order, True) for order in ("size", "area", "length", "start", "load-size")),
)
"""Order, and whether the tightest gap is taken."""
FEW = 64
"""Up to this many buffers compiling, or loading what was compiled, takes longer than it saves."""


def place_in_order(
    lower: Ints,
    upper: Ints,
    size: Ints,
    alignment: Ints,
    order: Ints,
    offset: Ints,
    tightest: bool,
    ceiling: int,
    work: Ints,
) -> int:
    """1 when all are placed below `ceiling`, else 0; writes `offset` (n,). `work` has shape (4n,).

    The placed buffers are kept in the order of their offsets, so that one pass over them finds the
    gaps between those that live with a new one.
    """
    n = len(order)
    offsets, tops, lows, ups = work[:n], work[n : 2 * n], work[2 * n : 3 * n], work[3 * n :]
    for count in range(n):
        i = order[count]
        low, up, needed, step = lower[i], upper[i], size[i], alignment[i]
        at, best, tightness = 0, -1, ceiling
        for s in range(count):
            if ups[s] > low and lows[s] < up:
                if offsets[s] - at >= needed:
                    if not tightest:
                        best = at
                        break
                    if offsets[s] - at < tightness:
                        best, tightness = at, offsets[s] - at
                if tops[s] > at:
                    at = -(-tops[s] // step) * step
        if best < 0:
            best = at
        if best + needed > ceiling:
            return 0
        offset[i] = best
        s = count
        while s > 0 and offsets[s - 1] > best:
            offsets[s], tops[s] = offsets[s - 1], tops[s - 1]
            lows[s], ups[s] = lows[s - 1], ups[s - 1]
            s -= 1
        offsets[s], tops[s], lows[s], ups[s] = best, best + needed, low, up
    return 1


def place_in_order_arrays(
    lower: Ints,
    upper: Ints,
    size: Ints,
    alignment: Ints,
    order: Ints,
    offset: Ints,
    tightest: bool,
    ceiling: int,
    work: Ints,
) -> int:
    """`place_in_order` with NumPy in place of its inner loops: the same offsets."""
    n = len(order)
    placed = work.reshape(4, n)  # offset, top, lower, upper
    for count, i in enumerate(order):
        low, up, needed, step = lower[i], upper[i], int(size[i]), int(alignment[i])
        now = placed[:, :count]
        near = np.flatnonzero((now[3] > low) & (now[2] < up))
        free = np.zeros(len(near) + 1, dtype=np.int64)
        np.maximum.accumulate(now[1, near], out=free[1:])
        free = -(-free // step) * step  # where each gap starts
        gap = now[0, near] - free[:-1]
        fitting = np.flatnonzero((gap >= needed) & (gap < ceiling) if tightest else gap >= needed)
        if len(fitting):
            best = int(free[fitting[np.argmin(gap[fitting])] if tightest else fitting[0]])
        else:
            best = int(free[-1])
        if best + needed > ceiling:
            return 0
        offset[i] = best
        s = int(np.searchsorted(now[0], best, side="right"))
        placed[:, s + 1 : count + 1] = placed[:, s:count].copy()
        placed[:, s] = best, best + needed, low, up
    return 1


@cache
def _kernel(fast: bool) -> Callable[..., int]:
    return jit.compiled(place_in_order, SIGNATURE) if fast else place_in_order_arrays


def orders(buffers: Buffers) -> dict[str, Ints]:
    """The order of each name in `ORDERS`; ties by the input's order."""
    size = buffers.size_bytes
    length = buffers.upper - buffers.lower
    area = size * length.astype(np.float64)
    moments = np.unique(np.concatenate((buffers.lower, buffers.upper)))
    live = live_bytes(buffers.lower, buffers.upper, size)
    first, last = (np.searchsorted(moments, x) for x in (buffers.lower, buffers.upper))
    load = range_maxima(live, first, last)
    keys = {
        "size": (-size, -length),
        "area": (-area, -size),
        "length": (-length, -size),
        "start": (buffers.lower, -size),
        "load-size": (-load, -size),
        "load-area": (-load, -area),
        "load-length": (-load, -length),
    }
    return {name: np.lexsort(keys[name][::-1]).astype(np.int64) for name in ORDERS}


def first_fit(buffers: Buffers, order: Ints, tightest: bool, ceiling: int) -> Ints | None:
    """Offsets of the buffers placed in this order, or None when they exceed `ceiling` bytes."""
    offset = np.zeros(len(buffers), dtype=np.int64)
    work = np.empty(4 * len(buffers), dtype=np.int64)
    kernel = _kernel(len(buffers) > FEW and jit.has_numba())
    done = kernel(
        buffers.lower,
        buffers.upper,
        buffers.size_bytes,
        buffers.alignment_bytes,
        order,
        offset,
        tightest,
        ceiling,
        work,
    )
    return offset if done else None


def repaired(
    buffers: Buffers, order: Ints, offset: Ints, bound_bytes: int, rounds: int
) -> Iterator[Ints | None]:
    """Round by round, offsets of a smaller arena than all before, or None: whatever lay above the
    bound is placed earlier next time.

    Each round multiplies the earliness of those buffers and sorts by it, so that what is hard to
    place moves to the front (Joslin and Clements 1999, "Squeaky wheel optimization"). `offset` is
    what the order gave.
    """
    best = peak_bytes(buffers, offset)
    place = np.empty(len(buffers), dtype=np.float64)
    place[order] = np.arange(1, len(buffers) + 1)
    loose = int((buffers.size_bytes + buffers.alignment_bytes).sum())
    for _ in range(rounds):
        place[offset + buffers.size_bytes > bound_bytes] /= EARLIER
        order = np.argsort(place, kind="stable").astype(np.int64)
        found = first_fit(buffers, order, False, loose)
        assert found is not None
        offset = found
        peak = peak_bytes(buffers, offset)
        yield offset if peak < best else None
        best = min(best, peak)
        if peak <= bound_bytes:
            return


EARLIER = 4.0
"""How much earlier; by twice as much arenas shrink more slowly, to about the same size."""


def improving(buffers: Buffers) -> Iterator[tuple[str, Ints | None]]:
    """Variants in turn: the name, and offsets of a smaller arena than all before, or None."""
    sorted_by = orders(buffers)
    ceiling = int((buffers.size_bytes + buffers.alignment_bytes).sum())
    for name, tightest in VARIANTS:
        offset = first_fit(buffers, sorted_by[name], tightest, ceiling)
        if offset is not None:
            ceiling = peak_bytes(buffers, offset) - 1
        yield f"{'best' if tightest else 'first'}-fit {name}", offset
