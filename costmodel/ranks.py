"""What a pipeline rank does once per step besides its micro-batches, and its memory.

One set of formulas for a single plan and for a whole grid: everything is an array over layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .copies import Owned, States, states_off_device
from .data_parallel import DataParallel, data_parallel
from .graph import Array
from .kept import Kept
from .layout import Layouts
from .memory import InFlight, Peak, Peaks, peak_bytes, peak_memory
from .moments import RankMoments
from .optimizers import step_s
from .options import Options
from .pieces import Pieces
from .prices import Prices
from .stages import Load
from .state_bytes import StateBytes
from .states import Counts

IN_LAYER_AXES = ("tp", "cp", "ep", "copy")
"""Mesh axes whose collectives stand between the operators of a layer, and copies to the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one stage (or one rank's chunks together) and one micro-batch."""

    forward_s: Array
    backward_s: Array


def stage_times(load: Load, costs: Pieces, prices: Prices) -> StageTimes:
    """Forward and backward of a load, communication and host time on the critical path included."""
    there, back = load.host_s(costs)
    forward = load.total(costs, "forward_s") + there
    backward = load.total(costs, "backward_s") + load.total(costs, "recompute_s") + back
    for axis in IN_LAYER_AXES:
        there, back = load.communication(costs, axis)
        forward, backward = forward + there, backward + back
    return StageTimes(forward_s=forward, backward_s=backward)


def sent_bytes(boundary_bytes: Array, layouts: Layouts, prices: Prices) -> Array:
    """What one rank hands to the next stage per micro-batch.

    Where tp ranks hold the same activations and the stack scatters them, each sends its part
    (Narayanan et al. 2021, arXiv 2104.04473, section 4.1).
    """
    same = prices.pool.stack.scatters_boundary & (layouts.sequence_parallel == 0)
    return boundary_bytes / np.where(same, layouts.tp, 1)


def hop_s(costs: Pieces, layouts: Layouts, prices: Prices) -> Array:
    """Transfer of one micro-batch's activations between neighbouring pipeline ranks."""
    if np.all(layouts.pp == 1):
        return np.zeros(len(layouts))
    whole = costs.layers[0].boundary_bytes
    part = sent_bytes(whole, layouts, prices)
    replicas = (layouts.dp * layouts.cp * layouts.tp).astype(float)
    sent = prices.collective("p2p", part, np.full(len(layouts), 2.0), replicas, replicas)
    tp = layouts.tp.astype(float)
    joined = prices.collective("all_gather", whole, tp, np.ones(1), layouts.world / tp)
    hop = sent + np.where(part < whole, joined, 0.0)
    return np.where(layouts.pp > 1, hop, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Seconds per step of one rank after and around its micro-batches."""

    dp: DataParallel
    optimizer_s: Array
    """Of the update, and of the gradients' norm and their scaling."""
    host_s: Array
    norm_s: Array
    """The sum of the norm over all ranks."""
    states: States
    """What of the optimiser waits off the device."""

    @property
    def total_s(self) -> Array:
        """All of it."""
        exchange = self.dp.exposed_s + self.dp.host_s + self.dp.forward_s + self.dp.backward_s
        update = self.optimizer_s + self.norm_s + self.states.exposed_s
        return exchange + update + self.host_s

    def each(self, count: int) -> list[Update]:
        """Of `count` ranks that were worked out together, one by one."""
        return [_one(self, index) for index in range(count)]


def _one(value: Any, index: int) -> Any:
    """A rank's part of what holds arrays over ranks, or the same of all of them."""
    if isinstance(value, np.ndarray):
        return value if len(value) == 1 else value[index : index + 1]
    if isinstance(value, dict):
        return {name: _one(part, index) for name, part in value.items()}
    return replace(value, **{f.name: _one(getattr(value, f.name), index) for f in fields(value)})


def update(load: Load, costs: Pieces, layouts: Layouts, prices: Prices, options: Options) -> Update:
    """Gradient exchange, optimiser and fixed host time of one rank."""
    stack = prices.pool.stack
    states = Owned.of(Counts.of(load, costs), layouts, stack)
    owned = states.every
    tensors = sum(
        (count * piece.tensors for count, piece in load.each(costs)),
        np.zeros(1),
    )
    share = StateBytes.of(stack, options).update_share
    backward_s = load.total(costs, "backward_s")
    seconds = step_s(owned, tensors, backward_s, prices, options, share)
    norm_s = np.zeros(1)
    if options.clips:  # the norm reads gradients, scaling reads and writes them
        seconds = seconds + 1.5 * prices.operator("copy", [owned], "fp32")[0]
        world, one = layouts.together.astype(float), np.ones(len(layouts))
        norm_s = np.where(world > 1, prices.collective("all_reduce", 4 * one, world, one, one), 0.0)
    return Update(
        dp=data_parallel(load, costs, layouts, prices, options),
        optimizer_s=seconds * prices.scale("optimizer"),
        host_s=np.full(1, prices.host("step"))
        + layouts.num_microbatches * prices.host("micro_batch"),
        norm_s=norm_s,
        states=states_off_device(states, seconds, layouts, prices, options),
    )


def rank_memory(
    load: Load,
    costs: Pieces,
    layouts: Layouts,
    prices: Prices,
    options: Options,
    in_flight: InFlight,
) -> Peak:
    """Peak memory of one rank, with the device context and allocator waste."""
    stack = prices.pool.stack
    peak = peak_memory(load, costs, layouts, options=options, stack=stack, in_flight=in_flight)
    if prices.pool.device.tensors_only:
        return peak
    context = prices.memory("process_bytes", stack.context_bytes)
    waste = peak.total * prices.fragmentation + stack.runtime_bytes
    return Peak(
        total=peak.total + context + waste,
        terms={**peak.terms, "fragmentation": waste, "context": np.zeros_like(waste) + context},
    )


def rank_bytes(rank: RankMoments, kept: Kept, prices: Prices, in_flight: InFlight) -> Peaks:
    """The total of `rank_memory` under a policy of what layers keep, and what it consists of."""
    peaks = peak_bytes(rank, kept, in_flight)
    grown, fixed = allocated(prices)
    return Peaks(
        total=peaks.total * grown + fixed,
        kept=peaks.kept * grown,
        working=peaks.working * grown + fixed,
        closing=peaks.closing * grown + fixed,
        others=peaks.others,
    )


def allocated(prices: Prices) -> tuple[float, float]:
    """What a device has in use for n bytes of live tensors: a n + b."""
    stack = prices.pool.stack
    if prices.pool.device.tensors_only:
        return 1.0, 0.0
    fixed = prices.memory("process_bytes", stack.context_bytes) + stack.runtime_bytes
    return 1.0 + prices.fragmentation, fixed
