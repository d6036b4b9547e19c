"""Peak memory of one pipeline rank, by category: the moments at which it can occur, and the
largest.

States at rest are parameters, gradients and the two moments of AdamW, all fp32, divided by the
shard group under ZeRO (1: moments, 2: + gradients, 3: + parameters; here every ZeRO stage keeps
fp32 shards and gathers a working copy in the compute dtype). The moments of a step that can be the
peak are

    head      backward of the loss: everything saved, logits and their gradients
    last      backward of a rank's last layer: everything saved, that layer's working set
    first     backward of its first layer: nothing else saved, all gradients
    update    the optimiser step: all states, no activations

each with the micro-batches in flight of its schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..cluster import DTYPE_BYTES
from ..estimate import MEMORY_TERMS
from .data_parallel import is_sharded
from .graph import Array
from .layout import Layouts
from .pieces import Pieces
from .stages import Load

STATE_BYTES = 4.0
MOMENTS_BYTES = 8.0
REDUCE_BYTES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The largest moment: its terms (bytes), which sum to `total`."""

    total: Array
    terms: dict[str, Array]


def peak_memory(
    load: Load,
    costs: Pieces,
    layouts: Layouts,
    *,
    compute: str,
    in_flight_first: Array,
    in_flight_later: Array,
    chunks: Array,
) -> Peak:
    """Live tensors at the peak of one pipeline rank.

    `load` is all chunks of the rank; `in_flight_*` count live chunk activations at the first
    backward (no gradients yet) and at later ones.
    """
    rest = _rest(load, costs, layouts, compute)
    saved = _saved(load, costs, chunks)
    per_chunk = saved / chunks
    first, later = _gradients(load, costs, layouts, compute)
    moments: list[dict[str, Array]] = []
    for in_flight, grads in ((in_flight_first, first), (in_flight_later, later)):
        others = np.maximum(in_flight - 1.0, 0.0) * per_chunk
        exists = in_flight > 0
        for moment in _moments(load, costs, layouts, compute, per_chunk, grads):
            activations = moment["activations"] + others
            moments.append(
                {
                    name: np.where(exists, value, 0.0)
                    for name, value in {**rest, **moment, "activations": activations}.items()
                }
            )
    moments.append({**rest, "gradients": later.after})
    return _largest(moments)


def _rest(load: Load, costs: Pieces, layouts: Layouts, compute: str) -> dict[str, Array]:
    """Parameters and moments at rest."""
    params = load.params(costs)
    shard = np.where(layouts.zero > 0, layouts.dp_shard, 1).astype(float)
    return {
        "parameters": params * STATE_BYTES / shard,
        "optimizer": params * MOMENTS_BYTES / shard,
    }


def _saved(load: Load, costs: Pieces, chunks: Array) -> Array:
    """Saved activations of one micro-batch through all chunks of the rank.

    A chunk whose output goes to another stage keeps it until its backward.
    """
    sent = (chunks - load.head) * costs.layers[0].boundary_bytes
    total = load.embedding * costs.embedding.live.saved + load.head * costs.head.live.saved
    for count, piece in zip(load.layers, costs.layers, strict=True):
        total = total + count * piece.live.saved
    return total + sent


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gradients:
    """Gradients around one backward (bytes)."""

    before: Array
    """At rest before it, DDP's buckets included."""
    after: Array
    """At rest after it."""
    fresh: Array
    """Whether what it makes stays as it is made, instead of being added or copied away."""


def _gradients(
    load: Load, costs: Pieces, layouts: Layouts, compute: str
) -> tuple[_Gradients, _Gradients]:
    """Gradients around the first backward of a step, and around later ones.

    DDP's buckets are always there, and with several micro-batches the gradients that accumulate
    before the exchange stand beside them; FSDP holds sharded fp32 gradients, and unsharded ones
    while micro-batches accumulate without a scatter.
    """
    full = load.params(costs) * STATE_BYTES
    m = layouts.num_microbatches
    units = is_sharded(layouts, compute)
    shard = np.where(layouts.zero > 0, layouts.dp_shard, 1).astype(float)
    scatter_each = (layouts.zero >= 2) & (layouts.pp == 1)
    buckets = np.where(~units & (layouts.dp > 1), full, 0.0)
    waiting = np.where(units & ~scatter_each & (m > 1), full, full / shard)
    local = np.where(units, waiting, full)
    after = np.where((buckets > 0) & (m == 1), buckets, local + buckets)
    streams = units & scatter_each
    first = _Gradients(before=buckets, after=after, fresh=units | (layouts.dp == 1))
    return first, _Gradients(before=after, after=after, fresh=streams)


