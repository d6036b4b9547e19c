"""The grid: every layout that the search looks at, as NumPy columns.

A layout is one row: micro-batch, replicas and shards, tp, pp, vpp, ZeRO stage, sequence parallelism
and schedule. Rows are made by products of the options of each axis, never one by one, and rows that
break a rule of `forerun.plan.layout_problems` are gone before anything is priced. Recompute and
compute dtype are not columns: each pair of them is one pass over the whole grid.

Where an axis is free, rows that would run exactly like another row are left out:
- zero > 0 with one replica shards nothing;
- pipelines gather and scatter once per step whatever the stage, so that zero 2 and 3 equal zero 1;
- with one micro-batch, gradients are reduced once either way: zero 2 equals zero 1.
Two limits of the space itself: a free tp stays within a node, and a free vpp takes the smallest
value for each size of the largest chunk.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..cluster import Cluster, Pool
from ..costmodel.layout import Ints, Layouts
from ..errors import InputError
from ..mesh import Mesh
from ..model import Model
from ..plan import (
    SCHEDULES,
    Phase,
    Plan,
    Schedule,
    Setting,
    even_stages,
    techniques,
)
from ..workload import Workload
from .pins import Pins

GPIPE = SCHEDULES.index("gpipe")
ONE_F_ONE_B = SCHEDULES.index("1f1b")
INTERLEAVED = SCHEDULES.index("interleaved")


def only_pool(cluster: Cluster) -> Pool:
    """The single pool of a cluster of equal nodes."""
    first, *others = cluster.pools
    if others:
        raise InputError("gpus", cluster.name, "pools of unlike devices are not available yet",
                         "give one kind of node")  # fmt: skip
    return first


def compute_dtypes(pool: Pool, pins: Pins) -> tuple[str, ...]:
    """The compute dtypes of the search: the pinned one; else bf16 on GPUs that have it, or fp32."""
    if pins.precision is not None:
        return (pins.precision,)
    has_bf16 = pool.device.kind == "gpu" and "bf16" in pool.device.peak_flops_per_s
    return ("bf16",) if has_bf16 else ("fp32",)


SEARCHED_MODES = ("none", "selective", "full")
"""Recompute modes that every executor runs; others are predicted when pinned."""


def recompute_modes(pins: Pins) -> tuple[str, ...]:
    """The recompute modes of the search."""
    return SEARCHED_MODES if pins.recompute is None else (pins.recompute,)


def enumerate_grid(model: Model, cluster: Cluster, workload: Workload, pins: Pins) -> Layouts:
    """Every legal layout that agrees with the pins, in a fixed order; may be empty."""
    pool, world = only_pool(cluster), cluster.num_devices
    blocks = [_empty()]
    for tp in _free_or(pins.tp, [n for n in divisors(world) if pool.devices_per_node % n == 0]):
        for pp in _free_or(pins.pp, divisors(world)):
            dp, rest = divmod(world, tp * pp)
            if rest or pins.dp not in (None, dp) or workload.global_batch_seqs % max(dp, 1):
                continue
            if pp <= model.num_layers:
                blocks.append(_block(model, workload, pins, tp, pp, dp))
    columns = (field.name for field in fields(Layouts))
    grid = Layouts(**{c: np.concatenate([getattr(block, c) for block in blocks]) for c in columns})
    rows = np.flatnonzero(legal(model, grid, workload.seq_tokens))
    # Fewer chunks first: blocks of equal vpp are cheap to bound, and ties go to the simpler layout.
    return grid.take(rows[np.argsort(grid.vpp[rows], kind="stable")])


def _block(model: Model, workload: Workload, pins: Pins, tp: int, pp: int, dp: int) -> Layouts:
    """The product of the options of the other axes at one (tp, pp, dp); pins applied, rules not."""
    replica_seqs = workload.global_batch_seqs // dp
    micro_batches = [
        n for n in divisors(replica_seqs) if pins.micro_batch is None or n == pins.micro_batch
    ]
    sp_options = _free_or(pins.sp, [0, 1] if tp > 1 else [0])
    schedules = _schedules(model.num_layers, pins, pp)
    shards = _shards(pins, pp, dp)
    axes = (micro_batches, sp_options, schedules, shards)
    if not all(axes):
        return _empty()
    at = np.indices([len(axis) for axis in axes]).reshape(len(axes), -1)
    micro, sp = _column(micro_batches, at[0]), _column(sp_options, at[1])
    schedule, vpp = (_column(column, at[2]) for column in zip(*schedules, strict=True))
    zero, dp_shard = (_column(column, at[3]) for column in zip(*shards, strict=True))
    count = replica_seqs // micro
    grid = Layouts(
        micro_batch_seqs=micro,
        num_microbatches=count,
        dp_replicate=dp // dp_shard,
        dp_shard=dp_shard,
        tp=np.full_like(micro, tp),
        pp=np.full_like(micro, pp),
        vpp=vpp,
        zero=zero,
        sequence_parallel=sp,
        schedule=schedule,
        cp=np.ones_like(micro),
        ulysses=np.ones_like(micro),
        ep=np.ones_like(micro),
    )
    return grid if pins.zero is not None else grid.take(np.flatnonzero((zero != 2) | (count > 1)))


def _schedules(num_layers: int, pins: Pins, pp: int) -> list[tuple[int, int]]:
    """Pairs (schedule, vpp) of a pipeline of pp ranks; one rank has no schedule of its own."""
    if pp == 1:
        kind = ONE_F_ONE_B if pins.schedule is None else SCHEDULES.index(pins.schedule)
        pairs = [(kind, 1)]
    else:
        chunks = _chunk_counts(num_layers, pp) if pins.vpp is None else [pins.vpp]
        pairs = [(ONE_F_ONE_B, 1), (GPIPE, 1), *((INTERLEAVED, n) for n in chunks if n > 1)]
    return [
        (kind, vpp)
        for kind, vpp in pairs
        if pins.schedule in (None, SCHEDULES[kind]) and pins.vpp in (None, vpp)
    ]


def _chunk_counts(num_layers: int, pp: int) -> list[int]:
    """The smallest vpp for each size of the largest chunk.

    >>> _chunk_counts(32, 4)
    [1, 2, 3, 4, 8]
    """
    smallest: dict[int, int] = {}
    for vpp in range(1, num_layers // pp + 1):
        smallest.setdefault(-(-num_layers // (pp * vpp)), vpp)
    return sorted(smallest.values())


def _shards(pins: Pins, pp: int, dp: int) -> list[tuple[int, int]]:
    """Pairs (zero, dp_shard) over dp replicas."""
    sharded = [n for n in divisors(dp) if n > 1]
    if pins.zero is None:
        pairs = [(0, 1), *((zero, n) for zero in ((1,) if pp > 1 else (1, 2, 3)) for n in sharded)]
    elif pins.zero == 0:
        pairs = [(0, 1)]
    else:
        pairs = [(pins.zero, n) for n in (sharded or [1])]
    return [pair for pair in pairs if pins.dp_shard in (None, pair[1])]


def legal(model: Model, grid: Layouts, seq_tokens: int) -> NDArray[np.bool_]:
    """True where a row breaks no rule of `forerun.plan.layout_problems` (cp = ep = 1)."""
    widths = {model.vocab}
    for layer in model.layers:
        widths |= {layer.heads, layer.kv_heads, *layer.mlp_widths}
    ok = np.ones(len(grid), dtype=bool)
    for width in sorted(widths):
        ok &= width % grid.tp == 0
    sp, pipeline = grid.sequence_parallel == 1, grid.pp > 1
    interleaved = grid.schedule == INTERLEAVED
    ok &= ~sp | (grid.tp > 1)
    for tokens in model.lengths(seq_tokens):
        ok &= ~sp | (tokens % grid.tp == 0)
    if any(layer.kind == "conv" for layer in model.layers):
        ok &= grid.tp == 1
    ok &= grid.pp * grid.vpp <= model.num_layers
    ok &= (grid.vpp == 1) | (pipeline & interleaved)
    ok &= ~(interleaved & pipeline) | ((grid.vpp > 1) & (grid.num_microbatches % grid.pp == 0))
    ok &= ~pipeline | (grid.schedule == GPIPE) | (grid.num_microbatches >= grid.pp)
    return ok & ((grid.dp_shard == 1) | (grid.zero > 0))


def plan_at(
    model: Model, cluster: Cluster, workload: Workload, grid: Layouts, row: int,
    compute: str, recompute: str,
) -> Plan:  # fmt: skip
    """One row of the grid as a complete plan."""
    mesh = Mesh(
        dp_replicate=int(grid.dp_replicate[row]),
        dp_shard=int(grid.dp_shard[row]),
        tp=int(grid.tp[row]),
        pp=int(grid.pp[row]),
        vpp=int(grid.vpp[row]),
    )
    layers = (0, model.num_layers - 1)
    phase = Phase(
        steps=workload.steps,
        seq_tokens=workload.seq_tokens,
        micro_batch_seqs=int(grid.micro_batch_seqs[row]),
        num_microbatches=int(grid.num_microbatches[row]),
        mesh=mesh,
        zero=cast("Any", int(grid.zero[row])),
        sequence_parallel=bool(grid.sequence_parallel[row]),
        schedule=cast("Schedule", SCHEDULES[int(grid.schedule[row])]),
        stages=even_stages(model.num_layers, mesh.num_stages, only_pool(cluster).name),
        settings=(Setting(layers=layers, techniques=techniques(compute, recompute)),),
    )
    return Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))


def divisors(number: int) -> list[int]:
    """Divisors in ascending order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _free_or(pin: int | None, options: list[int]) -> list[int]:
    return options if pin is None else [int(pin)]


def _column(options: Any, at: Ints) -> Ints:
    return np.asarray(options, dtype=np.int64)[at]


def _empty() -> Layouts:
    return Layouts(**{field.name: np.zeros(0, dtype=np.int64) for field in fields(Layouts)})
