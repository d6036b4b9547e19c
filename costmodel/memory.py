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
    saved = _saved(load, costs)
    per_chunk = saved / chunks
    fresh, later = _gradients(load, costs, layouts, compute)
    moments: list[dict[str, Array]] = []
    for in_flight, grads in ((in_flight_first, fresh), (in_flight_later, later)):
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
    update = {"gradients": later["rest"], "gathered_parameters": np.zeros(1)}
    moments.append({**rest, **update})
    return _largest(moments)


def _rest(load: Load, costs: Pieces, layouts: Layouts, compute: str) -> dict[str, Array]:
    """Parameters and moments at rest."""
    params = load.total(costs, "params")
    shard = np.where(layouts.zero > 0, layouts.dp_shard, 1).astype(float)
    return {
        "parameters": params * STATE_BYTES / shard,
        "optimizer": params * MOMENTS_BYTES / shard,
    }


def _saved(load: Load, costs: Pieces) -> Array:
    """Saved activations of one micro-batch through all chunks of the rank."""
    total = load.embedding * costs.embedding.live.saved + load.head * costs.head.live.saved
    for count, piece in zip(load.layers, costs.layers, strict=True):
        total = total + count * piece.live.saved
    return total


def _gradients(
    load: Load, costs: Pieces, layouts: Layouts, compute: str
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Gradients at rest before and after the first backward.

    DDP's buckets are always there, and with several micro-batches the gradients that accumulate
    before the exchange stand beside them; FSDP holds sharded fp32 gradients, and unsharded ones
    while micro-batches accumulate without a scatter.
    """
    params = load.total(costs, "params")
    m = layouts.num_microbatches
    units = is_sharded(layouts, compute)
    shard = np.where(layouts.zero > 0, layouts.dp_shard, 1).astype(float)
    scatter_each = (layouts.zero >= 2) & (layouts.pp == 1)
    unsharded = units & ~scatter_each & (m > 1)
    held = np.where(units, np.where(unsharded, 1.0, 1.0 / shard), 1.0) * params * STATE_BYTES
    buckets = np.where(~units & (layouts.dp > 1), params * STATE_BYTES, 0.0)
    final = np.where(units, params * STATE_BYTES / shard, params * STATE_BYTES)
    twice = np.where(m > 1, final + buckets, np.maximum(final, buckets))
    return {"held": buckets, "rest": twice}, {"held": held + buckets, "rest": twice}


def _moments(
    load: Load,
    costs: Pieces,
    layouts: Layouts,
    compute: str,
    per_chunk: Array,
    grads: dict[str, Array],
) -> list[dict[str, Array]]:
    """The candidate moments of one micro-batch's backward on this rank."""
    gathered, buffers = _gathered(load, costs, layouts, compute)
    result: list[dict[str, Array]] = []
    for count, piece in load.each(costs):
        if piece is costs.embedding:
            continue
        present = count > 0
        own = piece.live.saved
        is_head = piece is costs.head
        working = np.maximum(
            np.where(is_head, piece.live.forward_peak, 0.0), piece.live.backward_peak
        )
        below = np.maximum(per_chunk - own * present, 0.0)
        if not is_head:  # the head's own activations are gone when the layers' backward starts
            below = np.maximum(below - load.head * costs.head.live.saved, 0.0)
        unit = piece.live.gradients if not is_head else np.zeros(1)
        loss = piece.live.loss
        result.append(
            {
                "activations": np.where(present, below + own, 0.0),
                "logits_loss": np.where(present, np.minimum(loss, working), 0.0),
                "workspace": np.where(
                    present, np.maximum(working - own - np.minimum(loss, working), 0.0), 0.0
                ),
                "gradients": grads["held"] + np.where(present, 0.0 * unit, 0.0),
                "gathered_parameters": gathered,
                "comm_buffers": np.where(present & (not is_head), buffers, 0.0),
            }
        )
    return [*result, _first_layer(load, costs, layouts, gathered, buffers, grads)]


def _first_layer(
    load: Load,
    costs: Pieces,
    layouts: Layouts,
    gathered: Array,
    buffers: Array,
    grads: dict[str, Array],
) -> dict[str, Array]:
    """Backward of the rank's first layer: all gradients are there, one layer's activations left."""
    saved, working = np.zeros(1), np.zeros(1)
    for count, piece in zip(load.layers, costs.layers, strict=True):
        saved = np.where(count > 0, np.maximum(saved, piece.live.saved), saved)
        working = np.where(count > 0, np.maximum(working, piece.live.backward_peak), working)
    return {
        "activations": saved,
        "workspace": np.maximum(working - saved, 0.0),
        "gradients": np.maximum(grads["held"], grads["rest"]),
        "gathered_parameters": gathered,
        "comm_buffers": buffers,
    }


def _gathered(load: Load, costs: Pieces, layouts: Layouts, compute: str) -> tuple[Array, Array]:
    """Working copies of parameters, and communication buffers, in a backward.

    ZeRO 3 without pipeline holds the rest of the piece and two layers (the current one and the one
    fetched ahead); other FSDP modes hold every unit for the whole step. The buffers are a layer's
    gradients before the scatter and the scatter's flat input.
    """
    x = DTYPE_BYTES[compute]
    units = is_sharded(layouts, compute)
    layer = np.zeros(1)
    for count, piece in zip(load.layers, costs.layers, strict=True):
        layer = np.maximum(layer, np.where(count > 0, piece.params, 0.0))
    rest = load.embedding * costs.embedding.params + load.head * costs.head.params
    everything = load.total(costs, "params")
    streaming = (layouts.zero == 3) & (layouts.pp == 1)
    held = np.where(streaming, np.minimum(rest + 2 * layer, everything), everything)
    buffers = layer * x + layer * REDUCE_BYTES
    return np.where(units, held * x, 0.0), np.where(units, buffers, 0.0)


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
