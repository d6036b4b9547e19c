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
from .stages import Load


def exchange_s(
    load: Load, costs: Pieces, layouts: Layouts, prices: Prices, options: Options
) -> Array:
    """Exposed seconds per step of one pipeline rank."""
    stack = prices.pool.stack
    dense = (layouts.dp * layouts.cp).astype(float)
    seconds = np.zeros(1)
    for params, ranks, stride in (
        (load.trainable_params(costs), dense, layouts.tp.astype(float)),
        (
            load.total(costs, "expert_params"),
            dense * layouts.tp / layouts.expert_tp / layouts.ep,
            layouts.expert_tp * layouts.ep * 1.0,
        ),
    ):
        groups = layouts.world / ranks
        reduced = params * stack.reduce_bytes
        gathered = params * DTYPE_BYTES[options.tensor_dtype]
        whole = prices.collective("all_reduce", reduced, ranks, stride, groups)
        parts = prices.collective("reduce_scatter", reduced, ranks, stride, groups)
        parts = parts + prices.collective("all_gather", gathered, ranks, stride, groups)
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
    params = load.trainable_params(costs) + load.total(costs, "expert_params")
    many = layouts.dp * layouts.cp > 1
    sharded = many & (layouts.zero > 0)
    return {
        "all_reduce@dp": np.where(many & ~sharded, params * reduce_bytes, 0.0),
        "reduce_scatter@dp": np.where(sharded, params * reduce_bytes, 0.0),
        "all_gather@dp": np.where(sharded, params * DTYPE_BYTES[options.tensor_dtype], 0.0),
    }
