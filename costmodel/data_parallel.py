"""Gradient and parameter traffic of data parallelism: DDP, ZeRO 1-3 as FSDP units, HSDP.

A unit is what is gathered and scattered at once: a layer, or the rest of the piece (embedding,
final norm, head). Parameters at rest and at use differ in layout; from that follows per unit

    gather   all-gather of the unit in the compute dtype over the shard group
    scatter  reduce-scatter of the unit's gradients over it, and with replicas, after the last
             micro-batch, the all-reduce of the scattered part over them
    copy     with each, between the flat buffer and the parameters

and how often per step, with m micro-batches:

    ZeRO 3 without pipeline   layers: 2 m gathers, m scatters; the rest: m gathers, m scatters
    ZeRO 2 without pipeline   1 gather, m scatters
    ZeRO 1, or any with pp    1 gather, 1 scatter
    ZeRO 0                    no gather; 1 all-reduce of all gradients, in a pipeline after the
                              last backward of a stage

Ranks of context parallelism hold the same weights as those of data parallelism and count as such.
Experts are sharded over the ranks that hold the same ones. Stacks that keep parameters whole are in
`distributed_optimizer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cluster import DTYPE_BYTES
from . import distributed_optimizer
from .graph import Array
from .layout import Layouts
from .options import Options
from .overlap import Moved, felt_s, moved
from .pieces import Piece, Pieces
from .prices import Prices
from .sharing import SharingGroup
from .stages import Load
from .state_bytes import in_units
from .techniques.expert_placement import replica_bytes
from .unit_stream import streaming_share, units_felt_s


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


def data_parallel(
    load: Load, costs: Pieces, layouts: Layouts, prices: Prices, options: Options
) -> DataParallel:
    """The data-parallel traffic of one pipeline rank; ZeRO 3 streams units on any stack."""
    streams = layouts.zero == 3
    if prices.pool.stack.sharding == "fsdp" or np.all(streams):
        return _units(load, costs, layouts, prices, options)
    whole = _whole(load, costs, layouts, prices, options)
    if not np.any(streams):
        return whole
    units = _units(load, costs, layouts, prices, options)
    names = sorted({*whole.wire_bytes, *units.wire_bytes})
    zero = np.zeros(1)
    return DataParallel(
        exposed_s=np.where(streams, units.exposed_s, whole.exposed_s),
        host_s=np.where(streams, units.host_s, whole.host_s),
        forward_s=np.where(streams, units.forward_s, whole.forward_s),
        backward_s=np.where(streams, units.backward_s, whole.backward_s),
        wire_bytes={
            n: np.where(streams, units.wire_bytes.get(n, zero), whole.wire_bytes.get(n, zero))
            for n in names
        },
        shard=np.where(streams, units.shard, whole.shard),
    )


def _whole(
    load: Load, costs: Pieces, layouts: Layouts, prices: Prices, options: Options
) -> DataParallel:
    """Stacks that keep parameters whole."""
    exposed = distributed_optimizer.exchange_s(load, costs, layouts, prices, options)
    zero = np.zeros(len(layouts))
    return DataParallel(
        exposed_s=exposed * prices.scale("exposed.dp"),
        host_s=zero,
        forward_s=zero,
        backward_s=zero,
        wire_bytes=distributed_optimizer.wire_bytes(
            load, costs, layouts, options, prices.pool.stack
        ),
        shard=np.where(layouts.zero > 0, layouts.shards, 1).astype(float),
    )


def _units(
    load: Load, costs: Pieces, layouts: Layouts, prices: Prices, options: Options
) -> DataParallel:
    """FSDP's units and DDP."""
    m = layouts.num_microbatches.astype(float)
    alone = layouts.pp == 1
    zero, units = layouts.zero, in_units(layouts, options, prices.pool.stack)
    layer_gathers = np.where((zero == 3) & alone, 2 * m, 1.0)
    rest_gathers = np.where((zero == 3) & alone, m, 1.0)
    scatters = np.where((zero >= 2) & alone, m, 1.0)
    rest_params = load.rest_params(costs)
    all_params = load.params(costs)
    copies = rest_gathers * _copy_s(rest_params, prices, options)
    scales_s = _scales_s(load, costs, layouts, prices)
    copies_back = scatters * _copy_s(rest_params, prices, options)
    replicas_s = np.zeros(1)
    for count, piece in zip(load.layers, costs.layers, strict=True):
        replicas_s = replicas_s + count * _replicas_s(piece, layouts, prices)
        one_copy = _copy_s(piece.params + piece.expert_params, prices, options)
        copies = copies + count * layer_gathers * one_copy
        # one pass more per step, for the scales
        coded = (layer_gathers + 1.0) * _codes_s(piece, layouts, prices)
        copies = copies + count * coded
        copies_back = copies_back + count * scatters * one_copy
    sharded = units_felt_s(load, costs, layouts, prices, options)
    held = load.total(costs, "expert_params")
    reduce = _reduce(all_params, SharingGroup.dense(layouts), layouts, prices)
    reduce = reduce + _reduce(held, SharingGroup.experts(layouts), layouts, prices)
    backward_s = load.total(costs, "backward_s") + load.total(costs, "recompute_s")
    beside = felt_s(reduce, backward_s, streaming_share(load, costs), prices)
    replicated = np.where(alone, beside, reduce.seconds)
    num_units = load.num_layers + _expert_units(load, costs, layouts)
    gathers = num_units * layer_gathers + rest_gathers
    unit_scatters = (num_units + 1) * scatters
    host_s = sum(load.host_s(costs))
    compute_s = m * (load.total(costs, "forward_s") + backward_s + host_s)
    waiting = _waiting(compute_s, np.where(units, gathers + unit_scatters, 1.0), layouts, prices)
    exposed = np.where(units, sharded, replicated) + waiting + replicas_s + scales_s
    host = np.where(
        units,
        gathers * prices.host("fsdp_unit_forward")
        + unit_scatters * prices.host("fsdp_unit_backward"),
        np.where((layouts.dp * layouts.cp > 1) & alone, prices.host("ddp_step"), 0.0),
    )
    return DataParallel(
        exposed_s=exposed * prices.scale("exposed.dp"),
        host_s=host * prices.scale("host"),
        forward_s=np.where(units, copies, 0.0),
        backward_s=np.where(units, copies_back, 0.0)
        + _accumulate_s(all_params + held, layouts, prices, options),
        wire_bytes=_wire(load, costs, layouts, prices, options),
        shard=layouts.shards.astype(float),
    )


