"""What a pipeline rank does once per step besides its micro-batches, and its memory.

One set of formulas for a single plan and for a whole grid: everything is an array over layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .data_parallel import DataParallel, data_parallel
from .graph import Array
from .layout import Layouts
from .memory import Peak, peak_memory
from .pieces import Pieces
from .prices import Prices
from .stages import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one stage (or one rank's chunks together) and one micro-batch."""

    forward_s: Array
    backward_s: Array


def stage_times(load: Load, costs: Pieces, prices: Prices) -> StageTimes:
    """Forward and backward of a load, communication and host time on the critical path included."""
    return StageTimes(
        forward_s=sum(
            (load.total(costs, n) for n in ("forward_s", "tp_forward_s", "host_forward_s")),
            np.zeros(1),
        ),
        backward_s=sum(
            (
                load.total(costs, n)
                for n in ("backward_s", "recompute_s", "tp_backward_s", "host_backward_s")
            ),
            np.zeros(1),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Seconds per step of one rank after and around its micro-batches."""

    dp: DataParallel
    optimizer_s: Array
    host_s: Array

    @property
    def total_s(self) -> Array:
        """All of it."""
        return (self.dp.exposed_s + self.dp.host_s + self.dp.forward_s + self.dp.backward_s) + (
            self.optimizer_s + self.host_s
        )


def update(load: Load, costs: Pieces, layouts: Layouts, prices: Prices, compute: str) -> Update:
    """Gradient exchange, optimiser and fixed host time of one rank."""
    params = load.params(costs)
    shard = np.where(layouts.zero > 0, layouts.dp_shard, 1).astype(float)
    tensors = sum(
        (count * piece.tensors for count, piece in load.each(costs)),
        np.zeros(1),
    )
    seconds = prices.operator("adamw", [params / shard, np.maximum(tensors, 1.0)], "fp32")[0]
    return Update(
        dp=data_parallel(load, costs, layouts, prices, compute),
        optimizer_s=seconds * prices.scale("optimizer"),
        host_s=np.full(1, prices.host("step"))
        + layouts.num_microbatches * prices.host("micro_batch"),
    )


def rank_memory(
    load: Load,
    costs: Pieces,
    layouts: Layouts,
    prices: Prices,
    compute: str,
    in_flight: tuple[Array, Array],
) -> Peak:
    """Peak memory of one rank, with the device context and allocator waste."""
    peak = peak_memory(
        load,
        costs,
        layouts,
        compute=compute,
        in_flight_first=in_flight[0],
        in_flight_later=in_flight[1],
        chunks=layouts.vpp.astype(float),
    )
    context = prices.memory("process_bytes", prices.pool.stack.context_bytes)
    stack = prices.pool.stack
    waste = peak.total * stack.fragmentation + stack.runtime_bytes
    return Peak(
        total=peak.total + context + waste,
        terms={**peak.terms, "fragmentation": waste, "context": np.zeros_like(waste) + context},
    )
