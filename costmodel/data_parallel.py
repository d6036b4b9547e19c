"""Gradient and parameter traffic of data parallelism: DDP, ZeRO 1-3 as FSDP units, HSDP.

A unit is what is gathered and scattered at once: a layer, or the rest of the piece (embedding,
final norm, head). Parameters at rest and at use differ in layout; from that follows per unit

    gather   all-gather of the unit in the compute dtype over the shard group
    scatter  reduce-scatter of the unit's gradients in fp32, and with replicas, after the last
             micro-batch, the all-reduce of the scattered part over them
    copy     with each, between the flat buffer and the parameters

and how often per step, with m micro-batches:

    ZeRO 3 without pipeline   layers: 2 m gathers, m scatters; the rest: m gathers, m scatters
    ZeRO 2 without pipeline   1 gather, m scatters
    ZeRO 1, or any with pp    1 gather, 1 scatter
    ZeRO 0                    no gather; 1 all-reduce of all gradients in fp32
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cluster import DTYPE_BYTES
from .graph import Array
from .layout import Layouts
from .pieces import Pieces
from .prices import Prices
from .stages import Load

REDUCE_BYTES = 4.0
"""Gradients are reduced in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataParallel:
    """Per step and rank."""

    exposed_s: Array
    host_s: Array
    forward_s: Array
    """Casting and copying gathered parameters into place."""
    backward_s: Array
    """Copying gradients in and out of buffers, and adding up those of several micro-batches."""
    wire_bytes: dict[str, Array]
    shard: Array
    """Ranks over which a parameter's gradient at rest is divided."""


def is_sharded(layouts: Layouts, compute: str) -> Array:
    """Whether parameters are handled by FSDP units: ZeRO > 0, or 16-bit compute."""
    return (layouts.zero > 0) | (compute != "fp32")


def data_parallel(
    load: Load, costs: Pieces, layouts: Layouts, prices: Prices, compute: str
) -> DataParallel:
    """The data-parallel traffic of one pipeline rank."""
    m = layouts.num_microbatches.astype(float)
    alone = layouts.pp == 1
    zero, units = layouts.zero, is_sharded(layouts, compute)
    layer_gathers = np.where((zero == 3) & alone, 2 * m, 1.0)
    rest_gathers = np.where((zero == 3) & alone, m, 1.0)
    scatters = np.where((zero >= 2) & alone, m, 1.0)
    rest_params = load.rest_params(costs)
    all_params = load.params(costs)

    gather_s = rest_gathers * _gather_s(rest_params, layouts, prices, compute)
    scatter_s = scatters * _scatter_s(rest_params, layouts, prices)
    scatter_s = scatter_s + _across_s(rest_params, layouts, prices)
    first_s = gather_s / np.maximum(rest_gathers, 1.0)
    last_s = scatter_s / np.maximum(scatters, 1.0)
    copies = rest_gathers * _copy_s(rest_params, prices, compute)
    copies_back = scatters * _copy_s(rest_params, prices, compute)
    for count, piece in zip(load.layers, costs.layers, strict=True):
        one_copy = _copy_s(piece.params, prices, compute)
        gather = _gather_s(piece.params, layouts, prices, compute)
        gather_s = gather_s + count * layer_gathers * gather
        scatter_s = scatter_s + count * scatters * _scatter_s(piece.params, layouts, prices)
        scatter_s = scatter_s + count * _across_s(piece.params, layouts, prices)
        copies = copies + count * layer_gathers * one_copy
        copies_back = copies_back + count * scatters * one_copy
    forward_s = load.total(costs, "forward_s")
    backward_s = load.total(costs, "backward_s") + load.total(costs, "recompute_s")
    hidden_forward = np.where(zero == 3, m, 1.0) * forward_s
    gather_forward = np.where((zero == 3) & alone, 0.5, 1.0) * gather_s
    sharded_exposed = _exposed(gather_forward, hidden_forward, prices) + _exposed(
        gather_s - gather_forward + scatter_s, scatters * backward_s, prices
    )
    if prices.pool.stack.can_overlap:
        sharded_exposed = np.maximum(sharded_exposed, first_s + last_s)
    reduce_s = _reduce_s(all_params, layouts, prices)
    replicated = _exposed(reduce_s, backward_s, prices)
    gathers = load.num_layers * layer_gathers + rest_gathers
    unit_scatters = (load.num_layers + 1) * scatters
    host_s = load.total(costs, "host_forward_s") + load.total(costs, "host_backward_s")
    compute_s = m * (forward_s + backward_s + host_s)
    waiting = _waiting(compute_s, np.where(units, gathers + unit_scatters, 1.0), layouts, prices)
    exposed = np.where(units, sharded_exposed, replicated) + waiting
    host = np.where(
        units,
        gathers * prices.host("fsdp_unit_forward")
        + unit_scatters * prices.host("fsdp_unit_backward"),
        np.where(layouts.dp > 1, prices.host("ddp_step"), 0.0),
    )
    return DataParallel(
        exposed_s=exposed * prices.scale("exposed.dp"),
        host_s=host * prices.scale("host"),
        forward_s=np.where(units, copies, 0.0),
        backward_s=np.where(units, copies_back, 0.0)
        + _accumulate_s(all_params, layouts, prices, compute),
        wire_bytes=_wire(all_params, rest_params, load, costs, layouts, compute),
        shard=layouts.dp_shard.astype(float),
    )