def _waiting(compute_s: Array, meetings: Array, layouts: Layouts, prices: Prices) -> Array:
    """What replicas lose at their meetings, with their compute spread evenly between these."""
    dp = (layouts.dp * layouts.cp).astype(float)
    return meetings * prices.wait(compute_s / meetings, dp, layouts.world / dp)


def _copy_s(params: Array, prices: Prices, options: Options) -> Array:
    """Copy of one unit between its flat buffer and its parameters; a cast in 16-bit runs."""
    kind = "copy" if options.compute == "fp32" else "cast"
    seconds = prices.operator(kind, [params], options.tensor_dtype)[0]
    return np.where(params > 0, seconds, 0.0)


def _codes_s(piece: Piece, layouts: Layouts, prices: Prices) -> Array:
    """Rotating and casting a rank's shards of the weights that are gathered as codes."""
    shard = piece.gathered_codes / SharingGroup.dense(layouts).shard
    seconds = prices.operator("quantize_weight", [shard], "int8")[0]
    return np.where(shard > 0, seconds, 0.0)


def _scales_bytes(load: Load, costs: Pieces, layouts: Layouts) -> Array:
    """Of the maximum over shards, once per step: one fp32 number per weight gathered as codes."""
    tensors = load.total(costs, "coded_tensors")
    return np.where(SharingGroup.dense(layouts).shard > 1, 4.0 * tensors, 0.0)


def _scales_s(load: Load, costs: Pieces, layouts: Layouts, prices: Prices) -> Array:
    """The maximum over shards, which nothing hides."""
    group, num_bytes = SharingGroup.dense(layouts), _scales_bytes(load, costs, layouts)
    groups = layouts.world / group.shard
    felt = moved("all_reduce", num_bytes, group.shard, group.stride, groups, prices).seconds
    return np.where(num_bytes > 0, felt, 0.0)


def _expert_units(load: Load, costs: Pieces, layouts: Layouts) -> Array:
    """Experts that ep divides are units of their own, shared by fewer ranks than their layer."""
    apart = np.zeros(1)
    for count, piece in zip(load.layers, costs.layers, strict=True):
        apart = apart + count * (piece.expert_params > 0)
    return np.where(layouts.ep > 1, apart, 0.0)


