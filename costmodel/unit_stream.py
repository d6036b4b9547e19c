"""FSDP's units beside compute: how much of gathering and scattering a step feels.

A unit's gather may run while those before it compute, but not arbitrarily far ahead: what is
gathered occupies memory, so that at most `gathers_ahead` units wait beside the one in use. Layers
of a kind follow one another. For n layers of each kind with gather A, forward F and u units ahead

    forward    max(0, sum n max(0, A - F) - (u - 1) A)    beside compute, which it slows down

since each gather has the layer before it to hide behind, and the units beyond the first may have
been gathered during others; never less than what all layers together cannot hide. Backward the same
with A + S, where S is the scatter of gradients, beside the layer's backward. In any case the step
begins with the gather of the rest of the piece (embedding, head), which nothing precedes, and ends
with its scatter, which nothing follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cluster import DTYPE_BYTES
from .graph import Array
from .layout import Layouts
from .options import Options
from .overlap import Moved, felt_s, moved
from .pieces import Piece, Pieces
from .prices import Prices
from .sharing import SharingGroup
from .stages import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What one unit moves."""

    gather: Moved
    scatter: Moved
    across: Moved
    """Over the replicas, after the last micro-batch."""


def units_felt_s(
    load: Load, costs: Pieces, layouts: Layouts, prices: Prices, options: Options
) -> Array:
    """Seconds per step that gathers and scatters of all units add."""
    stack = prices.pool.stack
    m = layouts.num_microbatches.astype(float)
    alone, zero = layouts.pp == 1, layouts.zero
    regathers = (zero == 3) & alone
    rounds = np.where(regathers, m, 1.0)  # of gathers beside a forward
    scatters = np.where((zero >= 2) & alone, m, 1.0)
    rest = _rest(load, costs, layouts, prices, options)
    ends = rest.gather + rest.scatter + rest.across
    more = rest.gather.times(rounds - 1.0) + rest.scatter.times(scatters - 1.0)
    if not stack.can_overlap or not stack.streams_units:
        total = ends + more
        for count, piece in zip(load.layers, costs.layers, strict=True):
            layer = _layer(piece, layouts, prices, options)
            gathers = np.where(regathers, 2 * m, 1.0)
            total = total + layer.gather.times(count * gathers)
            total = total + layer.scatter.times(count * scatters) + layer.across.times(count)
        return total.seconds
    streaming = streaming_share(load, costs)
    there = _Direction(streaming, stack.gathers_ahead, prices)
    back = _Direction(streaming, stack.gathers_ahead, prices)
    for count, piece in zip(load.layers, costs.layers, strict=True):
        layer = _layer(piece, layouts, prices, options)
        forward_s = piece.forward_s + piece.host_forward_s
        there.add(count * rounds, layer.gather, forward_s, rounds)
        again = layer.gather.where(regathers) + layer.scatter
        backward_s = piece.backward_s + piece.recompute_s + piece.host_backward_s
        one_step = layer.across.times(1.0 / scatters)
        back.add(count * scatters, again + one_step, backward_s, scatters)
    # later gathers of the rest run beside the backward before them, its scatters beside the next
    # forward
    window_s = (scatters - 1.0) * load.total(costs, "backward_s")
    return ends.seconds + felt_s(more, window_s, streaming, prices) + there.felt_s + back.felt_s


class _Direction:
    """Layers' communication in one direction, kind after kind."""

    def __init__(self, streaming: Array, ahead: int, prices: Prices) -> None:
        self._streaming, self._ahead, self._prices = streaming, ahead, prices
        self._late, self._slower, self._early = np.zeros(1), np.zeros(1), np.zeros(1)
        self._total, self._window = np.zeros(1), np.zeros(1)

    def add(self, count: Array, unit: Moved, window_s: Array, rounds: Array) -> None:
        """`count` layers in `rounds` passes over them."""
        late = np.maximum(unit.seconds - window_s, 0.0)
        felt = felt_s(unit, window_s, self._streaming, self._prices)
        ahead = (self._ahead - 1) * rounds * unit.seconds
        self._early = np.maximum(self._early, np.where(count > 0, ahead, 0.0))
        self._late = self._late + count * late
        self._slower = self._slower + count * (felt - late)
        self._total = self._total + count * unit.seconds
        self._window = self._window + count * window_s

    @property
    def felt_s(self) -> Array:
        """What the step feels."""
        late = np.maximum(self._late - self._early, self._total - self._window)
        return np.maximum(late, 0.0) + self._slower


def streaming_share(load: Load, costs: Pieces) -> Array:
    """Part of a load's forward and backward that is bound by memory."""
    whole = load.total(costs, "forward_s") + load.total(costs, "backward_s")
    return np.clip(load.total(costs, "streaming_s") / np.maximum(whole, 1e-30), 0.0, 1.0)


def _rest(load: Load, costs: Pieces, layouts: Layouts, prices: Prices, options: Options) -> Unit:
    """The unit of embedding and head."""
    params = load.rest_params(costs)
    trains = load.trainable_params(costs) >= load.params(costs)
    dense = SharingGroup.dense(layouts)
    none = np.zeros(1)
    return _unit(params, np.where(trains, params, 0.0), none, dense, layouts, prices, options)


def _layer(piece: Piece, layouts: Layouts, prices: Prices, options: Options) -> Unit:
    """The unit of one layer: its experts are shared by fewer ranks than the rest."""
    dense, experts = SharingGroup.dense(layouts), SharingGroup.experts(layouts)
    pieces = piece.tensors if prices.pool.stack.unit_by_tensor else 1
    own = (piece.params, piece.trainable_params, piece.spared_bytes)
    one = _unit(*own, dense, layouts, prices, options, pieces, piece.gathered_codes)
    own = (piece.expert_params, piece.trainable_expert_params, piece.spared_expert_bytes)
    two = _unit(*own, experts, layouts, prices, options, pieces)
    return Unit(
        gather=one.gather + two.gather,
        scatter=one.scatter + two.scatter,
        across=one.across + two.across,
    )


def _unit(
    params: Array,
    trained: Array,
    spared_bytes: Array,
    group: SharingGroup,
    layouts: Layouts,
    prices: Prices,
    options: Options,
    pieces: int = 1,
    codes: Array | float = 0.0,
) -> Unit:
    """All-gather of the parameters, `codes` of them in one byte, reduce-scatter of the gradients of
    trained ones, and their all-reduce over the replicas; in so many equal pieces."""
    stack = prices.pool.stack
    dtype = "fp8" if options.gathers_low(stack) else options.tensor_dtype
    reduced = trained * stack.reduce_bytes
    gathered = params * DTYPE_BYTES[dtype] - spared_bytes - codes * (DTYPE_BYTES[dtype] - 1.0)

    def over(kind: str, num_bytes: Array, ranks: Array, stride: Array) -> Moved:
        one = moved(kind, num_bytes / pieces, ranks, stride, layouts.world / ranks, prices)
        times = pieces * stack.unit_multiplier
        return one.times(times) if times != 1.0 else one

    return Unit(
        gather=over("all_gather", gathered, group.shard, group.stride),
        scatter=over("reduce_scatter", reduced, group.shard, group.stride),
        across=over(
            "all_reduce", reduced / group.shard, group.replicate, group.stride * group.shard
        ),
    )
