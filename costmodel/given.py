"""Bounds of time and memory of layouts whose stages are given.

Layers may differ in what they keep for backward: there are several options, of which every layer
takes one. Per rank and policy k let T_k be the seconds of a micro-batch, A_k the bytes that live
micro-batches keep, W_k the most that is there besides while the head or such a layer runs backward,
and V_k the most in the backward of the first layer, when a share s of A_k is left, all
layers alike. A rank that mixes policies in shares x_k takes sum_k x_k T_k seconds and has room for

    sum_k x_k A_k <= min(C - max W_k, (C - max V_k) / s),     max over k with x_k > 0.

Among mixtures of the same policies the best has two of them at most, which leaves no less room: the
least time within the capacity C is that of a policy that fits, or lies between two. This is the
fractional relaxation of the choice per layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .chains import Shapes, chains
from .fleet import Fleet
from .graph import Array
from .grid_rows import Index, alike
from .memory import Peaks
from .mixtures import least_extra_s, part
from .priced_grid import BLOCK_ROWS
from .stages import Load


class Given:
    """Bounds where the stages are given."""

    def __init__(
        self, fleet: Fleet, rows: Index, worth_s: float, sizes: Sequence[int] | None
    ) -> None:
        self.fleet, self.rows = fleet, rows
        self.worth_s = worth_s / fleet.drift
        x, until = fleet.layouts.take(rows), fleet.here(rows)
        first, of_row = alike([x.pp, x.vpp, x.schedule, *(u.astype(np.int64) for u in until[:-1])])
        ends = [end[first] for end in until]
        self.shapes = Shapes.of(fleet.model, x.take(first), ends, of_row, sizes)

    def bounds(self) -> tuple[Array, Array, NDArray[np.int64]]:
        """Seconds without drift, bytes and policies bounded of every row.

        Where chains and updates alone take longer than is worth it, memory is not looked at.
        """
        time = self._chains(np.arange(len(self.rows)))
        memory = np.zeros(len(time))
        bounded = np.zeros(len(time), dtype=np.int64)
        alive = np.flatnonzero(time <= self.worth_s)
        once_s = self._updates(alive)
        time[alive] += once_s
        left = np.flatnonzero(time[alive] <= self.worth_s)
        alive, once_s = alive[left], once_s[left]
        for start in range(0, len(alive), BLOCK_ROWS):
            here = slice(start, start + BLOCK_ROWS)
            some = alive[here]
            memory[some], extra_s = self._memory(some)
            bounded[some] = len(self.fleet.policies)
            time[some] = self._chains(some, extra_s) + once_s[here]
        return time, memory, bounded

    def least_bytes(self) -> Array:
        """The bytes of the fullest rank, all layers under the leanest policy."""
        found = np.zeros(len(self.rows))
        for start in range(0, len(self.rows), BLOCK_ROWS):
            some = np.arange(start, min(start + BLOCK_ROWS, len(self.rows)))
            found[some] = self._memory(some)[0]
        return found

    def _memory(self, some: Index) -> tuple[Array, list[Array]]:
        """The least bytes of the fullest rank, and by rank the least seconds beyond the fastest
        policy within the capacity; zero where nothing fits, which memory rules out."""
        ranks, loads, pools = self._held(some)
        least = np.zeros(len(some))
        extra = [np.zeros(len(some)) for _ in ranks]
        for k, grid in enumerate(self.fleet.grids):
            here = [i for i, pool in enumerate(pools) if np.any(pool == k)]
            peaks = grid.peaks([ranks[i] for i in here], [loads[i] for i in here], self.rows[some])
            smallest = np.min(_largest(peaks), axis=0) * self.fleet.scale(k)
            beyond = grid.extra_s(self.rows[some])
            for at, i in enumerate(here):
                there = pools[i] == k
                of_policy = np.einsum("pr,kpr->kr", loads[i].counts, beyond)
                more = least_extra_s(part(peaks, at), of_policy, self.fleet.capacities[k])
                extra[i] = np.where(there & np.isfinite(more), more, extra[i])
                least = np.maximum(least, np.where(there, smallest[at], 0.0))
        return least, extra

    def _held(self, some: Index) -> tuple[list[Array], list[Load], list[Index]]:
        """The ranks looked at, what they hold, and where they lie."""
        place = self.shapes.of_row[some]
        found = self.shapes.ranks
        ranks = [rank.rank[place] for rank in found]
        return ranks, [rank.own.take(place) for rank in found], [rank.pool[place] for rank in found]

    def _chains(self, some: Index, extra_s: Sequence[Array] | None = None) -> Array:
        """The longest chains, with seconds that micro-batches take beyond the least, by rank."""
        best = np.zeros(len(some))
        for start in range(0, len(some), BLOCK_ROWS):
            here = slice(start, start + BLOCK_ROWS)
            pools, fill_s = self.fleet.on_pools(self.rows[some[here]])
            layouts = self.fleet.layouts.take(self.rows[some[here]])
            more = None if extra_s is None else [x[here] for x in extra_s]
            best[here] = fill_s + chains(self.shapes, layouts, some[here], pools, more)
        return best

    def _updates(self, some: Index) -> Array:
        """What a rank does once per step under any policy; the longest of the ranks looked at."""
        rows = self.rows[some]
        x = self.fleet.layouts.take(rows)
        chosen, inverse = alike(
            [
                self.fleet.grids[0].local[rows], self.shapes.of_row[some], x.num_microbatches,
                x.zero, x.dp_shard, x.apart,
            ]
        )  # fmt: skip
        _, loads, pools = self._held(some[chosen])
        longest = np.zeros(len(chosen))
        for k, grid in enumerate(self.fleet.grids):
            each = grid.updates(loads, rows[chosen])
            there = np.stack(pools) == k
            longest = np.maximum(longest, np.max(np.where(there, each, 0.0), axis=0))
        return longest[inverse]


def _largest(peaks: Peaks) -> Array:
    """The larger of both kinds of moments."""
    return np.maximum(peaks.kept + peaks.working, peaks.others * peaks.kept + peaks.closing)
