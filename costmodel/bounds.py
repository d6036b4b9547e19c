"""Lower bounds of time and memory for a whole grid of layouts at once.

The same formulas as the simulator, with the pipeline's closed form in place of the played schedule:
the longest path through the actions of one rank (`schedule.chain_s`), for ranks 0, 1 and p-1.
Interleaved schedules use the last rank alone: its first forward follows the stages before it and
its last backward precedes theirs.

Layers may differ in what they keep for backward: `bound_layouts` takes several options, of which
every layer takes one. Per rank and policy k let T_k be the seconds of a micro-batch, A_k the bytes
that live micro-batches keep and P_k the peak, all layers alike. A rank that mixes policies in
shares x_k needs at least

    sum_k x_k A_k + min_k (P_k - A_k)  bytes   and   sum_k x_k T_k  seconds,

so the least time within the capacity lies on a line between two policies: the fractional relaxation
of the choice per layer.

Rows that share what a formula depends on share its result: pieces are priced once per way of
cutting a layer, the pipeline once per way of filling it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..cluster import Cluster
from ..model import Model
from ..plan import SCHEDULES
from ..workload import Workload
from .graph import Array
from .layout import Layouts
from .memory import InFlight
from .options import Options
from .pieces import Pieces, pieces_of_each
from .prices import Prices
from .ranks import hop_s, rank_bytes, stage_times, update
from .schedule import chain_s
from .simulate import check_covered
from .stages import Load, rank_load, stage_load

GPIPE, INTERLEAVED = SCHEDULES.index("gpipe"), SCHEDULES.index("interleaved")
Index = NDArray[np.intp]

BLOCK_ROWS = 8192
"""Rows whose memory is computed at once: what fits the caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Admissible bounds: never above the simulator's step time and peak memory."""

    time_s: Array
    memory_bytes: Array
    capacity_bytes: float


def bound_layouts(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    layouts: Layouts,
    options: Options | Sequence[Options],
) -> Bounds:
    """Bounds of layouts that keep the rules of `layout_problems`, with stages cut evenly.

    With several `options`, which may differ in recompute and offload, layers choose among them.
    Time is the least that fits the capacity. Memory is the least of all, except that where the
    first of them fits, and memory is not what is optimised, it is that one's.
    """
    check_covered(model)
    policies = (options,) if isinstance(options, Options) else tuple(options)
    pool = cluster.pools[0]
    time = np.zeros(len(layouts))
    memory = np.zeros(len(layouts))
    if pool.shared_cores is None:
        parts: list[tuple[Index, int]] = [(np.arange(len(layouts)), 1)]
    else:  # the speed of a rank depends on how many processes one stage keeps busy
        busy = layouts.dp * layouts.cp * layouts.tp
        parts = [(np.flatnonzero(busy == n), int(n)) for n in np.unique(busy)]
    for index, busy_ranks in parts:
        grid = _Grid(model, cluster, workload, layouts.take(index), policies, busy_ranks)
        time[index], memory[index] = grid.bounds()
    return Bounds(time_s=time, memory_bytes=memory, capacity_bytes=float(pool.device.memory_bytes))


