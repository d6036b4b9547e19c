"""How soon a pipeline can be done whatever its cut: lower bounds over all ways of cutting layers.

A cut gives rank r of p ranks n_r layers, in order. Every rank's chain of actions (`schedule.py`)
must end within the makespan Z; with y what leads to its first action, F and B its own work for a
micro-batch, x what dropped activations add to it, and S what leads through the stages behind it,

    gpipe              all + (m - 1) (F + B) + m x                        <= Z
    1f1b, zb-h1|h2     y + m (F + B + x) + gaps                           <= Z
                       gaps: max(0, S - (w-1) F) + max(0, S - (w-1) (B + x))
                       the larger one alone where no more than w micro-batches are there
    others             y + m (F + B + x) + max(0, path - warm-up)         <= Z

with w forwards before the first backward; `path` leads through other stages from a rank's first
forward to its first backward, which its forwards of the warm-up fill. The maxima of the first two
are several inequalities each, all linear in n_r; so are those of memory (`rooms.py`). A rank that
begins one layer later never ends earlier, so that giving every rank as many layers as it can take
reaches furthest: Z is possible if the last rank takes what is left. The least possible Z, found by
bisection, is the bound.

Chunks of a rank are as even as can be, the first ones larger, where the head is not among them.
With several pools each rank counts the times of its own; of what is behind it the faster ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..schedules import SCHEDULES
from .cut_ranks import Before, Rank
from .graph import Array
from .grid_rows import GPIPE, ZB_H2, Index
from .layout import Layouts
from .pipeline_pools import OnPool
from .rooms import Room, Rooms
from .seconds import Seconds, fastest

GAPS = tuple(map(SCHEDULES.index, ("1f1b", "zb-h1", "zb-h2")))
NEAR = 1e-3
"""Relative width of the last bracket of a bisection; its lower end is the bound."""
STEPS = 60
"""Of a bisection at most."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Rows that may be cut anywhere, those with more ranks first."""

    layouts: Layouts
    repeats: tuple[int, ...]
    """Layers of each group of the model; one group where ranks have several chunks."""
    pools: tuple[OnPool, ...]
    rooms: tuple[Rooms, ...] = ()
    """By pool; none where memory is no matter."""

    def __post_init__(self) -> None:
        assert np.all(np.diff(self.layouts.pp) <= 0)

    def take(self, rows: Index) -> Reach:
        """Some of the rows, in ascending order."""
        if len(rows) == len(self.layouts):
            return self
        return Reach(
            layouts=self.layouts.take(rows),
            repeats=self.repeats,
            pools=tuple(pool.take(rows) for pool in self.pools),
            rooms=tuple(rooms.take(rows) for rooms in self.rooms),
        )

    @cached_property
    def known_rooms(self) -> dict[int, Room]:
        """What memory asks of ranks by their number, as far as it was worked out: it is the same at
        every makespan."""
        return {}

    @cached_property
    def split(self) -> NDArray[np.bool_]:
        """Whether the backward is split, so that forwards alone lead to the next rank."""
        return self.layouts.splits

    @cached_property
    def folded(self) -> NDArray[np.bool_]:
        """Whether stages are placed in a V."""
        return self.layouts.folded

    @cached_property
    def flat(self) -> NDArray[np.bool_]:
        """Whether all forwards come before all backwards."""
        return self.layouts.schedule == GPIPE

    @cached_property
    def gaps(self) -> NDArray[np.bool_]:
        """Whether the gaps of a rank are known whatever the cut."""
        return np.isin(self.layouts.schedule, GAPS)

    @cached_property
    def per_hop(self) -> Array:
        """Forwards of the warm-up per rank that is behind."""
        return np.where(self.layouts.schedule == ZB_H2, 2.0, 1.0)

    @cached_property
    def micro_batches(self) -> Array:
        """Per step."""
        return self.layouts.num_microbatches.astype(float)

    @cached_property
    def chunks(self) -> Array:
        """Per rank, a layer each at least."""
        return self.layouts.vpp.astype(float)

    @cached_property
    def later(self) -> list[Seconds]:
        """By pool, the least seconds on it and those behind it."""
        return [fastest([p.seconds for p in self.pools[k:]]) for k in range(len(self.pools))]

    @cached_property
    def flat_lead_s(self) -> Array:
        """Everything once, on the fastest pools, and all transfers: what leads a gpipe."""
        times = np.array([1.0, *self.repeats, 1.0])
        p, every = self.layouts.pp, self.later[0]
        action_s = min(pool.action_s for pool in self.pools)
        hop_s = np.min([pool.hop_s for pool in self.pools], axis=0)
        return times @ every.both + 2 * p * action_s + 2 * (p - 1) * hop_s

    def least_s(self, low_s: Array, high_s: Array) -> Array:
        """A bound of each row's makespan, no less than `low_s`, which is one.

        What cannot be done by `high_s` is not looked at further. Infinite where no cut has the
        memory.
        """
        low, high = low_s.copy(), high_s.copy()
        if np.all(np.isfinite(high_s)):
            possible = self.feasible(high)
            low = np.where(possible, low, np.maximum(low, high))
        else:
            low, high = self._bracket(low)
            possible = np.isfinite(high)
        open_ = np.flatnonzero(possible)
        part = self.take(open_)
        for _ in range(STEPS):
            left = np.flatnonzero(high[open_] > low[open_] * (1 + NEAR))
            if not len(left):
                break
            if len(left) < len(open_) / 2:  # else what is known of all rows is worth more
                open_, part = open_[left], part.take(left)
            middle = (low[open_] + high[open_]) / 2
            possible = part.feasible(middle)
            high[open_] = np.where(possible, middle, high[open_])
            low[open_] = np.where(possible, low[open_], middle)
        return low

    def _bracket(self, low: Array) -> tuple[Array, Array]:
        """Times that are not and that are possible, both infinite where none is."""
        never = ~self.feasible(np.full(len(low), np.inf))
        low = np.where(never, np.inf, low)
        high = np.where(never, np.inf, 1.1 * low)
        open_ = np.flatnonzero(~never)
        part = self.take(open_)
        for _ in range(STEPS):
            left = np.flatnonzero(~part.feasible(high[open_]))
            open_ = open_[left]
            if not len(open_):
                break
            part = part.take(left)
            low[open_] = high[open_]
            high[open_] = 1.5 * high[open_]
        return low, high

    def least_share(self) -> Array:
        """A bound of the capacity that any cut needs, as a share of what there is."""
        low, high = np.zeros(len(self.layouts)), np.ones(len(self.layouts))
        always = np.full(len(self.layouts), np.inf)
        for _ in range(STEPS):
            possible = self._scaled(high).feasible(always)
            low, high = np.where(possible, low, high), np.where(possible, high, 2 * high)
            if possible.all():
                break
        while np.any(high > low * (1 + NEAR) + 1e-6):
            middle = (low + high) / 2
            possible = self._scaled(middle).feasible(always)
            low, high = np.where(possible, low, middle), np.where(possible, middle, high)
        return low

    def _scaled(self, factor: Array) -> Reach:
        return replace(self, rooms=tuple(rooms.scaled(factor) for rooms in self.rooms))

    def feasible(self, makespan_s: Array) -> NDArray[np.bool_]:
        """Whether some cut may be done by then."""
        num = len(self.layouts)
        used = np.zeros((len(self.repeats), num))
        repeats = np.asarray(self.repeats, dtype=float)[:, None]
        lead = np.where(self.flat, self.flat_lead_s, 0.0)
        chunked = bool(np.any(self.chunks > 1))
        before = Before.none(num)
        possible = np.ones(num, dtype=bool)
        ranks = np.arange(int(self.layouts.pp.max(initial=0)))
        for r, count in enumerate(np.searchsorted(-self.layouts.pp, -ranks, side="left")):
            here = slice(0, int(count))
            left = repeats - used[:, here]
            rank = Rank.of(self, r, int(count))
            most = rank.most_layers(makespan_s[here], lead[here], left)
            rest = left.sum(axis=0)
            if chunked:
                some = before.first(int(count))
                most = rank.trimmed(most, makespan_s[here], lead[here], rest, some)
                before.add(rank, np.minimum(most, rest))
            last = rank.behind == 0
            possible[here] &= most >= np.where(last, rest, rank.chunks)
            taken = np.maximum(np.minimum(most, rest - rank.chunks * rank.behind), 0.0)
            by_group = _in_order(taken, left)
            used[:, here] += by_group
            lead[here] += rank.lead_s(by_group)
        return possible


def _in_order(number: Array, left: Array) -> Array:
    """The first `number` layers of those left, by group."""
    if len(left) == 1:
        return number[None]
    before = np.cumsum(left, axis=0) - left
    return np.minimum(np.maximum(number - before, 0.0), left)
