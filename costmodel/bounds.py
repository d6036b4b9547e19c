"""Lower bounds of time and memory for a whole grid of layouts at once.

The same formulas as the simulator, with the pipeline's closed form in place of the played schedule:
the longest path through the actions of one rank (`schedule.chain_s`), for a few ranks
(`grid_rows.ranks_looked_at`).
Interleaved schedules use the last rank alone: its first forward follows the stages before it and
its last backward precedes theirs. Schedules with a split backward use the chain through the rank
without what follows it (`split_chains.py`).

Layers may differ in what they keep for backward: `bound_layouts` takes several options, of which
every layer takes one. Per rank and policy k let T_k be the seconds of a micro-batch, A_k the bytes
that live micro-batches keep, W_k the most that is there besides while the head or such a layer runs
backward, and V_k the most in the backward of the first layer, when a share s of A_k is left, all
layers alike. A rank that mixes policies in shares x_k takes sum_k x_k T_k seconds and has room for

    sum_k x_k A_k <= min(C - max W_k, (C - max V_k) / s),     max over k with x_k > 0.

Among mixtures of the same policies the best has two of them at most, which leaves no less room: the
least time within the capacity C is that of a policy that fits, or lies between two. This is the
fractional relaxation of the choice per layer.

Rows that share what a formula depends on share its result: pieces are priced once per way of
cutting a layer, the pipeline once per way of filling it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..cluster import Cluster
from ..model import Model
from ..workload import Workload
from .chains import Pipeline
from .graph import Array
from .grid_rows import (
    RANKS,
    Index,
    alike,
    cuts_of_a_layer,
    in_flight_of,
    load_of,
    ranks_looked_at,
)
from .layout import Layouts
from .memory import Peaks
from .mixtures import PARTS, least_extra_s, part
from .options import Options
from .pieces import Pieces, pieces_of_each
from .prices import Prices
from .ranks import rank_bytes, update
from .simulate import check_covered
from .stages import V_SHAPED

BLOCK_ROWS = 8192
"""Rows whose memory is computed at once: what fits the caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Admissible bounds: never above the simulator's step time and peak memory."""

    time_s: Array
    memory_bytes: Array
    capacity_bytes: float
    policies_bounded: NDArray[np.int64]
    """For each layout the number of options under which time and memory were both bounded."""


def bound_layouts(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    layouts: Layouts,
    options: Options | Sequence[Options],
    capacity_bytes: float | None = None,
    worth_s: float = np.inf,
) -> Bounds:
    """Bounds of layouts that keep the rules of `layout_problems`, with stages cut evenly.

    `capacity_bytes` is what a rank may fill: None = the memory of the device. Where the pipeline
    alone takes longer than `worth_s`, nothing more is worked out: the bound of memory is zero.

    With several `options`, which may differ in recompute and offload, layers choose among them.
    Time is the least that fits the capacity. Memory is the least of all, except that where the
    first of them fits, and memory is not what is optimised, it is that one's.
    """
    check_covered(model)
    policies = (options,) if isinstance(options, Options) else tuple(options)
    pool = cluster.pools[0]
    capacity = float(pool.device.memory_bytes) if capacity_bytes is None else capacity_bytes
    time = np.zeros(len(layouts))
    memory = np.zeros(len(layouts))
    bounded = np.zeros(len(layouts), dtype=np.int64)
    if pool.shared_cores is None:
        parts: list[tuple[Index, int]] = [(np.arange(len(layouts)), 1)]
    else:  # the speed of a rank depends on how many processes one stage keeps busy
        busy = layouts.dp * layouts.cp * layouts.tp
        parts = [(np.flatnonzero(busy == n), int(n)) for n in np.unique(busy)]
    for index, busy_ranks in parts:
        grid = Grid(model, cluster, workload, layouts.take(index), policies, busy_ranks)
        time[index], memory[index] = grid.bounds(capacity, worth_s)
        bounded[index] = grid.policies_bounded
    return Bounds(
        time_s=time, memory_bytes=memory, capacity_bytes=capacity, policies_bounded=bounded
    )