class _Grid:
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
        first, self.local = _alike(_cuts_of_a_layer(model, layouts))
        cut = layouts.take(first)
        priced = pieces_of_each(model, cut, workload.seq_tokens, self.everyone, policies)
        self.costs = self.quick = priced
        if pool.shared_cores is not None:
            self.alone = Prices(pool, cluster.profile, busy_ranks)
            self.quick = pieces_of_each(model, cut, workload.seq_tokens, self.alone, policies)
        self.capacity_bytes = float(pool.device.memory_bytes)
        self.least_memory = workload.objective == "memory"

    def bounds(self) -> tuple[Array, Array]:
        """Seconds and bytes of every row."""
        everything = np.arange(len(self.layouts))
        peaks, kept = self._memory(0, everything)
        memory = np.max(peaks, axis=0)
        tight = everything
        if not self.least_memory:
            tight = np.flatnonzero(memory > self.capacity_bytes)
        extra = None
        if len(self.policies) > 1 and len(tight):
            each = [(peaks[:, tight], kept[:, tight])]
            each += [self._memory(k, tight) for k in range(1, len(self.policies))]
            all_peaks, all_kept = (np.stack(part) for part in zip(*each, strict=True))
            fixed = np.min(all_peaks - all_kept, axis=0)
            memory[tight] = np.max(np.min(all_kept, axis=0) + fixed, axis=0)
            extra = _Extra(rows=tight, kept=all_kept, room=self.capacity_bytes - fixed)
        time = (self._makespan(extra) + self._updates()) * self.everyone.drift
        return time, memory

    def _pieces(self, which: int, rows: Index, *, quick: bool = False) -> Pieces:
        return (self.quick if quick else self.costs)[which].take(self.local[rows])

    def _memory(self, which: int, rows: Index) -> tuple[Array, Array]:
        """Peak, and what live micro-batches keep of it, by rank looked at and row."""
        peaks, kept = np.zeros((2, len(_RANKS), len(rows)))
        like = len(self.model.layers) == 1  # the second rank never holds more than the first
        for start in range(0, len(rows), BLOCK_ROWS):
            here = slice(start, start + BLOCK_ROWS)
            block, costs = self.layouts.take(rows[here]), self._pieces(which, rows[here])
            for r, rank in enumerate(_ranks(block)):
                if like and r == 1:
                    continue
                load, flight = rank_load(self.model, block, rank), _in_flight(block, rank)
                peaks[r, here], kept[r, here] = rank_bytes(
                    load, costs, block, self.everyone, self.policies[which], flight
                )
        return peaks, kept

    def _updates(self) -> Array:
        """What a rank does once per step under any policy; the longest of the ranks looked at."""
        rows = self.layouts
        first, inverse = _alike(
            [self.local, rows.pp, rows.vpp, rows.num_microbatches, rows.zero, rows.dp_shard]
        )
        some = rows.take(first)
        least = np.full(len(first), np.inf)
        for which, options in enumerate(self.policies):
            if which not in self._hiding():
                continue
            costs = self._pieces(which, first)
            longest = np.zeros(len(first))
            for rank in self._fullest(some):
                load = rank_load(self.model, some, rank)
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

    def _fullest(self, layouts: Layouts) -> list[Array]:
        """The ranks that hold most. Among like layers the second never holds more than the first,
        which has as many, as many micro-batches in flight, and the embedding."""
        ranks = _ranks(layouts)
        return [ranks[0], ranks[2]] if len(self.model.layers) == 1 else ranks

    def _makespan(self, extra: _Extra | None) -> Array:
        """The longest chain through the ranks looked at, with the least time that memory asks of
        each beyond the fastest policy."""
        rows = self.layouts
        first, inverse = _alike(
            [self.local, rows.pp, rows.vpp, rows.schedule, rows.num_microbatches]
        )
        pipeline = _Pipeline(self, first)
        time = pipeline.chains()[inverse]
        if extra is not None:
            at = inverse[extra.rows]
            more = np.stack(
                [
                    least_extra_s(extra.kept[:, r], pipeline.extra_s(r)[:, at], extra.room[r])
                    for r in range(len(_RANKS))
                ]
            )
            # what fits in no way is ruled out by its memory; its time is the fastest policy's
            time[extra.rows] = pipeline.chains_with(np.where(np.isfinite(more), more, 0.0), at)
        return time


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extra:
    """Rows in which the first policy does not fit."""

    rows: Index
    kept: Array
    """Bytes by policy, rank looked at and row."""
    room: Array
    """For them, by rank looked at and row."""


