"""The grid: every layout that the search looks at, as NumPy columns.

A layout is one row: micro-batch, replicas and shards, tp, pp, vpp, ZeRO stage, sequence and context
parallelism, expert parallelism and schedule. Rows are made by products of the options of each axis,
never one by one, and rows that break a rule of `forerun.layout_rules.layout_problems` are gone
before anything is priced. What layers keep for backward and how layers are cut into stages is no
column: the bounds choose it (`keeping.py`, `cutting.py`).

Where an axis is free, rows that would run exactly like another row are left out:
- zero > 0 with one replica shards nothing;
- pipelines gather and scatter once per step whatever the stage, so that zero 2 and 3 equal zero 1;
- with one micro-batch, gradients are reduced once either way: zero 2 equals zero 1.
Limits of the space itself: a free tp stays within a node, a free vpp takes the smallest value for
each size of the largest chunk, a free cp leaves every rank 2,048 tokens or more, is a power of two
and a balanced ring, an exchange of heads, or, over several nodes, a ring of the largest exchanges
that lie within one, a free ep is whole on its node or takes whole nodes, replicas train apart
only where they are whole nodes and the workload allows it (`apart.py`), and a free ZeRO stage
below 3 shards over all replicas or over those of one node. On CPUs, whose plans run here, cp beside
experts and latent attention is off unless it is asked for, since no executor has it; so is offload,
since the host of a CPU is the CPU.

Of several pools each holds the next stages of the pipeline, in either order (`routes`): the ranks
of a stage divide the devices of every pool, and chunks of models with unlike layers are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations
from math import gcd
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..cluster import Cluster, Pool
from ..costmodel.layout import Ints, Layouts
from ..costmodel.options import Options
from ..costmodel.packing import Packing
from ..costmodel.techniques import halo
from ..costmodel.techniques.precision import BY_SHAPE, LOW_PRECISION
from ..errors import InputError
from ..model import Model
from ..schedules import SCHEDULES
from ..workload import Workload
from .apart import may_be_apart, with_rows_apart
from .legal_rows import GPIPE, LOOPED, SPLIT, V_SHAPED, even_experts, legal, rotatable
from .pins import Pins, pinned_options, recipe_of

ONE_F_ONE_B = SCHEDULES.index("1f1b")
INTERLEAVED = SCHEDULES.index("interleaved")


def only_pool(cluster: Cluster) -> Pool:
    """The single pool of a cluster of equal nodes."""
    first, *others = cluster.pools
    if others:
        raise InputError("gpus", cluster.name, "pools of unlike devices are not available here",
                         "give one kind of node")  # fmt: skip
    return first


def routes(cluster: Cluster) -> list[Cluster]:
    """The cluster with its pools in every order in which pipelines may go through them."""
    if len(cluster.pools) == 1:
        return [cluster]
    for pool in cluster.pools:
        if pool.device.kind == "cpu":
            raise InputError("gpus", cluster.name, "CPU processes are a pool of their own",
                             "give pools of GPUs, or one of CPUs")  # fmt: skip
    if len(cluster.pools) > MOST_POOLS:
        raise InputError("gpus", cluster.name, f"has {len(cluster.pools)} pools",
                         f"give {MOST_POOLS} at most")  # fmt: skip
    return [msgspec.structs.replace(cluster, pools=order) for order in permutations(cluster.pools)]


def everything(pools: Sequence[Pool], pins: Pins) -> bool:
    """Whether free axes take what is predicted but not executed yet, too: never on CPUs, whose
    plans are made to be run here."""
    return all(pool.device.kind == "gpu" for pool in pools) and not pins.run_only


def compute_dtype(pools: Sequence[Pool], pins: Pins) -> str:
    """The compute dtype: the pinned one; else bf16 on GPUs that have it, or fp32."""
    if pins.precision is not None:
        return pins.precision
    has_bf16 = all(
        pool.device.kind == "gpu" and "bf16" in pool.device.peak_flops_per_s for pool in pools
    )
    return "bf16" if has_bf16 else "fp32"


MOST_POOLS = 4
"""Pools of a cluster: all their orders are looked at."""
CP_TOKENS = 2048
"""Tokens that a free cp leaves on a rank at least: below, a ring sends more than it computes."""


def base_options(pools: Sequence[Pool], workload: Workload, pins: Pins) -> Options:
    """What every layer of a plan does, whatever the search chooses."""
    compute, recipe = compute_dtype(pools, pins), recipe_of(pins)
    return replace(
        pinned_options(pins, compute),
        linears=BY_SHAPE if compute in LOW_PRECISION and recipe not in halo.LEVELS else None,
        optimizer=workload.optimizer,
        balance_loss=workload.balance_loss,
        clips=workload.clip_norm is not None,
        packing=Packing.of(workload),
    )


def enumerate_grid(model: Model, cluster: Cluster, workload: Workload, pins: Pins) -> Layouts:
    """Every legal layout that agrees with the pins, in a fixed order; may be empty."""
    pools, world = cluster.pools, cluster.num_devices
    per_node = gcd(*(pool.devices_per_node for pool in pools))
    blocks = [_empty()]
    for tp in _free_or(pins.tp, [n for n in divisors(world) if per_node % n == 0]):
        for pp in _free_or(pins.pp, divisors(world)):
            if pp > model.num_layers or any(pool.num_devices * pp % world for pool in pools):
                continue
            for cp, ulysses in _contexts(model, pools, workload, pins, tp):
                dp, rest = divmod(world, tp * pp * cp)
                if rest or pins.dp not in (None, dp) or workload.global_batch_seqs % max(dp, 1):
                    continue
                shape = _Shape(tp=tp, pp=pp, cp=cp, ulysses=ulysses, dp=dp)
                blocks.append(_block(model, pools, workload, pins, shape))
    columns = (field.name for field in fields(Layouts))
    grid = Layouts(**{c: np.concatenate([getattr(block, c) for block in blocks]) for c in columns})
    if may_be_apart(model, pools, workload, pins):
        grid = with_rows_apart(grid, pools, pins)
    ok = legal(model, grid, workload.seq_tokens)
    if recipe_of(pins) in halo.LEVELS:
        ok &= rotatable(model, grid, workload.seq_tokens, recipe_of(pins))
    if isinstance(pins.stages, tuple):
        ok &= grid.pp * grid.vpp == len(pins.stages)
    if len(pools) > 1 and len(model.layers) > 1:
        ok &= grid.vpp == 1
    if not everything(pools, pins):
        even = ok & even_experts(model, grid)
        ok = even if even.any() else ok  # a run says what is wrong with what the pins ask for
    rows = np.flatnonzero(ok)
    # Fewer chunks first: ties go to the simpler layout.
    return grid.take(rows[np.argsort(grid.vpp[rows], kind="stable")])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """The degrees that a block of rows shares."""

    tp: int
    pp: int
    cp: int
    ulysses: int
    dp: int


def _contexts(
    model: Model, pools: Sequence[Pool], workload: Workload, pins: Pins, tp: int
) -> list[tuple[int, int]]:
    """Pairs (cp, ulysses)."""
    shortest = min(model.lengths(workload.seq_tokens), default=0)
    free = [1]
    shares = all(layer.is_plain for layer in model.layers) or everything(pools, pins)
    if model.traced is None and shares:
        most = min(pool.num_devices for pool in pools)
        free = [n for n in _powers(most) if n == 1 or shortest // n >= CP_TOKENS]
    pairs: list[tuple[int, int]] = []
    for cp in _free_or(pins.cp, free):
        inside = max(1, gcd(*(pool.devices_per_node for pool in pools)) // tp)
        hybrids = [n for n in _powers(min(cp, inside)) if 1 < n < cp and cp % n == 0]
        paired = [1] if cp % 2 == 0 else []
        kinds = {
            "zigzag": [1], "ring": [1], "lightseq": paired, "ulysses": [cp], "usp": hybrids
        }  # fmt: skip
        mixed = hybrids[-1:] if cp > inside else []
        ways = kinds[pins.cp_kind] if pins.cp_kind else [1, *mixed, cp]
        if cp == 1:
            ways = [1]
        pairs += [(cp, ulysses) for ulysses in dict.fromkeys(ways)]
    return pairs


def _experts(model: Model, pools: Sequence[Pool], pins: Pins, shape: _Shape) -> list[int]:
    """Degrees of expert parallelism."""
    counts = {layer.experts.num_experts for layer in model.layers if layer.experts is not None}
    if pins.ep is not None:
        return [pins.ep]
    if not counts:
        return [1]
    holders = shape.dp * shape.cp * shape.tp
    per_node = gcd(*(pool.devices_per_node for pool in pools))
    return [
        n
        for n in divisors(holders)
        if all(count % n == 0 for count in counts) and (per_node % n == 0 or n % per_node == 0)
    ]


def _block(
    model: Model, pools: Sequence[Pool], workload: Workload, pins: Pins, shape: _Shape
) -> Layouts:
    """The product of the options of the other axes; pins applied, rules not."""
    tp, pp, dp = shape.tp, shape.pp, shape.dp
    replica_seqs = workload.global_batch_seqs // dp
    micro_batches = [
        n for n in divisors(replica_seqs) if pins.micro_batch is None or n == pins.micro_batch
    ]
    sp_options = _free_or(pins.sp, [0, 1] if tp > 1 else [0])
    in_8_bits = pins.activations is not None or pins.precision in LOW_PRECISION
    whole_backward = in_8_bits and not everything(pools, pins)
    schedules = _schedules(model.num_layers, pins, pp, whole_backward)
    per_node = gcd(*(pool.devices_per_node for pool in pools))
    shards = _shards(pins, pp, dp, max(1, per_node // (tp * shape.cp)))
    experts = _experts(model, pools, pins, shape)
    axes = (micro_batches, sp_options, schedules, shards, experts)
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
        cp=np.full_like(micro, shape.cp),
        ulysses=np.full_like(micro, shape.ulysses),
        ep=_column(experts, at[4]),
    )
    return grid if pins.zero is not None else grid.take(np.flatnonzero((zero != 2) | (count > 1)))


def _schedules(num_layers: int, pins: Pins, pp: int, whole_backward: bool) -> list[tuple[int, int]]:
    """Pairs (schedule, vpp) of a pipeline of pp ranks; one rank has no schedule of its own.

    `whole_backward` says that layers do not split theirs; a pinned schedule is taken as it is.
    """
    if pp == 1:
        kind = ONE_F_ONE_B if pins.schedule is None else SCHEDULES.index(pins.schedule)
        pairs = [(kind, 1)]
    else:
        chunks = _chunk_counts(num_layers, pp) if pins.vpp is None else [pins.vpp]
        if isinstance(pins.stages, tuple):
            chunks = [len(pins.stages) // pp] if pins.vpp is None else chunks
        pairs = [(ONE_F_ONE_B, 1), (GPIPE, 1), *((INTERLEAVED, n) for n in chunks if n > 1)]
        if not whole_backward or pins.schedule is not None:
            pairs += [(kind, n) for kind in SPLIT for n in _chunks_of_split(kind, chunks)]
    return [
        (kind, vpp)
        for kind, vpp in pairs
        if pins.schedule in (None, SCHEDULES[kind]) and pins.vpp in (None, vpp)
    ]


def _chunks_of_split(kind: int, chunks: Sequence[int]) -> list[int]:
    """The chunks per rank that a zero-bubble schedule may have."""
    if kind in LOOPED:
        return [n for n in chunks if n > 1]
    return [2 if kind in V_SHAPED else 1]


def _chunk_counts(num_layers: int, pp: int) -> list[int]:
    """The smallest vpp for each size of the largest chunk.

    >>> _chunk_counts(32, 4)
    [1, 2, 3, 4, 8]
    """
    smallest: dict[int, int] = {}
    for vpp in range(1, num_layers // pp + 1):
        smallest.setdefault(-(-num_layers // (pp * vpp)), vpp)
    return sorted(smallest.values())


def _shards(pins: Pins, pp: int, dp: int, near: int) -> list[tuple[int, int]]:
    """Pairs (zero, dp_shard) over dp replicas, `near` of which share a node."""
    sharded = [n for n in divisors(dp) if n > 1]
    if pins.zero is None:
        pairs = [(0, 1)]
        for zero in (1,) if pp > 1 else (1, 2, 3):
            pairs += [(zero, n) for n in sharded if zero == 3 or n == dp or n <= near]
    elif pins.zero == 0:
        pairs = [(0, 1)]
    else:
        pairs = [(pins.zero, n) for n in (sharded or [1])]
    return [pair for pair in pairs if pins.dp_shard in (None, pair[1])]


def ordinary(grid: Layouts) -> NDArray[np.bool_]:
    """True for the layouts that people try first: a small part of the grid in which a good one is
    found soon. States are sharded over all replicas, sequences split beside tp, cp is one ring."""
    sharded = np.where(grid.pp > 1, grid.zero == 1, grid.zero == 3) & (grid.dp_shard == grid.dp)
    whole = (grid.dp == 1) & (grid.zero == 0)
    split = (grid.sequence_parallel == 1) == (grid.tp > 1)
    return (sharded | whole) & split & (grid.ulysses == 1) & (grid.vpp <= 4)


def divisors(number: int) -> list[int]:
    """Divisors in ascending order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _powers(most: int) -> list[int]:
    """Powers of two up to `most`."""
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def _free_or(pin: int | None, options: list[int]) -> list[int]:
    return options if pin is None else [int(pin)]


def _column(options: Any, at: Ints) -> Ints:
    return np.asarray(options, dtype=np.int64)[at]


def _empty() -> Layouts:
    return Layouts(**{field.name: np.zeros(0, dtype=np.int64) for field in fields(Layouts)})
