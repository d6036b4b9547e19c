"""Gradient traffic where parameters stay whole on every rank: the DDP and distributed optimiser of
Megatron-like stacks.

    ZeRO 0    1 all-reduce of all gradients
    ZeRO 1+   1 reduce-scatter of all gradients (or, where a stack does not cut them, 1 all-reduce),
              1 all-gather of all 16-bit parameters

once per step, dense parameters over the ranks of dp and cp, those of experts over the ranks that
hold the same experts. Buckets of gradients may start while the last backward runs, those of
parameters while the next forward does: a stack says beside which part of these (`exchange_overlap`,
0 = afterwards). Many small buckets take longer than one large one: `data_parallel_multiplier`.
"""

from __future__ import annotations

import numpy as np

from ..cluster import DTYPE_BYTES
from ..stack import Stack
from .graph import Array
from .layout import Layouts
from .options import Options
from .overlap import Moved, felt_s, moved
from .pieces import Pieces
from .prices import Prices
from .sharing import SharingGroup
from .stages import Load
from .unit_stream import streaming_share


def exchange_s(
    load: Load, costs: Pieces, layouts: Layouts, prices: Prices, options: Options
) -> Array:
    """Exposed seconds per step of one pipeline rank."""
    stack = prices.pool.stack
    whole, reduce, gather = Moved.none(), Moved.none(), Moved.none()
    for params, group in _exchanged(load, costs, layouts):
        if not np.any((params > 0) & (group.ranks > 1)):
            continue
        reduced = params * stack.reduce_bytes
        gathered = params * DTYPE_BYTES[options.tensor_dtype]
        whole = whole + _over(group, "all_reduce", reduced, layouts, prices)
        reduce = reduce + _over(group, stack.sharded_reduce, reduced, layouts, prices)
        gather = gather + _over(group, "all_gather", gathered, layouts, prices)
    streaming = streaming_share(load, costs)
    backward_s = load.total(costs, "backward_s") + load.total(costs, "recompute_s")
    forward_s = load.total(costs, "forward_s")
    beside, sharded_beside = stack.exchange_overlap, stack.sharded_exchange_overlap
    sharded_beside = beside if sharded_beside is None else sharded_beside
    plain = stack.data_parallel_multiplier
    sharded = stack.distributed_optimizer_multiplier
    sharded = plain if sharded is None else sharded
    replicated_s = felt_s(whole.times(plain), beside * backward_s, streaming, prices)
    sharded_s = felt_s(
        reduce.times(sharded), sharded_beside * backward_s, streaming, prices
    ) + felt_s(gather.times(sharded), sharded_beside * forward_s, streaming, prices)
    return np.where(layouts.zero > 0, sharded_s, replicated_s)


def _over(
    group: SharingGroup, kind: str, num_bytes: Array, layouts: Layouts, prices: Prices
) -> Moved:
    return moved(kind, num_bytes, group.ranks, group.stride, layouts.world / group.ranks, prices)


def wire_bytes(
    load: Load, costs: Pieces, layouts: Layouts, options: Options, stack: Stack
) -> dict[str, Array]:
    """Bytes handed to each collective per step and rank."""
    params = np.zeros(1)
    for kind, group in _exchanged(load, costs, layouts):
        params = params + np.where(group.ranks > 1, kind, 0.0)
    reduced = params * stack.reduce_bytes
    sharded = layouts.zero > 0
    cut = sharded & (stack.sharded_reduce == "reduce_scatter")
    return {
        "all_reduce@dp": np.where(cut, 0.0, reduced),
        "reduce_scatter@dp": np.where(cut, reduced, 0.0),
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