class _Pipeline:
    """Rows with unlike pipelines, layers under the policy that takes the least time."""

    def __init__(self, grid: _Grid, rows: Index) -> None:
        self.grid, self.layouts = grid, grid.layouts.take(rows)
        model, layouts = grid.model, self.layouts
        use_all = layouts.pp == 1
        self.loads = [rank_load(model, layouts, rank) for rank in _ranks(layouts)]
        self.m = layouts.num_microbatches.astype(float)
        self.p = layouts.pp.astype(float)
        everything = stage_load(model, np.zeros(1), np.array([model.num_layers - 1.0]))
        befores = [_before(model, layouts, rank) for rank in _ranks(layouts)]
        n = len(rows)
        count = len(grid.policies)
        self.forward = np.zeros((count, len(_RANKS), n))
        self.backward = np.zeros_like(self.forward)
        self.all_s = np.full(n, np.inf)
        self.before = np.full((len(_RANKS), n), np.inf)
        hop = np.zeros(n)
        action_s = np.where(self.p > 1, grid.alone.host("pp_action"), 0.0)
        for k in range(count):
            fast = grid._pieces(k, rows, quick=True)
            full = grid._pieces(k, rows) if grid.quick is not grid.costs else fast

            def seconds(
                load: Load, fast: Pieces = fast, full: Pieces = full
            ) -> tuple[Array, Array]:
                quick_s = stage_times(load, fast, grid.alone)
                if full is fast:
                    return quick_s.forward_s, quick_s.backward_s
                full_s = stage_times(load, full, grid.everyone)
                return (
                    np.where(use_all, full_s.forward_s, quick_s.forward_s),
                    np.where(use_all, full_s.backward_s, quick_s.backward_s),
                )

            for r, load in enumerate(self.loads):
                forward, backward = seconds(load)
                self.forward[k, r] = forward + layouts.vpp * action_s
                self.backward[k, r] = backward + layouts.vpp * action_s
            self.all_s = np.minimum(self.all_s, sum(seconds(everything)) + 2 * self.p * action_s)
            for r, (rank, load) in enumerate(zip(_ranks(layouts), befores, strict=True)):
                lead = np.where(rank > 0, sum(seconds(load)), 0.0) + 2 * rank * action_s
                self.before[r] = np.minimum(self.before[r], lead)
            hop = hop_s(fast, layouts, grid.alone)
        self.fill_hops = np.zeros(n)
        if grid.alone.pool.stack.can_overlap:  # as in the simulator: fill and drain alone
            self.fill_hops, hop = 2 * (self.p - 1) * hop, 0.0 * hop
        self.hop = hop
        self.fastest = np.argmin(self.forward + self.backward, axis=0)

    def _least(self, values: Array) -> Array:
        return np.take_along_axis(values, self.fastest[None], axis=0)[0]

    def extra_s(self, r: int) -> Array:
        """Seconds per micro-batch beyond the fastest policy, by policy and row."""
        total = self.forward[:, r] + self.backward[:, r]
        return total - np.min(total, axis=0)

    def chains(self) -> Array:
        """The longest chain of every row, layers under the fastest policy."""
        n = len(self.layouts)
        return self.chains_with(np.zeros((len(_RANKS), n)), np.arange(n))

    def chains_with(self, extra: Array, rows: Index) -> Array:
        """The same of `rows`, where every micro-batch of a rank takes `extra` seconds more."""
        layouts, p, m, hop = self.layouts.take(rows), self.p[rows], self.m[rows], self.hop[rows]
        chunked = (layouts.schedule == INTERLEAVED) & (layouts.vpp > 1)
        all_forward, all_backward = self._least(self.forward), self._least(self.backward)
        best = np.zeros(len(rows))
        for r, rank in enumerate(_ranks(layouts)):
            forward, own = all_forward[r][rows], all_backward[r][rows]
            backward = own + extra[r]
            before = self.before[r][rows]
            behind = np.maximum(self.all_s[rows] - before - forward - own, 0.0)
            chain = chain_s(
                forward_s=forward,
                backward_s=backward,
                before_s=before + 2 * rank * hop,
                behind_s=behind + 2 * (p - 1 - rank) * hop,
                micro_batches=m,
                warm_up=np.where(layouts.schedule == GPIPE, m, np.minimum(m, p - rank)),
            )
            led = np.where(rank == p - 1, before + 2 * rank * hop, 0.0)
            best = np.maximum(best, np.where(chunked, led + m * (forward + backward), chain))
        return best + self.fill_hops[rows]


