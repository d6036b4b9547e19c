"""Gradient traffic where parameters stay whole on every rank: the DDP and distributed optimiser of
Megatron-like stacks.

    ZeRO 0    1 all-reduce of all gradients
    ZeRO 1+   1 reduce-scatter of all gradients, 1 all-gather of all 16-bit parameters

once per step, dense parameters over the ranks of dp and cp, those of experts over the ranks that
hold the same experts. Buckets may start while the last backward runs; what a stack leaves exposed
is its `data_parallel_multiplier`.
"""

from __future__ import annotations

import numpy as np

from ..cluster import DTYPE_BYTES
from .graph import Array
from .layout import Layouts
from .options import Options
from .pieces import Pieces
from .prices import Prices
from .sharing import SharingGroup
from .stages import Load


def exchange_s(
    load: Load, costs: Pieces, layouts: Layouts, prices: Prices, options: Options
) -> Array:
    """Exposed seconds per step of one pipeline rank."""
    stack = prices.pool.stack
    seconds = np.zeros(1)
    for params, group in _exchanged(load, costs, layouts):
        ranks = group.ranks
        if not np.any((params > 0) & (ranks > 1)):
            continue
        groups = layouts.world / ranks
        reduced = params * stack.reduce_bytes
        gathered = params * DTYPE_BYTES[options.tensor_dtype]
        whole = prices.collective("all_reduce", reduced, ranks, group.stride, groups)
        parts = prices.collective("reduce_scatter", reduced, ranks, group.stride, groups)
        parts = parts + prices.collective("all_gather", gathered, ranks, group.stride, groups)
        latency = stack.collective_latency_s * np.log2(np.maximum(ranks, 1.0))
        moved = np.where(layouts.zero > 0, parts, whole) + latency
        seconds = seconds + np.where((params > 0) & (ranks > 1), moved, 0.0)
    sharded = stack.distributed_optimizer_multiplier
    plain = stack.data_parallel_multiplier
    return seconds * np.where(layouts.zero > 0, plain if sharded is None else sharded, plain)


def wire_bytes(
    load: Load, costs: Pieces, layouts: Layouts, options: Options, reduce_bytes: float
) -> dict[str, Array]:
    """Bytes handed to each collective per step and rank."""
    params = np.zeros(1)
    for kind, group in _exchanged(load, costs, layouts):
        params = params + np.where(group.ranks > 1, kind, 0.0)
    sharded = layouts.zero > 0
    return {
        "all_reduce@dp": np.where(sharded, 0.0, params * reduce_bytes),
        "reduce_scatter@dp": np.where(sharded, params * reduce_bytes, 0.0),
        "all_gather@dp": np.where(sharded, params * DTYPE_BYTES[options.tensor_dtype], 0.0),
    }


def _exchanged(
    load: Load, costs: Pieces, layouts: Layouts
) -> tuple[tuple[Array, SharingGroup], ...]:
    """Trained parameters of each kind and the ranks that share them."""
    return (
        (load.trainable_params(costs), SharingGroup.dense(layouts)),
        (load.total(costs, "trainable_expert_params"), SharingGroup.experts(layouts)),
    )
