"""Bounds of time and memory of layouts whose stages may be cut in any way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .fleet import Fleet
from .given import Given
from .graph import Array
from .grid_rows import Index, alike
from .ranks import allocated
from .reach import NEAR, Reach
from .rooms import Rooms
from .seconds import fastest
from .stages import Load

BLOCK_ROWS = 4096
"""Rows whose cuts are worked out at once: what ranks have room for is kept for all of them."""


def is_free(fleet: Fleet) -> NDArray[np.bool_]:
    """Rows whose stages can be cut in several ways, as far as these are looked at: not chunks of
    ranks of models with unlike layers, nor parameters that are sharded at rest in a pipeline."""
    x, model = fleet.layouts, fleet.model
    several = (x.pp > 1) & (x.pp * x.vpp < model.num_layers)
    return several & ((x.vpp == 1) | (len(model.layers) == 1)) & (x.zero < 3)


class Uncut:
    """Rows with more ranks first."""

    def __init__(self, fleet: Fleet, rows: Index, worth_s: float, least_memory: bool) -> None:
        self.fleet, self.rows = fleet, rows
        self.worth_s = worth_s / fleet.drift
        self.least_memory = least_memory
        self.repeats = tuple(layer.repeat for layer in fleet.model.layers)

    def bounds(self) -> tuple[Array, Array, NDArray[np.int64]]:
        """Seconds without drift, bytes and policies bounded of every row.

        Where the pipeline and updates alone take longer than is worth it, memory is not looked at.
        """
        fleet, num = self.fleet, len(self.rows)
        memory = np.zeros(num)
        bounded = np.zeros(num, dtype=np.int64)
        time = self._share_s()
        alive = np.flatnonzero(time <= self.worth_s)
        if not len(alive):
            return time, memory, bounded
        once_s = self._updates(alive)
        time[alive] += once_s
        left = np.flatnonzero(time[alive] <= self.worth_s)
        alive, once_s = alive[left], once_s[left]
        pools, fill_s = fleet.on_pools(self.rows[alive])
        layouts = fleet.layouts.take(self.rows[alive])
        reach = Reach(layouts=layouts, repeats=self.repeats, pools=pools)
        beside = fill_s + once_s
        if np.isfinite(self.worth_s):
            possible = reach.feasible(self.worth_s - beside)
            time[alive[~possible]] = np.maximum(time[alive[~possible]], self.worth_s * (1 + NEAR))
            kept = np.flatnonzero(possible)
            alive, reach, beside, once_s = alive[kept], reach.take(kept), beside[kept], once_s[kept]
        if not len(alive):
            return time, memory, bounded
        for start in range(0, len(alive), BLOCK_ROWS):
            some = np.arange(start, min(start + BLOCK_ROWS, len(alive)))
            here = alive[some]
            found, memory[here] = self._within_memory(
                here, reach.take(some), time[here] - once_s[some], beside[some]
            )
            time[here] = np.where(np.isfinite(found), found + beside[some], time[here])
        bounded[alive] = len(fleet.policies)
        return time, memory, bounded

    def _share_s(self) -> Array:
        """All micro-batches through an even share of the work, which some rank has at least."""
        every = fastest([grid.seconds(self.rows) for grid in self.fleet.grids])
        x = self.fleet.layouts.take(self.rows)
        times = np.array([1.0, *self.repeats, 1.0])
        return x.num_microbatches * (times @ every.both) / x.pp

    def _within_memory(
        self, some: Index, reach: Reach, time: Array, beside_s: Array
    ) -> tuple[Array, Array]:
        """The least makespans within the memory, infinite where nothing fits, and the least bytes
        of the fullest rank; `beside_s` are added to makespans."""
        fleet = self.fleet
        rows = self.rows[some]
        reach = replace(
            reach,
            rooms=tuple(
                Rooms.of(grid, rows, capacity)
                for grid, capacity in zip(fleet.grids, fleet.capacities, strict=True)
            ),
        )
        found = reach.least_s(time, self.worth_s - beside_s)
        least = np.full(len(some), fleet.capacities[0])
        for k, (grid, rooms) in enumerate(zip(fleet.grids, reach.rooms, strict=True)):
            grown, fixed = allocated(grid.prices)
            live = rooms.least_bytes(fleet.model.num_layers)
            least = np.minimum(least, (live * grown + fixed) * fleet.scale(k))
        if self.least_memory:
            return found, np.maximum(least, reach.least_share() * fleet.capacities[0])
        never = np.flatnonzero(~np.isfinite(found))
        beyond = fleet.capacities[0] * (1 + NEAR)
        least[never] = np.maximum(beyond, Given(fleet, rows[never], np.inf, None).least_bytes())
        return found, least

    def _updates(self, some: Index) -> Array:
        """What some rank does once per step at least.

        One rank holds its share of the layers, all of one group where that is least. One holds its
        share of any group, whatever else it holds: with other groups beside, of which no more is
        counted than the work that an exchange hides behind.
        """
        rows = self.rows[some]
        x = self.fleet.layouts.take(rows)
        folded = x.folded.astype(np.int64)
        chosen, inverse = alike(
            [
                self.fleet.grids[0].local[rows], x.pp, folded, x.num_microbatches, x.zero,
                x.dp_shard, x.apart,
            ]
        )  # fmt: skip
        first = rows[chosen]
        x, folded = x.take(chosen), folded[chosen]
        one, none = np.ones(len(first)), np.zeros(len(first))
        groups = range(len(self.repeats))

        def least(group: int, held: Array, beside: bool) -> Array:
            """Of a rank with so many layers of a group, wherever it lies."""
            loads = [
                Load(
                    layers=tuple(held if g == group else none for g in groups),
                    embedding=embedding,
                    head=head,
                )
                for embedding, head in ((one, 1.0 * folded), (none, none), (none, 1.0 - folded))
            ]
            of_pools = [
                grid.updates(loads, first, group if beside else None) for grid in self.fleet.grids
            ]
            return np.min([found.min(axis=0) for found in of_pools], axis=0)

        share = np.ceil(sum(self.repeats) / x.pp)
        found = np.min([least(group, share, False) for group in groups], axis=0)
        if len(self.repeats) > 1 and self.fleet.cluster.profile is None:
            for group, repeat in enumerate(self.repeats):
                found = np.maximum(found, least(group, np.ceil(repeat / x.pp), True))
        return found[inverse]
