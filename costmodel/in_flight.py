"""Micro-batches of which a pipeline rank keeps something, counted in whole chunk activations.

A micro-batch's activations of a chunk stay from its forward F to its backward B. Where the backward
is split they stay to I, and from then to W what the gradients of weights need, the inputs and
output gradients of matmuls (`Piece.waiting_bytes`), as with the gradient stores of Qi et al. 2023,
"Zero Bubble Pipeline Parallelism", whose table 1 has 34 bytes before I and 32 between I and W.
Recomputed activations are there again from I on. With a chunks before their I, its own included,
and b between I and W at one of the rank's backward actions,

    live = 1 + (a - 1) r + b w      a moment's activations over those of a chunk of the rank

where w is what a chunk keeps between I and W. r is 1, and in a V, whose first rank has the head in
its second chunk, which is never in flight twice, the rest of a chunk without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..orders import Action, Orders
from ..schedules import SCHEDULES, SPLIT_SCHEDULES
from .graph import Array
from .kept import Kept
from .layout import Layouts
from .memory import InFlight
from .schedule import live_chunks, order_of
from .stages import Load

Ints = NDArray[np.intp]
LONG_V = 8
"""Ranks from which about as much waits at the end of a V as is in flight in its steady state."""
Moment = tuple[int, int]
"""Chunks before their I, and between I and W."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What a chunk in flight keeps, relative to the mean of the rank's chunks before their I."""

    before: Array
    waiting: Array

    @staticmethod
    def of(load: Load, layouts: Layouts, kept: Kept) -> Shares:
        """Of the ranks that hold `load`."""
        head = load.head * kept.head.saved
        rest = load.embedding * kept.embedding.saved
        for count, live in zip(load.layers, kept.layers, strict=True):
            rest = rest + count * live.saved
        rest = rest + (layouts.vpp - load.head) * kept.boundary_bytes
        whole = np.maximum(rest + head, 1.0)
        waiting: Array = np.zeros(1)
        counts = (load.embedding, *load.layers, np.where(layouts.folded, 0.0, load.head))
        for count, each in zip(counts, kept.waiting, strict=True):
            waiting = waiting + count * each
        return Shares(before=np.where(layouts.folded, rest / whole, 1.0), waiting=waiting / whole)

    def live(self, moment: tuple[Array | int, Array | int]) -> Array:
        """Chunk activations at a moment."""
        return 1.0 + (moment[0] - 1) * self.before + moment[1] * self.waiting

    def take(self, rows: NDArray[np.bool_]) -> Shares:
        """Those of some rows."""
        return Shares(before=self.before[rows], waiting=self.waiting[rows])


def in_flight(
    schedule: str,
    shape: tuple[int, int, int],
    ranks: Ints,
    load: Load,
    kept: Kept,
    layouts: Layouts,
    own_orders: Orders | None = None,
) -> InFlight:
    """Live chunk activations of `ranks` under the loads of `load`, row by row.

    `shape` is ranks of the pipeline, chunks per rank and micro-batches; `layouts` has as many rows,
    all of that shape. `own_orders` take the place of the schedule's.
    """
    first, later = np.zeros((2, len(ranks)))
    if schedule not in SPLIT_SCHEDULES and own_orders is None:
        for rank in np.unique(ranks):
            here = ranks == rank
            first[here], later[here] = live_chunks(schedule, *shape, int(rank))
        return InFlight(first=first, later=later)
    shares = Shares.of(load, layouts, kept)
    for rank in np.unique(ranks):
        here = ranks == rank
        own = shares.take(here)
        if own_orders is None:
            at_first, moments = live_moments(schedule, *shape, int(rank))
        else:
            at_first, moments = moments_of(own_orders[rank])
        first[here] = own.live((at_first, 0))
        if moments:
            later[here] = np.max([own.live(moment) for moment in moments], axis=0)
    return InFlight(first=first, later=later)


@lru_cache(maxsize=4096)
def live_moments(
    schedule: str, p: int, v: int, m: int, rank: int
) -> tuple[int, tuple[Moment, ...]]:
    """Chunks alive at a rank's first backward, and the largest moments of its later ones.

    >>> live_moments("zb-h1", 4, 1, 8, 2)
    (2, ((2, 2),))
    """
    return moments_of(order_of(schedule, p, v, min(m, 3 * p + m % p), rank))


def moments_of(actions: Sequence[Action]) -> tuple[int, tuple[Moment, ...]]:
    """The same of an order; of the later moments those that no other is above in both counts."""
    whole = waiting = first = 0
    seen: set[Moment] = set()
    for kind, _, _ in actions:
        if kind in "IB":
            if first:
                seen.add((whole, waiting))
            first = first or whole
        whole += (kind == "F") - (kind in "IB")
        waiting += (kind == "I") - (kind == "W")
    largest: list[Moment] = []
    for a, b in sorted(seen, reverse=True):
        if not largest or b > largest[-1][1]:
            largest.append((a, b))
    return first, tuple(largest)


def least_in_flight(layouts: Layouts, rank: Array, shares: Shares) -> Array:
    """At most `in_flight.later`, in closed form, of rows whose schedule is split."""
    return shares.live(least_moment(layouts, rank))


def least_moment(layouts: Layouts, rank: Array) -> tuple[Array, Array]:
    """Chunks before their I, and between I and W, at one moment of rows with a split schedule.

    The same under all policies, so that what a mixture of policies keeps is the mixture of what
    each keeps: where most waits, in a V of few ranks or at its outer ones where nothing does.
    """
    m, p, v = (x.astype(float) for x in (layouts.num_microbatches, layouts.pp, layouts.vpp))
    zb_v, dual, zb_h2 = (
        layouts.schedule == SCHEDULES.index(name) for name in ("zb-v", "dualpipev", "zb-h2")
    )
    hops = np.where(zb_h2, 2.0, 1.0)
    delay, warm_up = hops * rank, (v - 1) * p + hops * (p - 1 - rank)
    at = np.minimum(np.maximum(delay, 1.0), m * v - 1)
    whole, waiting = np.minimum(m * v, warm_up + 1 + at) - at, np.minimum(at, delay)
    begun = np.minimum(m, 2 * p - 1 - rank) + rank  # after the first backward of a short V
    steady = np.where(dual, 2 * p + 1, np.where(m >= 2 * p, 2 * p, begun))
    folded = zb_v | dual
    end = folded & (m >= 2 * p) & (p >= LONG_V) & (2 * rank > p)
    whole = np.where(folded, np.where(end, p - rank, steady), whole)
    waiting = np.where(folded, np.where(end, np.where(dual, 1, 2) * rank, 0.0), waiting)
    return whole, waiting
