"""FSDP's copies of parameters in the dtype of use, and the buffers of its collectives, by moment.

ZeRO 3 without pipeline holds the rest of the piece (embedding, head) for the whole step and streams
the layers: the current one and the one fetched ahead. Other FSDP modes hold every unit for the
whole step, and so does a stack that does not free units after use; one may free copies of
parameters that are not sharded too. Stacks that keep parameters
whole use them where they lie, up to ZeRO 2; their ZeRO 3 gathers and scatters by buckets of
elements, whatever the size of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..stack import Stack
from .graph import Array
from .layout import Layouts
from .options import Options
from .pieces import Pieces
from .stages import Load
from .state_bytes import StateBytes, in_units
from .states import Counts, Divisors

LIVE_ELEMENTS = 1e9
"""Parameters gathered at most at a time by bucket: default of DeepSpeed's stage 3
(`stage3_max_live_parameters`)."""
BUCKET_ELEMENTS = 5e8
"""Gradients reduced at a time: its default `reduce_bucket_size`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkingCopies:
    """Bytes of one rank."""

    at_head: Array
    at_layer: Array
    fetched: Array
    """The flat buffer of the last layer, fetched ahead during the head's backward."""
    fetched_at_layer: Array
    on_wire: Array
    """The flat input of the scatter of the layer before, where collectives run beside compute."""
    scattered: Array
    """A layer's gradients and the scatter's flat input."""
    gradient_bytes: Array
    """Of one gradient element as it is made."""
    shard: Array
    """Ranks over which gradients at rest are divided."""

    @staticmethod
    def of(
        load: Load, costs: Pieces, layouts: Layouts, options: Options, stack: Stack
    ) -> WorkingCopies:
        """The copies of one rank."""
        if stack.sharding == "megatron":
            return _by_bucket(load, costs, layouts, options, stack)
        states = StateBytes.of(stack, options)
        units = in_units(layouts, options, stack)
        layer, gradients = np.zeros(1), np.zeros(1)
        for count, piece in zip(load.layers, costs.layers, strict=True):
            counts = Counts.of_layer(piece)
            used, made = counts.used_bytes(states), counts.with_gradient
            layer = np.maximum(layer, np.where(count > 0, used, 0.0))
            gradients = np.maximum(gradients, np.where(count > 0, made, 0.0))
        rest = load.rest_params(costs) * states.used
        everything = Counts.of(load, costs).used_bytes(states)
        streams = (layouts.zero == 3) & (layouts.pp == 1)
        refetches = streams & stack.reshards
        frees = refetches | ((layouts.zero == 0) & stack.frees_copies)
        more = np.where(load.num_layers > 1, layer, 0.0)
        at_layer = np.where(frees, np.minimum(rest + layer, everything), everything)
        at_head = np.where(frees, rest, everything)
        scattered = gradients * (states.used + stack.reduce_bytes)
        beside = units & streams & stack.can_overlap
        return WorkingCopies(
            at_head=np.where(units, at_head, 0.0),
            at_layer=np.where(units, at_layer, 0.0),
            fetched=np.where(units & refetches, layer, 0.0),
            fetched_at_layer=np.where(units & refetches, more, 0.0),
            on_wire=np.where(beside, gradients * stack.reduce_bytes, 0.0),
            scattered=np.where(units, scattered, 0.0),
            gradient_bytes=np.where(units, states.used, states.gradient),
            shard=np.where(units, Divisors.of(stack, layouts).gradients, 1.0),
        )


def _by_bucket(
    load: Load, costs: Pieces, layouts: Layouts, options: Options, stack: Stack
) -> WorkingCopies:
    """Copies of a stack that keeps parameters whole up to ZeRO 2."""
    states = StateBytes.of(stack, options)
    counts = Counts.of(load, costs)
    gathers = in_units(layouts, options, stack)
    live = np.minimum(counts.used_bytes(states), LIVE_ELEMENTS * states.used)
    bucket = np.minimum(counts.with_gradient, BUCKET_ELEMENTS) * stack.reduce_bytes
    live, bucket = np.where(gathers, live, 0.0), np.where(gathers, bucket, 0.0)
    none = 0.0 * live
    return WorkingCopies(
        at_head=live,
        at_layer=live,
        fetched=none,
        fetched_at_layer=bucket,
        on_wire=none,
        scattered=bucket,
        gradient_bytes=none + states.gradient,
        shard=none + 1.0,
    )
