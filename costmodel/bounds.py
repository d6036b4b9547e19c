"""Lower bounds of time and memory for a whole grid of layouts at once.

The same formulas as the simulator, with the pipeline's closed form in place of the played schedule.

Where stages are given the longest path through the actions of a rank is taken, for a few ranks
(`given.py`, `chains.py`); where they may be cut in any way, the least over all cuts of what every
rank's actions and memory ask for (`uncut.py`, `reach.py`, `rooms.py`).

Rows that share what a formula depends on share its result: pieces are priced once per way of
cutting a layer (`priced_grid.py`), what stages hold is worked out once per shape of a pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..cluster import Cluster
from ..model import Model
from ..workload import Workload
from .fleet import Fleet
from .given import Given
from .graph import Array
from .grid_rows import Index
from .layout import Layouts
from .options import Options
from .priced_pieces import Known
from .simulate import check_covered
from .uncut import Uncut, is_free

Stages = Literal["even", "free"] | Sequence[int]
"""How layers are cut into stages: evenly, in any way, or so many each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Admissible bounds: never above the simulator's step time and peak memory."""

    time_s: Array
    memory_bytes: Array
    """Of several pools: relative to the capacity of a rank's device, times the first pool's."""
    capacity_bytes: float
    policies_bounded: NDArray[np.int64]
    """For each layout the number of options under which time and memory were both bounded."""


def bound_layouts(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    layouts: Layouts,
    options: Options | Sequence[Options],
    capacity_bytes: float | Sequence[float] | None = None,
    worth_s: float = np.inf,
    stages: Stages = "even",
    known: Known | None = None,
) -> Bounds:
    """Bounds of layouts that keep the rules of `layout_problems`, with stages cut evenly, with
    given numbers of layers, or cut in any way. Pipelines go through the pools in their order.

    `capacity_bytes` is what a rank may fill, by pool: None = the memory of the device. Where the
    pipeline alone takes longer than `worth_s`, nothing more is worked out: the bound of memory is
    zero. With `known`, what grids have in common is priced once.

    With several `options`, which may differ in what layers keep, layers choose among them. Time is
    the least that fits the capacity, memory the least of all.
    """
    check_covered(model)
    policies = (options,) if isinstance(options, Options) else tuple(options)
    pools = cluster.pools
    if capacity_bytes is None:
        capacities = [float(pool.device.memory_bytes) for pool in pools]
    elif isinstance(capacity_bytes, Sequence):
        capacities = list(capacity_bytes)
    else:
        capacities = [capacity_bytes] * len(pools)
    time, memory = np.zeros((2, len(layouts)))
    bounded = np.zeros(len(layouts), dtype=np.int64)
    if pools[0].shared_cores is None:
        parts: list[tuple[Index, int]] = [(np.arange(len(layouts)), 1)]
    else:  # the speed of a rank depends on how many processes one stage keeps busy
        busy = layouts.replicas * layouts.cp * layouts.tp
        parts = [(np.flatnonzero(busy == n), int(n)) for n in np.unique(busy)]
    for index, busy_ranks in parts:
        fleet = Fleet.of(
            model, cluster, workload, layouts.take(index), policies, capacities, busy_ranks, known
        )
        found = _bounds(fleet, worth_s, stages, workload.objective == "memory")
        time[index], memory[index], bounded[index] = found
    return Bounds(
        time_s=time, memory_bytes=memory, capacity_bytes=capacities[0], policies_bounded=bounded
    )


def _bounds(
    fleet: Fleet, worth_s: float, stages: Stages, least_memory: bool
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Seconds, bytes and policies bounded of every row of a grid."""
    num = len(fleet.layouts)
    time, memory = np.zeros((2, num))
    bounded = np.zeros(num, dtype=np.int64)
    free = is_free(fleet) if stages == "free" else np.zeros(num, dtype=bool)
    rows = np.flatnonzero(~free)
    if len(rows):
        sizes = None if isinstance(stages, str) else stages
        time[rows], memory[rows], bounded[rows] = Given(fleet, rows, worth_s, sizes).bounds()
    rows = np.flatnonzero(free)
    if len(rows):
        rows = rows[np.argsort(-fleet.layouts.pp[rows], kind="stable")]
        time[rows], memory[rows], bounded[rows] = Uncut(fleet, rows, worth_s, least_memory).bounds()
    return time * fleet.drift, memory, bounded