def _moments(
    load: Load,
    costs: Pieces,
    layouts: Layouts,
    compute: str,
    per_chunk: Array,
    grads: _Gradients,
) -> list[dict[str, Array]]:
    """The candidate moments of one micro-batch's backward on this rank."""
    copies = _WorkingCopies.of(load, costs, layouts, compute)
    own_head = load.head * costs.head.params
    made_head = np.where(grads.fresh, own_head * copies.gradient_bytes, 0.0)
    result: list[dict[str, Array]] = []
    for count, piece in load.each(costs):
        if piece is costs.embedding:
            continue
        present, own, loss = count > 0, piece.live.saved, piece.live.loss
        is_head = piece is costs.head
        working = np.where(grads.fresh, piece.live.backward_peak_fresh, piece.live.backward_peak)
        below = np.maximum(per_chunk - own * present, 0.0)
        if is_head:
            working = np.maximum(working, piece.live.forward_peak)
        else:  # the head's own activations are gone when the layers' backward starts
            below = np.maximum(below - load.head * costs.head.live.saved, 0.0)
        made = np.maximum(working - own, 0.0)  # by the loss's backward where this is the head
        moment = {
            "activations": below + own - loss,
            "logits_loss": loss + (made if is_head else 0.0),
            "workspace": 0.0 * made if is_head else made,
            "gradients": grads.before + (0.0 if is_head else made_head),
            "gathered_parameters": copies.at_head if is_head else copies.at_layer,
            "comm_buffers": copies.fetched if is_head else copies.fetched_at_layer,
        }
        result.append({name: np.where(present, value, 0.0) for name, value in moment.items()})
    return [*result, _first_layer(load, costs, copies, grads)]


def _first_layer(
    load: Load, costs: Pieces, copies: _WorkingCopies, grads: _Gradients
) -> dict[str, Array]:
    """Backward of the rank's first layer: all other layers' gradients are there.

    Of activations that layer's alone are left; its own gradients and those of the embedding are
    still to be made when nothing is there to add them to.
    """
    saved, working, params = np.zeros(1), np.zeros(1), np.zeros(1)
    for count, piece in zip(load.layers, costs.layers, strict=True):
        live = piece.live
        peak = np.where(grads.fresh, live.backward_peak_fresh, live.backward_peak)
        saved = np.where(count > 0, np.maximum(saved, live.saved), saved)
        working = np.where(count > 0, np.maximum(working, peak), working)
        params = np.where(count > 0, np.maximum(params, piece.params), params)
    table = load.embedding * (costs.embedding.params - load.head * costs.tied_params)
    unmade = np.where(grads.fresh, (params + table) * STATE_BYTES / copies.shard, 0.0)
    return {
        "activations": saved,
        "workspace": np.maximum(working - saved, 0.0),
        "gradients": np.maximum(grads.after - unmade, grads.before),
        "gathered_parameters": copies.at_layer,
        "comm_buffers": copies.scattered,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _WorkingCopies:
    """FSDP's copies in the compute dtype and its buffers, by moment (bytes).

    ZeRO 3 without pipeline holds the rest of the piece for the whole step and streams the layers:
    the current one and the one fetched ahead. Other FSDP modes hold every unit for the whole step.
    """

    at_head: Array
    at_layer: Array
    fetched: Array
    """The flat buffer of the last layer, fetched ahead during the head's backward."""
    fetched_at_layer: Array
    scattered: Array
    """A layer's gradients and the scatter's flat input."""
    gradient_bytes: Array
    """Of one gradient element as it is made."""
    shard: Array
    """Ranks over which gradients at rest are divided."""

    @staticmethod
    def of(load: Load, costs: Pieces, layouts: Layouts, compute: str) -> _WorkingCopies:
        """The copies of one rank."""
        x = DTYPE_BYTES[compute]
        units = is_sharded(layouts, compute)
        layer = np.zeros(1)
        for count, piece in zip(load.layers, costs.layers, strict=True):
            layer = np.maximum(layer, np.where(count > 0, piece.params, 0.0))
        rest = load.rest_params(costs)
        everything = load.params(costs)
        streams = (layouts.zero == 3) & (layouts.pp == 1)
        more = np.where(load.num_layers > 1, layer, 0.0)
        at_layer = np.where(streams, np.minimum(rest + layer, everything), everything)
        return _WorkingCopies(
            at_head=np.where(units, np.where(streams, rest, everything) * x, 0.0),
            at_layer=np.where(units, at_layer * x, 0.0),
            fetched=np.where(units & streams, layer * x, 0.0),
            fetched_at_layer=np.where(units & streams, more * x, 0.0),
            scattered=np.where(units, layer * (x + REDUCE_BYTES), 0.0),
            gradient_bytes=np.where(units, x, STATE_BYTES),
            shard=np.where(units, layouts.dp_shard, 1).astype(float),
        )


def _largest(moments: Sequence[dict[str, Array]]) -> Peak:
    totals = np.stack([sum(moment.values(), np.zeros(1)) for moment in moments])
    index = np.argmax(totals, axis=0)
    terms: dict[str, Array] = {}
    for name in MEMORY_TERMS:
        stacked = np.stack(
            [np.broadcast_to(m.get(name, np.zeros(1)), totals.shape[1:]) for m in moments]
        )
        terms[name] = np.take_along_axis(stacked, index[None], axis=0)[0]
    return Peak(total=np.max(totals, axis=0), terms=terms)
