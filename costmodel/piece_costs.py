"""The costs of one piece: its rewritten graph, priced."""

from __future__ import annotations

import numpy as np

from .exposed import (
    Beside,
    again_collectives,
    backward_collectives,
    exposed_copy_s,
    exposed_s,
    forward_collectives,
    wire_bytes,
)
from .graph import Array, Graph, Sizes, Tensor, volume
from .host_times import floor_s, glue_s, hooks_s, launches_s
from .layout import Layouts
from .liveness import liveness
from .operator_times import operator_times, waiting_bytes
from .options import Options
from .pieces import Piece
from .prices import Prices
from .techniques import lora, offload
from .techniques.halo import CODES
from .trained import trained_tensors


def piece_of(
    graph: Graph, sizes: Sizes, layouts: Layouts, prices: Prices, options: Options, sp: bool
) -> Piece:
    """The costs of one micro-batch through a rewritten graph, with a split sequence or without."""
    zero = np.zeros(len(layouts))
    times = operator_times(graph, sizes, layouts, prices, options)
    live = liveness(graph, sizes, lands=offload.moves(options) and graph.name == "layer")
    there = forward_collectives(graph, options, prices)
    back = backward_collectives(graph, times.again, options)
    host_forward, host_backward = glue_s(graph, sizes, layouts, prices, options, times.again, sp)
    recompute_s = times.recompute_s
    if offload.by_tokens(options) and graph.name == "layer":
        recompute_s = recompute_s * (1.0 - offload.share(sizes, options))
    busy_backward = times.backward_s + recompute_s
    comm_forward = exposed_s(
        there, sizes, layouts, prices, options, times.forward_s + host_forward,
        Beside(operators=times.beside_forward, matmuls=times.near_forward, weights={}),
    )  # fmt: skip
    comm_backward = exposed_s(
        back, sizes, layouts, prices, options, busy_backward + host_backward,
        Beside(
            operators=times.beside_backward, matmuls=times.near_backward,
            weights=times.near_weights,
        ),
    )  # fmt: skip
    parted = offload.part(graph, sizes, live, options)
    if np.any(parted.moved > 0):
        out, back_in = (
            exposed_copy_s(parted.moved, direction, options, prices, beside)
            for direction, beside in (("out", times.forward_s), ("in", busy_backward))
        )
        comm_forward["copy"], comm_backward["copy"] = out, back_in
    host_scale = prices.scale("host")
    launching, launching_back = launches_s(graph, times, prices, options)
    hooks, hooks_back = hooks_s(graph, layouts, prices, options)
    floor_forward, spare_forward = floor_s(
        times.forward_s, comm_forward, launching + hooks, there, layouts, prices
    )
    floor_backward, spare_backward = floor_s(
        busy_backward, comm_backward, launching_back + hooks_back, back, layouts, prices
    )
    return Piece(
        options=options,
        forward_s=times.forward_s * prices.scale("forward"),
        backward_s=times.backward_s * prices.scale("backward"),
        weight_s=times.weight_s * prices.scale("backward"),
        waiting_bytes=waiting_bytes(graph, sizes) + zero,
        recompute_s=recompute_s * prices.scale("recompute"),
        streaming_s=times.streaming_s,
        comm_forward_s=comm_forward,
        comm_backward_s=comm_backward,
        host_forward_s=zero + (host_forward + floor_forward) * host_scale,
        host_backward_s=zero + (host_backward + floor_backward) * host_scale,
        spare_forward_s=zero + spare_forward * host_scale,
        spare_backward_s=zero + spare_backward * host_scale,
        params=graph.num_params(sizes) + zero,
        expert_params=graph.num_params(sizes, experts=True) + zero,
        trainable_params=graph.num_params(sizes, trainable=True) + zero,
        trainable_expert_params=graph.num_params(sizes, experts=True, trainable=True) + zero,
        spared_bytes=lora.spared_bytes(graph, sizes, options) + zero,
        spared_expert_bytes=lora.spared_bytes(graph, sizes, options, experts=True) + zero,
        gathered_codes=sum((volume(w.axes, sizes) for w in _coded(graph)), zero),
        coded_tensors=len(_coded(graph)),
        tensors=len(graph.weights),
        trained=trained_tensors(graph, sizes),
        live=live,
        moved_bytes=parted.moved + zero,
        stays=parted.stays + zero,
        lands_bytes=parted.lands + zero,
        boundary_bytes=graph.boundary.num_bytes(sizes) + zero,
        wire_bytes=wire_bytes([*there, *back], sizes, layouts),
        again_wire_bytes=wire_bytes(
            again_collectives(graph, times.again, options) if offload.by_tokens(options) else (),
            sizes,
            layouts,
        ),
        uncut_gradient_bytes=_uncut_gradient_bytes(graph, sizes, layouts.tp.astype(float), sp),
    )


def _coded(graph: Graph) -> list[Tensor]:
    """Weights that are gathered as codes."""
    return [weight for weight in graph.weights if weight.dtype == CODES]


CUT_AXES = frozenset({"heads", "kv_heads", "ffn", "expert_ffn", "shared_ffn", "vocab"})
"""Axes that tensor parallelism divides."""


def _uncut_gradient_bytes(graph: Graph, sizes: Sizes, tp: Array, sp: bool) -> Array:
    """With a split sequence each rank sees a part of it: gradients of whole weights are summed.

    Without, those of routers are, of which each rank sees its part of the experts' outputs, and
    those of the half of an adapter that is whole: the other half is cut.
    """
    total = np.zeros(len(tp))
    for weight in graph.weights:
        partial = sp or "all_experts" in weight.axes or lora.RANK in weight.axes
        whole = partial and not CUT_AXES & set(weight.axes)
        if weight.trainable and whole:
            total = total + volume(weight.axes, sizes) * 4
    return np.where(tp > 1, total, 0.0)