def _reduce(params: Array, group: SharingGroup, layouts: Layouts, prices: Prices) -> Moved:
    """All-reduce of gradients that are whole on every rank (ZeRO 0)."""
    num_bytes = params * prices.pool.stack.reduce_bytes
    groups = layouts.world / group.ranks
    return moved("all_reduce", num_bytes, group.ranks, group.stride, groups, prices)


def _replicas_s(piece: Piece, layouts: Layouts, prices: Prices) -> Array:
    """The two all-to-alls in which a layer's replicas of experts add their gradients up."""
    shard = _expert_shard(layouts, prices, piece.options)
    ep, stride = layouts.ep.astype(float), layouts.expert_tp.astype(float)
    num_bytes = replica_bytes(piece.trainable_expert_params, piece.options, ep, shard) / 2
    return 2 * moved("all_to_all", num_bytes, ep, stride, layouts.world / ep, prices).seconds


def _expert_shard(layouts: Layouts, prices: Prices, options: Options) -> Array:
    """Ranks over which an expert's gradient at rest is divided."""
    units = in_units(layouts, options, prices.pool.stack)
    return np.where(units, SharingGroup.experts(layouts).shard, 1.0)


def _accumulate_s(params: Array, layouts: Layouts, prices: Prices, options: Options) -> Array:
    """Additions into gradients that exist already, and DDP's copies into its buckets."""
    m = layouts.num_microbatches.astype(float)
    shard = layouts.shards.astype(float)
    local = np.where((layouts.zero >= 2) & (layouts.pp == 1), params / shard, params)
    seconds = (m - 1) * prices.operator("accumulate", [local], "fp32")[0]
    copies = (layouts.dp * layouts.cp > 1) & ~in_units(layouts, options, prices.pool.stack)
    return seconds + np.where(copies, prices.operator("copy", [params], "fp32")[0], 0.0)


def _wire(
    load: Load, costs: Pieces, layouts: Layouts, prices: Prices, options: Options
) -> dict[str, Array]:
    m = layouts.num_microbatches.astype(float)
    alone, zero = layouts.pp == 1, layouts.zero
    units = in_units(layouts, options, prices.pool.stack)
    reduce_bytes = prices.pool.stack.reduce_bytes
    often = (zero == 3) & alone
    scatters = np.where((zero >= 2) & alone, m, 1.0)
    total = {"all_gather@dp": np.zeros(1), "reduce_scatter@dp": np.zeros(1),
             "all_reduce@dp": np.zeros(1)}  # fmt: skip
    dense, experts = load.params(costs), load.total(costs, "expert_params")
    experts_trained = load.total(costs, "trainable_expert_params")
    spared, of_experts = (load.total(costs, f"spared_{w}bytes") for w in ("", "expert_"))
    trains, codes = load.trainable_params(costs), load.total(costs, "gathered_codes")
    for params, rest, trained, less, coded, group in (
        (dense, load.rest_params(costs), trains, spared, codes, SharingGroup.dense(layouts)),
        (experts, 0.0 * experts, experts_trained, of_experts, 0.0, SharingGroup.experts(layouts)),
    ):
        x = DTYPE_BYTES[options.tensor_dtype]
        less = less + coded * (x - 1.0)
        layers = (params - rest) * x - less
        gathered = np.where(often, m * (2 * layers + rest * x), params * x - less)
        many = units & (group.shard > 1)
        reduced = np.where(units, trained / group.shard, trained)
        replicas = np.where(units, group.replicate, group.shard * group.replicate)
        total["all_gather@dp"] = total["all_gather@dp"] + np.where(many, gathered, 0.0)
        total["reduce_scatter@dp"] = total["reduce_scatter@dp"] + np.where(
            many, scatters * trained * reduce_bytes, 0.0
        )
        total["all_reduce@dp"] = total["all_reduce@dp"] + np.where(
            replicas > 1, reduced * reduce_bytes, 0.0
        )
    total["all_reduce@dp"] = total["all_reduce@dp"] + np.where(
        units, _scales_bytes(load, costs, layouts), 0.0
    )
    ep = layouts.ep.astype(float)
    for count, piece in zip(load.layers, costs.layers, strict=True):
        shard = _expert_shard(layouts, prices, piece.options)
        exchanged = replica_bytes(piece.trainable_expert_params, piece.options, ep, shard)
        total["all_to_all@ep"] = total.get("all_to_all@ep", 0.0) + count * exchanged
    return total
