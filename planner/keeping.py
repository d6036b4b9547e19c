"""What a layer may keep for backward: the policies that the search mixes over layers.

    none       everything that its backward needs
    selective  without the statistics (or scores) of attention, where scores lie in memory
    tensors    some of its tensors; which ones pay says the frontier of the layer's types under a
               few layouts of the grid (`activations/portfolio.py`)
    full       its input alone
    offload    everything, a fraction of it on the host
    fp8        everything, in fp8 where that is published to train as well (COAT), or a fraction of
               that on the host; only where the workload allows it (`quality.py`)

Where plans are made to be run here, sets of tensors are left out, since they ask for a search of
their own, and what does not run: a fraction on the host beside 8 bits, routed experts or latent
attention. On CPUs offload is left out altogether, since their host is the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..choices import TENSORS
from ..cluster import Cluster, Pool
from ..costmodel.layout import Layouts
from ..costmodel.options import Options
from ..costmodel.prices import Prices
from ..costmodel.techniques.storage import EXECUTED
from ..model import Model
from ..schedules import SCHEDULES, SPLIT_SCHEDULES
from ..workload import Workload
from .activations import Setting, layer_types
from .activations.portfolio import Names, keep_sets
from .pins import Pins
from .quality import LOW_COMPUTE, is_allowed
from .space import everything

SEARCHED_MODES = ("none", "selective", "full")
"""Recompute modes that every executor runs; others are predicted when pinned."""
SEARCHED_OFFLOADS = (0.5, 1.0)
"""Fractions of a layer's saved activations that may wait on the host."""
MOST_SETS = 5
"""Sets of tensors to keep."""
MOST_GROUPS = 4
"""Groups of unlike layers up to which their frontiers are worked out."""


def policies(
    model: Model,
    pools: Sequence[Pool],
    workload: Workload,
    base: Options,
    pins: Pins,
    sets: Sequence[Names],
) -> tuple[Options, ...]:
    """The options of a layer, the plainest first; `sets` are the tensors worth keeping."""
    all_of_it = everything(pools, pins)
    modes = SEARCHED_MODES if pins.recompute is None else (pins.recompute,)
    on_gpus = all(pool.device.kind == "gpu" for pool in pools)
    if pins.recompute is None and on_gpus and base.attention.startswith("flash"):
        modes = ("none", "full")  # a flash kernel keeps nothing that is worth running it twice
    if base.activations is not None:  # full recompute keeps nothing to be stored in another dtype
        modes = tuple(mode for mode in modes if mode != "full") or modes
    offload = pins.offload or 0.0
    found = [replace(base, recompute=mode, offload=offload) for mode in modes]
    if pins.recompute is None and base.activations is None and all_of_it:
        some = [replace(base, recompute=TENSORS, keep=keep, offload=offload) for keep in sets]
        found[1:1] = some
    plain = replace(base, recompute="none")
    moved = pins.offload is None and "none" in modes and on_gpus
    low = base.activations is not None or base.compute in LOW_COMPUTE
    moved = moved and (all_of_it or (not low and all(x.is_plain for x in model.layers)))
    if moved and all(pool.host for pool in pools):
        found += [replace(plain, offload=fraction) for fraction in SEARCHED_OFFLOADS]
    stores = on_gpus and _may_store(model, base, runs=not all_of_it)
    if "none" in modes and stores and is_allowed(workload, "storage", "activations fp8"):
        stored = [replace(x, activations="fp8") for x in found if x.recompute == "none"]
        fractions = (offload, 1.0) if all_of_it else (0.0,)
        found += [x for x in stored if x.offload in fractions]
    return tuple(dict.fromkeys(found))


def _may_store(model: Model, base: Options, runs: bool) -> bool:
    """Whether activations may be stored in fp8 where the pins leave them as they are; `runs` where
    executors must be able to.

    Not those of a user's module, nor beside torchao's linears below 16 bits, which keep their
    16-bit inputs.
    """
    if model.traced is not None or base.activations is not None:
        return False
    if base.compute in LOW_COMPUTE and base.recipe != "coat":
        return False
    return not runs or all(x.mlp in EXECUTED and x.is_plain for x in model.layers)


def policies_under(
    layout: Layouts, found: Sequence[Options], pools: Sequence[Pool], pins: Pins
) -> tuple[Options, ...]:
    """Those of the policies that go with one layout: where plans are made to be run here, layers
    that store in 8 bits have no backward that can be split."""
    if everything(pools, pins) or SCHEDULES[int(layout.schedule[0])] not in SPLIT_SCHEDULES:
        return tuple(found)
    stored = [own for own in found if own.activations is not None]
    return tuple(own for own in found if own not in stored) or tuple(found)


def sets_worth_keeping(
    model: Model, cluster: Cluster, workload: Workload, grid: Layouts, base: Options
) -> tuple[Names, ...]:
    """Tensors of a layer to keep, as `portfolio` finds them under a few layouts of a grid."""
    if model.traced is not None or len(model.layers) > MOST_GROUPS or not len(grid):
        return ()
    pool = cluster.pools[0]
    prices = Prices(pool, cluster.profile, min(cluster.num_devices, pool.devices_per_node))
    counts = [layer.repeat for layer in model.layers]
    settings = [
        Setting(
            model=model,
            layouts=grid.take(np.array([row])),
            seq_tokens=workload.seq_tokens,
            prices=prices,
            options=base,
        )
        for row in _typical(grid)
    ]
    return keep_sets([layer_types(setting, counts) for setting in settings], MOST_SETS)


def _typical(grid: Layouts) -> list[int]:
    """Rows with the least, a middle and the largest tp, a usual micro-batch each."""
    degrees = np.unique(grid.tp)
    rows: list[int] = []
    for tp in sorted({int(degrees[0]), int(degrees[len(degrees) // 2]), int(degrees[-1])}):
        here = np.flatnonzero(grid.tp == tp)
        split = here[grid.sequence_parallel[here] == (tp > 1)]
        here = split if len(split) else here
        order = np.lexsort((here, grid.micro_batch_seqs[here], grid.cp[here]))
        usual = order[: max(1, int(np.sum(grid.cp[here] == grid.cp[here].min())))]
        rows.append(int(here[usual[len(usual) // 2]]))
    return rows
