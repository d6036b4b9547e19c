"""Lower bounds of time and memory for a whole grid of layouts at once.

The same formulas as the simulator, with the pipeline's closed form in place of the played schedule:
the longest path through the actions of one rank (`schedule.chain_s`), for a few ranks (`_ranks`).
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
from dataclasses import dataclass, fields, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..cluster import Cluster
from ..model import Model
from ..plan import SCHEDULES, SPLIT_SCHEDULES
from ..stack import Stack
from ..workload import Workload
from .graph import Array
from .in_flight import Shares, least_in_flight
from .layout import Layouts
from .memory import InFlight, Peaks
from .options import Options
from .pieces import Pieces, pieces_of_each
from .prices import Prices
from .ranks import hop_s, rank_bytes, stage_times, update
from .schedule import chain_s
from .simulate import check_covered
from .split_chains import SplitChains
from .stages import V_SHAPED, Load, rank_load, stage_load

GPIPE, INTERLEAVED = SCHEDULES.index("gpipe"), SCHEDULES.index("interleaved")
ZB_H2 = SCHEDULES.index("zb-h2")
SPLIT = tuple(map(SCHEDULES.index, SPLIT_SCHEDULES))
Index = NDArray[np.intp]

BLOCK_ROWS = 8192
"""Rows whose memory is computed at once: what fits the caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Admissible bounds: never above the simulator's step time and peak memory."""

    time_s: Array
    memory_bytes: Array
    capacity_bytes: float
    evaluated: int
    """Pairs of a layout and an option whose time and memory were both bounded."""


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
    evaluated = 0
    if pool.shared_cores is None:
        parts: list[tuple[Index, int]] = [(np.arange(len(layouts)), 1)]
    else:  # the speed of a rank depends on how many processes one stage keeps busy
        busy = layouts.dp * layouts.cp * layouts.tp
        parts = [(np.flatnonzero(busy == n), int(n)) for n in np.unique(busy)]
    for index, busy_ranks in parts:
        grid = _Grid(model, cluster, workload, layouts.take(index), policies, busy_ranks)
        time[index], memory[index] = grid.bounds(capacity, worth_s)
        evaluated += grid.evaluated
    return Bounds(time_s=time, memory_bytes=memory, capacity_bytes=capacity, evaluated=evaluated)


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
        self.least_memory = workload.objective == "memory"
        self.evaluated = 0

    def bounds(self, capacity_bytes: float, worth_s: float) -> tuple[Array, Array]:
        """Seconds and bytes of every row."""
        drift = self.everyone.drift
        rows = self.layouts
        first, pipe = _alike([self.local, rows.pp, rows.vpp, rows.schedule, rows.num_microbatches])
        pipeline = _Pipeline(self, first)
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
        self.evaluated += len(alive) + (len(self.policies) - 1) * len(tight)
        if len(self.policies) > 1 and len(tight):
            every = self._every_policy(tight, _part(found, full))
            least = np.maximum(
                every.kept + every.working, every.others * every.kept + every.closing
            )
            memory[tight] = np.max(np.min(least, axis=0), axis=0)
            at = pipe[tight]
            extra = np.stack(
                [
                    least_extra_s(_part(every, r), pipeline.extra_s(r)[:, at], capacity_bytes)
                    for r in range(len(_RANKS))
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
                        for name in _PARTS
                    }
                )
        each = [found[policy] for policy in self.policies]
        return Peaks(**{n: np.stack([getattr(peaks, n) for peaks in each]) for n in _PARTS})

    def _pieces(self, which: int, rows: Index, *, quick: bool = False) -> Pieces:
        return (self.quick if quick else self.costs)[which].take(self.local[rows])

    def _memory(self, which: int, rows: Index) -> Peaks:
        """Bytes by rank looked at and row, under one policy."""
        found = {name: np.zeros((len(_RANKS), len(rows))) for name in _PARTS}
        for start in range(0, len(rows), BLOCK_ROWS):
            here = slice(start, start + BLOCK_ROWS)
            block, costs = self.layouts.take(rows[here]), self._pieces(which, rows[here])
            for r, rank in self._fullest(block):
                load = _load(self.model, block, rank)
                flight = _in_flight(block, rank, load, costs, self.everyone.pool.stack)
                peaks = rank_bytes(load, costs, block, self.everyone, self.policies[which], flight)
                for name, values in found.items():
                    values[r, here] = getattr(peaks, name)
        return Peaks(**found)

    def _updates(self, index: Index) -> Array:
        """What a rank does once per step under any policy; the longest of the ranks looked at."""
        rows = self.layouts.take(index)
        chosen, inverse = _alike(
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
            costs = self._pieces(which, first)
            longest = np.zeros(len(first))
            for _, rank in self._fullest(some):
                load = _load(self.model, some, rank)
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
        ranks = list(enumerate(_ranks(self.model, layouts)))
        return [ranks[0], ranks[-1]] if len(self.model.layers) == 1 else ranks


class _Pipeline:
    """Rows with unlike pipelines, layers under the policy that takes the least time."""

    def __init__(self, grid: _Grid, rows: Index) -> None:
        self.grid, self.layouts = grid, grid.layouts.take(rows)
        model, layouts = grid.model, self.layouts
        use_all = layouts.pp == 1
        self.loads = [_load(model, layouts, rank) for rank in _ranks(model, layouts)]
        self.m = layouts.num_microbatches.astype(float)
        self.p = layouts.pp.astype(float)
        everything = stage_load(model, np.zeros(1), np.array([model.num_layers - 1.0]))
        befores = [_before(model, layouts, rank) for rank in _ranks(model, layouts)]
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
            for r, (rank, load) in enumerate(zip(_ranks(model, layouts), befores, strict=True)):
                lead = np.where(rank > 0, sum(seconds(load)), 0.0) + 2 * rank * action_s
                self.before[r] = np.minimum(self.before[r], lead)
            hop = hop_s(fast, layouts, grid.alone)
        self.fill_hops = np.zeros(n)
        if grid.alone.pool.stack.can_overlap:  # as in the simulator: fill and drain alone
            self.fill_hops, hop = 2 * (self.p - 1) * hop, 0.0 * hop
        self.hop = hop
        self.fastest = np.argmin(self.forward + self.backward, axis=0)
        self.split = self._split(rows)

    def _split(self, rows: Index) -> SplitChains | None:
        """The rows whose backward is split; None if there are none."""
        which = np.flatnonzero(np.isin(self.layouts.schedule, SPLIT))
        if not len(which):
            return None
        grid, layouts = self.grid, self.layouts.take(which)
        costs = [grid._pieces(k, rows[which], quick=True) for k in range(len(grid.policies))]
        ranks = _ranks(grid.model, layouts)
        return SplitChains(grid.model, layouts, ranks, costs, grid.alone, self.hop[which])

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
        for r, rank in enumerate(_ranks(self.grid.model, layouts)):
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
        split = np.isin(layouts.schedule, SPLIT)
        if self.split is not None and split.any():
            place = np.cumsum(np.isin(self.layouts.schedule, SPLIT)) - 1
            best[split] = self.split.chains(extra[:, split], place[rows[split]])
        return best + self.fill_hops[rows]


_PARTS = tuple(field.name for field in fields(Peaks))


def _part(peaks: Peaks, index: int | NDArray[np.bool_]) -> Peaks:
    """The rows, or of several policies the rank, at an index of the second axis."""
    return Peaks(**{name: getattr(peaks, name)[:, index] for name in _PARTS})


def least_extra_s(peaks: Peaks, extra_s: Array, capacity_bytes: float) -> Array:
    """Least time of a mixture of policies within the capacity; arrays are (policies, rows).

    Infinite where nothing fits.

    >>> kept, extra = np.array([[10.0], [0.0]]), np.array([[0.0], [4.0]])
    >>> peaks = Peaks(total=kept + 5, kept=kept, working=0 * kept + 5, closing=0 * kept,
    ...               others=0 * kept)
    >>> float(least_extra_s(peaks, extra, 10.0)[0])
    2.0
    """
    kept = peaks.kept
    best = np.min(np.where(peaks.total <= capacity_bytes, extra_s, np.inf), axis=0)
    others = np.min(peaks.others, axis=0)
    for i, j in combinations(range(len(kept)), 2):
        left = capacity_bytes - np.maximum(peaks.closing[i], peaks.closing[j])
        room = np.where(left >= 0, left / np.maximum(others, 1e-9), -np.inf)
        room = np.minimum(room, capacity_bytes - np.maximum(peaks.working[i], peaks.working[j]))
        first = kept[i] > kept[j]
        more, less = np.where(first, kept[i], kept[j]), np.where(first, kept[j], kept[i])
        fast = np.where(first, extra_s[i], extra_s[j])
        slow = np.where(first, extra_s[j], extra_s[i])
        between = (less <= room) & (room < more)
        share = (more - np.where(between, room, 0.0)) / np.where(between, more - less, 1.0)
        best = np.minimum(best, np.where(between, fast + share * (slow - fast), np.inf))
    return best


_RANKS = ("first", "second", "beyond", "last")


def _ranks(model: Model, layouts: Layouts) -> list[Array]:
    """The pipeline ranks that are looked at: the first, the second, the first one beyond the first
    group of layers (the fullest, where a few lighter layers come first), and the last."""
    last = (layouts.pp - 1).astype(float)
    largest = np.ceil(model.num_layers / (layouts.pp * layouts.vpp))
    beyond = np.ceil(model.layers[0].repeat / largest) if len(model.layers) > 1 else 0.0 * last
    return [np.zeros(len(layouts)), np.minimum(1.0, last), np.minimum(beyond, last), last]


def _load(model: Model, layouts: Layouts, rank: Array) -> Load:
    """All chunks of a rank, worked out once per kind of pipeline."""
    first, inverse = _alike([layouts.pp, layouts.vpp, layouts.schedule])
    load = rank_load(model, layouts.take(first), rank[first])
    return Load(
        layers=tuple(count[inverse] for count in load.layers),
        embedding=load.embedding[inverse],
        head=load.head[inverse],
    )


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


def _in_flight(layouts: Layouts, rank: Array, load: Load, costs: Pieces, stack: Stack) -> InFlight:
    """Live chunk activations of a rank."""
    m = layouts.num_microbatches.astype(float)
    p, v = layouts.pp.astype(float), layouts.vpp.astype(float)
    warm = np.where(layouts.schedule == GPIPE, m, np.minimum(m, p - rank))
    chunked = np.minimum((v - 1) * p + 2 * (p - 1 - rank) + 1, m * v)
    first = np.where((layouts.schedule == INTERLEAVED) & (v > 1), chunked, warm)
    later = np.where(first < m * v, first, first - 1)
    split = np.isin(layouts.schedule, SPLIT)
    if split.any():
        held = least_in_flight(layouts, rank, Shares.of(load, costs, layouts, stack))
        first, later = np.where(split, 0.0, first), np.where(split, held, later)
    return InFlight(first=first, later=later)