def _waiting(compute_s: Array, meetings: Array, layouts: Layouts, prices: Prices) -> Array:
    """What replicas lose at their meetings, with their compute spread evenly between these."""
    dp = layouts.dp.astype(float)
    return meetings * prices.wait(compute_s / meetings, dp, _groups(layouts, dp))


def _groups(layouts: Layouts, ranks: Array) -> Array:
    return layouts.world / ranks


def _copy_s(params: Array, prices: Prices, compute: str) -> Array:
    """Copy of one unit between its flat buffer and its parameters; a cast in 16-bit runs."""
    kind = "copy" if compute == "fp32" else "cast"
    return np.where(params > 0, prices.operator(kind, [params], compute)[0], 0.0)


def _gather_s(params: Array, layouts: Layouts, prices: Prices, compute: str) -> Array:
    """All-gather of one unit."""
    n, stride = layouts.dp_shard.astype(float), layouts.tp.astype(float)
    moved = prices.collective(
        "all_gather", params * DTYPE_BYTES[compute], n, stride, _groups(layouts, n)
    )
    return np.where(params > 0, moved, 0.0)


def _scatter_s(params: Array, layouts: Layouts, prices: Prices) -> Array:
    """Reduce-scatter of one unit's gradients."""
    n, stride = layouts.dp_shard.astype(float), layouts.tp.astype(float)
    moved = prices.collective(
        "reduce_scatter", params * REDUCE_BYTES, n, stride, _groups(layouts, n)
    )
    return np.where(params > 0, moved, 0.0)


def _across_s(params: Array, layouts: Layouts, prices: Prices) -> Array:
    """All-reduce of one unit's scattered gradients over the replicas."""
    n, r = layouts.dp_shard.astype(float), layouts.dp_replicate.astype(float)
    stride = layouts.tp * n
    moved = prices.collective(
        "all_reduce", params * REDUCE_BYTES / n, r, stride, _groups(layouts, r)
    )
    return np.where(params > 0, moved, 0.0)


def _reduce_s(params: Array, layouts: Layouts, prices: Prices) -> Array:
    """All-reduce of all gradients (ZeRO 0)."""
    dp, stride = layouts.dp.astype(float), layouts.tp.astype(float)
    return prices.collective("all_reduce", params * REDUCE_BYTES, dp, stride, _groups(layouts, dp))


def _exposed(communication: Array, compute: Array, prices: Prices) -> Array:
    """Time a step grows by communication that may run beside `compute`.

    What does not fit is exposed; what does still slows compute by the stack's contention.
    """
    stack = prices.pool.stack
    if not stack.can_overlap:
        return communication
    hidden = np.minimum(communication, compute)
    return communication - hidden + stack.overlap_contention * hidden


def _accumulate_s(params: Array, layouts: Layouts, prices: Prices, compute: str) -> Array:
    """Additions into gradients that exist already, and DDP's copies into its buckets."""
    m = layouts.num_microbatches.astype(float)
    shard = layouts.dp_shard.astype(float)
    local = np.where((layouts.zero >= 2) & (layouts.pp == 1), params / shard, params)
    seconds = (m - 1) * prices.operator("accumulate", [local], "fp32")[0]
    copies = (layouts.dp > 1) & ~is_sharded(layouts, compute)
    return seconds + np.where(copies, prices.operator("copy", [params], "fp32")[0], 0.0)


def _wire(
    all_params: Array,
    rest_params: Array,
    load: Load,
    costs: Pieces,
    layouts: Layouts,
    compute: str,
) -> dict[str, Array]:
    m = layouts.num_microbatches.astype(float)
    alone, zero = layouts.pp == 1, layouts.zero
    units = is_sharded(layouts, compute)
    shard, replicate = layouts.dp_shard.astype(float), layouts.dp_replicate.astype(float)
    layer_params = all_params - rest_params
    often = (zero == 3) & alone
    gathered = np.where(often, m * (2 * layer_params + rest_params), all_params)
    scattered = np.where((zero >= 2) & alone, m, 1.0) * all_params
    many = units & (shard > 1)
    reduced = np.where(units, all_params / shard, all_params)
    return {
        "all_gather@dp": np.where(many, gathered * DTYPE_BYTES[compute], 0.0),
        "reduce_scatter@dp": np.where(many, scattered * REDUCE_BYTES, 0.0),
        "all_reduce@dp": np.where(
            np.where(units, replicate > 1, layouts.dp > 1), reduced * REDUCE_BYTES, 0.0
        ),
    }