def least_extra_s(kept_bytes: Array, extra_s: Array, room_bytes: Array) -> Array:
    """Least time of a mixture of policies that keeps at most `room_bytes`.

    Arrays are (policies, rows) and (rows,). A mixture of two suffices: with one inequality beside
    sum x = 1, a vertex of the feasible set has two shares that are not zero. Infinite where even
    the policy that keeps least keeps too much.

    >>> kept, extra = np.array([[10.0], [0.0]]), np.array([[0.0], [4.0]])
    >>> float(least_extra_s(kept, extra, np.array([5.0]))[0])
    2.0
    """
    best = np.min(np.where(kept_bytes <= room_bytes, extra_s, np.inf), axis=0)
    for i, j in combinations(range(len(kept_bytes)), 2):
        above = np.where(kept_bytes[i] > kept_bytes[j], i, j)
        below = i + j - above
        more = np.take_along_axis(kept_bytes, above[None], 0)[0]
        less = np.take_along_axis(kept_bytes, below[None], 0)[0]
        slow = np.take_along_axis(extra_s, below[None], 0)[0]
        fast = np.take_along_axis(extra_s, above[None], 0)[0]
        between = (less <= room_bytes) & (room_bytes < more)
        share = (more - room_bytes) / np.where(between, more - less, 1.0)
        best = np.minimum(best, np.where(between, fast + share * (slow - fast), np.inf))
    return best


_RANKS = ("first", "second", "last")


def _ranks(layouts: Layouts) -> list[Array]:
    """The pipeline ranks that are looked at."""
    last = (layouts.pp - 1).astype(float)
    return [np.zeros(len(layouts)), np.minimum(1.0, last), last]


def _cuts_of_a_layer(model: Model, layouts: Layouts) -> list[NDArray[np.int64]]:
    """Everything of a layout that the cost of one micro-batch through a layer depends on."""
    x = layouts
    return [
        x.micro_batch_seqs, x.tp, x.sequence_parallel, x.cp, x.ulysses, x.ep, x.expert_tp,
        (x.zero > 0).astype(np.int64), (x.zero > 2).astype(np.int64),
        x.dp if not model.is_decoder else np.zeros(1, dtype=np.int64),
    ]  # fmt: skip


def _alike(columns: Sequence[NDArray[np.int64]]) -> tuple[Index, Index]:
    """The first row of each kind, and the kind of each row; rows of a kind agree in all columns."""
    key = np.zeros(1, dtype=np.int64)
    span = 1
    for column in columns:
        size = int(column.max(initial=0)) + 1
        if span * size >= 2**62:
            key = np.unique(key, return_inverse=True)[1]
            span = int(key.max(initial=0)) + 1
        key, span = key * size + column, span * size
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return first, inverse


def _before(model: Model, layouts: Layouts, rank: Array) -> Load:
    """The layers of the stages 0 .. rank-1."""
    stages = (layouts.pp * layouts.vpp).astype(float)
    size = np.floor(model.num_layers / stages)
    extra = model.num_layers - size * stages
    return stage_load(model, np.zeros(1), rank * size + np.minimum(rank, extra) - 1)


def _in_flight(layouts: Layouts, rank: Array) -> InFlight:
    """Live chunk activations of a rank."""
    m = layouts.num_microbatches.astype(float)
    p, v = layouts.pp.astype(float), layouts.vpp.astype(float)
    warm = np.where(layouts.schedule == GPIPE, m, np.minimum(m, p - rank))
    chunked = np.minimum((v - 1) * p + 2 * (p - 1 - rank) + 1, m * v)
    first = np.where((layouts.schedule == INTERLEAVED) & (v > 1), chunked, warm)
    return InFlight(first=first, later=np.where(first < m * v, first, first - 1))