class Grid:
    """Layouts of one cluster, and what every policy costs under them."""

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        workload: Workload,
        layouts: Layouts,
        policies: Sequence[Options],
        busy_ranks: int,
    ) -> None:
        self.model, self.layouts, self.policies = model, layouts, policies
        pool = cluster.pools[0]
        self.everyone = Prices(
            pool, cluster.profile, min(cluster.num_devices, pool.devices_per_node)
        )
        self.alone = self.everyone
        first, self.local = alike(cuts_of_a_layer(model, layouts, policies[0].balance_loss))
        cut = layouts.take(first)
        priced = pieces_of_each(model, cut, workload.seq_tokens, self.everyone, policies)
        self.costs = self.quick = priced
        if pool.shared_cores is not None:
            self.alone = Prices(pool, cluster.profile, busy_ranks)
            self.quick = pieces_of_each(model, cut, workload.seq_tokens, self.alone, policies)
        self.least_memory = workload.objective == "memory"
        self.policies_bounded = np.zeros(len(layouts), dtype=np.int64)

    def bounds(self, capacity_bytes: float, worth_s: float) -> tuple[Array, Array]:
        """Seconds and bytes of every row."""
        drift = self.everyone.drift
        rows = self.layouts
        first, pipe = alike([self.local, rows.pp, rows.vpp, rows.schedule, rows.num_microbatches])
        pipeline = Pipeline(self, first)
        time, memory = pipeline.chains()[pipe], np.zeros(len(rows))
        alive = np.flatnonzero(time * drift <= worth_s)
        if not len(alive):
            return time * drift, memory
        found = self._memory(0, alive)
        memory[alive] = np.max(found.total, axis=0)
        full = np.ones(len(alive), dtype=bool)
        if not self.least_memory:
            full = memory[alive] > capacity_bytes
        tight = alive[full]
        self.policies_bounded[alive] = 1
        self.policies_bounded[tight] = len(self.policies)
        if len(self.policies) > 1 and len(tight):
            every = self._every_policy(tight, part(found, full))
            least = np.maximum(
                every.kept + every.working, every.others * every.kept + every.closing
            )
            memory[tight] = np.max(np.min(least, axis=0), axis=0)
            at = pipe[tight]
            extra = np.stack(
                [
                    least_extra_s(part(every, r), pipeline.extra_s(r)[:, at], capacity_bytes)
                    for r in range(len(RANKS))
                ]
            )
            # what fits in no way is ruled out by its memory; its time is the fastest policy's
            time[tight] = pipeline.chains_with(np.where(np.isfinite(extra), extra, 0.0), at)
        time[alive] += self._updates(alive)
        return time * drift, memory

    def _every_policy(self, rows: Index, first: Peaks) -> Peaks:
        """Bytes by policy, rank looked at and row; `first` are those of the first policy.

        A layer keeps in proportion to what it does not offload: half-way is the mean of both ends.
        """
        found = {self.policies[0]: first}
        for which, policy in enumerate(self.policies[1:], start=1):
            if not 0 < policy.offload < 1:
                found[policy] = self._memory(which, rows)
        for policy in self.policies:
            if policy not in found:
                none, all_of_it = (found[replace(policy, offload=x)] for x in (0.0, 1.0))
                share = policy.offload
                found[policy] = Peaks(
                    **{
                        name: (1 - share) * getattr(none, name) + share * getattr(all_of_it, name)
                        for name in PARTS
                    }
                )
        each = [found[policy] for policy in self.policies]
        return Peaks(**{n: np.stack([getattr(peaks, n) for peaks in each]) for n in PARTS})

    def pieces(self, which: int, rows: Index, *, quick: bool = False) -> Pieces:
        return (self.quick if quick else self.costs)[which].take(self.local[rows])

    def _memory(self, which: int, rows: Index) -> Peaks:
        """Bytes by rank looked at and row, under one policy."""
        found = {name: np.zeros((len(RANKS), len(rows))) for name in PARTS}
        for start in range(0, len(rows), BLOCK_ROWS):
            here = slice(start, start + BLOCK_ROWS)
            block, costs = self.layouts.take(rows[here]), self.pieces(which, rows[here])
            for r, rank in self._fullest(block):
                load = load_of(self.model, block, rank)
                flight = in_flight_of(block, rank, load, costs, self.everyone.pool.stack)
                peaks = rank_bytes(load, costs, block, self.everyone, self.policies[which], flight)
                for name, values in found.items():
                    values[r, here] = getattr(peaks, name)
        return Peaks(**found)

    def _updates(self, index: Index) -> Array:
        """What a rank does once per step under any policy; the longest of the ranks looked at."""
        rows = self.layouts.take(index)
        chosen, inverse = alike(
            [
                self.local[index], rows.pp, rows.vpp, rows.num_microbatches, rows.zero,
                rows.dp_shard, np.isin(rows.schedule, V_SHAPED).astype(np.int64),
            ]
        )  # fmt: skip
        first = index[chosen]
        some = self.layouts.take(first)
        least = np.full(len(first), np.inf)
        for which, options in enumerate(self.policies):
            if which not in self._hiding():
                continue
            costs = self.pieces(which, first)
            longest = np.zeros(len(first))
            for _, rank in self._fullest(some):
                load = load_of(self.model, some, rank)
                once = update(load, costs, some, self.everyone, options)
                longest = np.maximum(longest, once.total_s)
            least = np.minimum(least, longest)
        return least[inverse]

    def _hiding(self) -> Sequence[int]:
        """The policies under which updates may be shortest: the exchange hides behind backward, so
        where ranks meet on time it is the one that recomputes most."""
        if self.everyone.profile is not None:
            return range(len(self.policies))
        again = [sum(float(x.recompute_s.sum()) for x in costs.layers) for costs in self.costs]
        return (int(np.argmax(again)),)

    def _fullest(self, layouts: Layouts) -> list[tuple[int, Array]]:
        """The ranks that hold most, with their place among those looked at.

        Of like layers none holds more than the first rank, but for the head of the last.
        """
        ranks = list(enumerate(ranks_looked_at(self.model, layouts)))
        return [ranks[0], ranks[-1]] if len(self.model.layers) == 1 else ranks
