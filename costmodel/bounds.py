"""Lower bounds of time and memory for a whole grid of layouts at once.

The same formulas as the simulator, with the pipeline's closed form in place of the played schedule.
The simulator's longest path through the actions of one rank is looked at for ranks 0, 1 and p-1
(`schedule.chain_s`). Interleaved schedules use the last rank alone: its first forward follows the
stages before it and its last backward precedes theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cluster import Cluster
from ..model import Model
from ..plan import SCHEDULES
from ..workload import Workload
from .graph import Array
from .layout import Layouts
from .options import Options
from .pieces import Pieces, pieces
from .prices import Prices
from .ranks import hop_s, rank_memory, stage_times, update
from .schedule import chain_s
from .simulate import check_covered
from .stages import Load, even_load, merge, stage_load

GPIPE, INTERLEAVED = SCHEDULES.index("gpipe"), SCHEDULES.index("interleaved")


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
    options: Options,
) -> Bounds:
    """Bounds of layouts that keep the rules of `layout_problems`, with stages cut evenly."""
    check_covered(model)
    pool = cluster.pools[0]
    time = np.zeros(len(layouts))
    memory = np.zeros(len(layouts))
    if pool.shared_cores is None:
        parts: list[tuple[NDArray[np.intp], int]] = [(np.arange(len(layouts)), 1)]
    else:  # the speed of a rank depends on how many processes one stage keeps busy
        busy = layouts.dp * layouts.tp
        parts = [(np.flatnonzero(busy == n), int(n)) for n in np.unique(busy)]
    for index, busy_ranks in parts:
        some = layouts.take(index)
        everyone = Prices(pool, cluster.profile, min(cluster.num_devices, pool.devices_per_node))
        costs = pieces(model, some, workload.seq_tokens, everyone, options)
        fast = costs
        alone = everyone
        if pool.shared_cores is not None:
            alone = Prices(pool, cluster.profile, busy_ranks)
            fast = pieces(model, some, workload.seq_tokens, alone, options)
        use = some.pp == 1
        quick = _makespan(model, some, fast, alone)
        full = _makespan(model, some, costs, everyone)
        once = _updates(model, some, costs, everyone, options)
        time[index] = (np.where(use, full, quick) + once) * everyone.drift
        memory[index] = _memory(model, some, costs, everyone, options)
    return Bounds(time_s=time, memory_bytes=memory, capacity_bytes=float(pool.device.memory_bytes))


def _ranks(layouts: Layouts) -> list[Array]:
    """The pipeline ranks that are looked at."""
    last = (layouts.pp - 1).astype(float)
    return [np.zeros(len(layouts)), np.minimum(1.0, last), last]


def _rank_load(model: Model, layouts: Layouts, rank: Array) -> Load:
    """All chunks of one rank."""
    loads: list[Load] = []
    for chunk in range(int(layouts.vpp.max())):
        load = even_load(model, layouts, rank + chunk * layouts.pp)
        here = (chunk < layouts.vpp).astype(float)
        loads.append(
            Load(
                layers=tuple(count * here for count in load.layers),
                embedding=load.embedding * here,
                head=load.head * here,
            )
        )
    return merge(loads)


def _makespan(model: Model, layouts: Layouts, costs: Pieces, prices: Prices) -> Array:
    m = layouts.num_microbatches.astype(float)
    p = layouts.pp.astype(float)
    hop = hop_s(costs, layouts, prices)
    fill_hops = np.zeros(1)
    if prices.pool.stack.can_overlap:  # as in the simulator: fill and drain alone
        fill_hops, hop = 2 * (p - 1) * hop, 0.0 * hop
    action_s = np.where(p > 1, prices.host("pp_action"), 0.0)
    best = np.zeros(len(layouts))
    interleaved = (layouts.schedule == INTERLEAVED) & (layouts.vpp > 1)
    for rank in _ranks(layouts):
        load = _rank_load(model, layouts, rank)
        own = stage_times(load, costs, prices)
        forward = own.forward_s + layouts.vpp * action_s
        backward = own.backward_s + layouts.vpp * action_s
        before = _before(model, layouts, costs, prices, rank, action_s)
        everything = stage_times(
            stage_load(model, np.zeros(1), np.array([model.num_layers - 1.0])), costs, prices
        )
        all_s = everything.forward_s + everything.backward_s + 2 * p * action_s
        chain = chain_s(
            forward_s=forward,
            backward_s=backward,
            before_s=before + 2 * rank * hop,
            behind_s=all_s - before - forward - backward + 2 * (p - 1 - rank) * hop,
            micro_batches=m,
            warm_up=np.where(layouts.schedule == GPIPE, m, np.minimum(m, p - rank)),
        )
        led = np.where(rank == p - 1, before + 2 * rank * hop, 0.0)
        best = np.maximum(best, np.where(interleaved, led + m * (forward + backward), chain))
    return best + fill_hops


def _before(
    model: Model, layouts: Layouts, costs: Pieces, prices: Prices, rank: Array, action_s: Array
) -> Array:
    """F + B of the stages 0 .. rank-1."""
    stages = (layouts.pp * layouts.vpp).astype(float)
    size = np.floor(model.num_layers / stages)
    extra = model.num_layers - size * stages
    layers = rank * size + np.minimum(rank, extra)
    load = stage_load(model, np.zeros(1), layers - 1)
    some = (rank > 0).astype(float)
    times = stage_times(load, costs, prices)
    return some * (times.forward_s + times.backward_s) + 2 * rank * action_s


def _updates(
    model: Model, layouts: Layouts, costs: Pieces, prices: Prices, options: Options
) -> Array:
    longest = np.zeros(len(layouts))
    for rank in _ranks(layouts):
        load = _rank_load(model, layouts, rank)
        longest = np.maximum(longest, update(load, costs, layouts, prices, options).total_s)
    return longest


def _memory(
    model: Model, layouts: Layouts, costs: Pieces, prices: Prices, options: Options
) -> Array:
    m = layouts.num_microbatches.astype(float)
    p, v = layouts.pp.astype(float), layouts.vpp.astype(float)
    fullest = np.zeros(len(layouts))
    for rank in _ranks(layouts):
        load = _rank_load(model, layouts, rank)
        warm = np.where(layouts.schedule == GPIPE, m, np.minimum(m, p - rank))
        chunked = np.minimum((v - 1) * p + 2 * (p - 1 - rank) + 1, m * v)
        interleaved = (layouts.schedule == INTERLEAVED) & (v > 1)
        first = np.where(interleaved, chunked, warm)
        later = np.where(first < m * v, first, first - 1)
        peak = rank_memory(load, costs, layouts, prices, options, (first, later))
        fullest = np.maximum(fullest, peak.total)
    return fullest
