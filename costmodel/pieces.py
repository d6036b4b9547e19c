"""Seconds and bytes of one piece of the model - a layer, the embedding, the head - for one
micro-batch.

Times are kept apart by what they are (matmuls and other operators, exposed tensor-parallel
communication, host), because the report prints them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..model import Layer, Model
from .graph import Array, Collective, Graph, Operator, Sizes, volume
from .layers import decoder_layer, embedding, head
from .layout import Layouts, local_sizes
from .liveness import Liveness, liveness
from .operators import KINDS
from .prices import Prices
from .techniques import apply


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Costs of one micro-batch through one piece."""

    forward_s: Array
    backward_s: Array
    """Without recomputation and communication."""
    recompute_s: Array
    tp_forward_s: Array
    tp_backward_s: Array
    host_forward_s: Array
    host_backward_s: Array
    params: Array
    """Local parameters (elements), after tensor parallelism, before data-parallel sharding."""
    tensors: int
    """Parameter tensors."""
    live: Liveness
    boundary_bytes: Array
    wire_bytes: dict[str, Array]
    """Per micro-batch, `collective@axis`: bytes of the logical buffers."""
    uncut_gradient_bytes: Array
    """Per step: gradients of weights that tp does not cut, which its ranks sum under sp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """All pieces of a model under many layouts."""

    embedding: Piece
    layers: tuple[Piece, ...]
    """One per entry of `model.layers`."""
    head: Piece
    tied_params: Array
    """Local parameters of the table where embedding and head share one, else zero."""


def pieces(
    model: Model,
    layouts: Layouts,
    seq_tokens: int,
    prices: Prices,
    *,
    compute: str,
    recompute: str,
) -> Pieces:
    """The costs of every piece of a model under each layout."""
    fused = prices.pool.device.kind == "gpu"
    sp_values = np.unique(layouts.sequence_parallel)

    def both(build: str, layer: Layer) -> Piece:
        sizes = local_sizes(model, layer, layouts, seq_tokens)
        variants: list[Piece] = []
        for sp in sp_values:
            graph = apply(
                _graph(build, model, layer, bool(sp), fused),
                compute=compute,
                recompute_mode=recompute,
            )
            variants.append(_piece(graph, sizes, layouts, prices, bool(sp)))
        if len(variants) == 1:
            return variants[0]
        return _choose(layouts.sequence_parallel > 0, variants[1], variants[0])

    first, last = model.layers[0], model.layers[-1]
    table = model.vocab * model.hidden / layouts.tp
    return Pieces(
        embedding=both("embedding", first),
        layers=tuple(both("layer", layer) for layer in model.layers),
        head=both("head", last),
        tied_params=table if model.tied_embeddings else 0.0 * table,
    )


def _graph(build: str, model: Model, layer: Layer, sp: bool, fused: bool) -> Graph:
    if build == "embedding":
        return embedding(model, sequence_parallel=sp)
    if build == "head":
        return head(model, sequence_parallel=sp, fused=fused)
    return decoder_layer(model, layer, sequence_parallel=sp, fused=fused)


def _piece(graph: Graph, sizes: Sizes, layouts: Layouts, prices: Prices, sp: bool) -> Piece:
    zero = np.zeros(len(layouts))
    forward, backward, recompute = zero.copy(), zero.copy(), zero.copy()
    launches_forward = launches_backward = 0
    again = _runs_again(graph)
    for op in graph.operators:
        if op.kind == "edge":
            copies = _edge_copies(op, sizes, prices)
            forward, backward = forward + copies[0], backward + copies[1]
            if op.name in again:
                recompute = recompute + copies[0]
            continue
        dtype = op.inputs[0].dtype if op.grad_inputs else op.outputs[0].dtype
        shape = [volume(axes, sizes) for axes in op.price_axes]
        seconds_forward, seconds_backward = prices.operator(op.kind, shape, dtype)
        forward = forward + seconds_forward
        backward = backward + seconds_backward
        if op.kind == "linear":
            backward = backward + prices.operator("linear_wgrad", shape, dtype)[0]
        launches_forward += KINDS[op.kind].launches
        launches_backward += 2 * KINDS[op.kind].launches
        if op.name in again:
            recompute = recompute + seconds_forward
            launches_backward += KINDS[op.kind].launches
    backward = backward + _joins(graph, sizes, prices)
    collectives_forward = [c for op in graph.operators for c in op.forward_collectives]
    collectives_backward = [c for op in graph.operators for c in op.backward_collectives]
    collectives_backward += [
        c for op in graph.operators if op.name in again for c in op.forward_collectives
    ]
    tp = layouts.tp.astype(float)
    groups = layouts.world / tp
    host_forward, host_backward = _host(graph, layouts, prices, sp)
    launch = prices.launch_s
    floor_forward = np.maximum(0.0, launches_forward * launch - forward)
    floor_backward = np.maximum(0.0, launches_backward * launch - backward - recompute)
    wire: dict[str, Array] = {}
    for c in [*collectives_forward, *collectives_backward]:
        key = f"{c.kind}@{c.axis}"
        wire[key] = wire.get(key, zero) + np.where(tp > 1, c.buffer.num_bytes(sizes), 0.0)
    tp_forward = _communication(
        collectives_forward, sizes, tp, groups, prices, forward + host_forward
    )
    tp_backward = _communication(
        collectives_backward, sizes, tp, groups, prices, backward + recompute + host_backward
    )
    host_scale, tp_scale = prices.scale("host"), prices.scale("exposed.tp")
    return Piece(
        forward_s=forward * prices.scale("forward"),
        backward_s=backward * prices.scale("backward"),
        recompute_s=recompute * prices.scale("recompute"),
        tp_forward_s=tp_forward * tp_scale + zero,
        tp_backward_s=tp_backward * tp_scale + zero,
        host_forward_s=zero + (host_forward + floor_forward) * host_scale,
        host_backward_s=zero + (host_backward + floor_backward) * host_scale,
        params=graph.num_params(sizes) + zero,
        tensors=len(graph.weights),
        live=liveness(graph, sizes),
        boundary_bytes=graph.boundary.num_bytes(sizes) + zero,
        wire_bytes=wire,
        uncut_gradient_bytes=_uncut_gradient_bytes(graph, sizes, tp, sp),
    )


def _joins(graph: Graph, sizes: Sizes, prices: Prices) -> Array:
    """Backward additions where a tensor has several consumers: their gradients are summed."""
    uses: dict[str, int] = {}
    tensors = {}
    for op in graph.operators:
        for tensor in op.inputs:
            uses[tensor.name] = uses.get(tensor.name, 0) + 1
            tensors[tensor.name] = tensor
    seconds = np.zeros(1)
    for name, count in uses.items():
        if count > 1:
            shape = [volume(tensors[name].axes, sizes)]
            seconds = seconds + (count - 1) * prices.operator("add", shape, tensors[name].dtype)[0]
    return seconds


def _edge_copies(op: Operator, sizes: Sizes, prices: Prices) -> tuple[Array, Array]:
    """Copies around the collectives of an edge, forward and backward, where the stack makes them.

    A gathered sequence is made contiguous afterwards, one to be scattered before.
    """

    def copies(group: Sequence[Collective]) -> Array:
        seconds = np.zeros(1)
        for c in group:
            if c.kind != "all_reduce":
                shape = [volume(c.buffer.axes, sizes)]
                seconds = seconds + prices.operator("copy", shape, c.buffer.dtype)[0]
        return np.where((sizes["tp"] > 1) & (sizes["batch"] > 1), seconds, 0.0)

    if not prices.pool.stack.sequence_copies:
        return np.zeros(1), np.zeros(1)
    return copies(op.forward_collectives), copies(op.backward_collectives)


def _communication(
    group: Sequence[Collective],
    sizes: Sizes,
    tp: Array,
    groups: Array,
    prices: Prices,
    compute_s: Array,
) -> Array:
    """Exposed tensor-parallel time: these collectives stand between dependent operators.

    At each of them the ranks, which computed for `compute_s` in all, wait for the slowest.
    """
    if not group:
        return np.zeros(1)
    seconds = len(group) * prices.wait(compute_s / len(group), tp, groups)
    for c in group:
        buffer = c.buffer.num_bytes(sizes)
        seconds = seconds + np.where(
            tp > 1, prices.collective(c.kind, buffer, tp, np.ones(1), groups), 0.0
        )
    return seconds


def _host(graph: Graph, layouts: Layouts, prices: Prices, sp: bool) -> tuple[Array, Array]:
    """Host time beyond the operators: Python and autograd glue, DTensor dispatch, checkpoints."""
    if graph.name != "layer":
        return np.zeros(1), np.zeros(1)
    forward, backward = prices.host("layer_forward"), prices.host("layer_backward")
    if graph.checkpointed:
        backward += prices.host("layer_forward") + prices.host("checkpoint")
    prefix = "tp_sp_layer" if sp else "tp_layer"
    tp = layouts.tp > 1
    extra = prices.host(f"{prefix}_backward")
    if graph.checkpointed:
        extra += prices.host(f"{prefix}_forward")
    return (
        forward + np.where(tp, prices.host(f"{prefix}_forward"), 0.0),
        backward + np.where(tp, extra, 0.0),
    )


CUT_AXES = frozenset({"heads", "kv_heads", "ffn", "vocab"})
"""Axes that tensor parallelism divides."""


def _uncut_gradient_bytes(graph: Graph, sizes: Sizes, tp: Array, sp: bool) -> Array:
    """With a split sequence each rank sees a part of it: gradients of whole weights are summed."""
    total = np.zeros(len(tp))
    if sp:
        for weight in graph.weights:
            if not CUT_AXES & set(weight.axes):
                total = total + volume(weight.axes, sizes) * 4
    return np.where(tp > 1, total, 0.0)


def _runs_again(graph: Graph) -> frozenset[str]:
    """Operators that a checkpointed graph runs again: those before the last that saves something.

    Recomputation stops once everything saved is back; the last of them saves its inputs alone.
    """
    if not graph.checkpointed:
        return frozenset(op.name for op in graph.operators if op.recomputed)
    last = max(index for index, op in enumerate(graph.operators) if op.saves)
    return frozenset(op.name for op in graph.operators[:last])


def _choose(mask: NDArray[np.bool_], yes: Piece, no: Piece) -> Piece:
    def pick(a: Array, b: Array) -> Array:
        return np.where(mask, a, b)

    def live(a: Liveness, b: Liveness) -> Liveness:
        return Liveness(
            saved=pick(a.saved, b.saved),
            forward_peak=pick(a.forward_peak, b.forward_peak),
            backward_peak=pick(a.backward_peak, b.backward_peak),
            backward_peak_fresh=pick(a.backward_peak_fresh, b.backward_peak_fresh),
            loss=pick(a.loss, b.loss),
        )

    zero = np.zeros(1)
    names = {*yes.wire_bytes, *no.wire_bytes}
    return Piece(
        forward_s=pick(yes.forward_s, no.forward_s),
        backward_s=pick(yes.backward_s, no.backward_s),
        recompute_s=pick(yes.recompute_s, no.recompute_s),
        tp_forward_s=pick(yes.tp_forward_s, no.tp_forward_s),
        tp_backward_s=pick(yes.tp_backward_s, no.tp_backward_s),
        host_forward_s=pick(yes.host_forward_s, no.host_forward_s),
        host_backward_s=pick(yes.host_backward_s, no.host_backward_s),
        params=pick(yes.params, no.params),
        tensors=yes.tensors,
        live=live(yes.live, no.live),
        boundary_bytes=pick(yes.boundary_bytes, no.boundary_bytes),
        wire_bytes={
            n: pick(yes.wire_bytes.get(n, zero), no.wire_bytes.get(n, zero)) for n in sorted(names)
        },
        uncut_gradient_bytes=pick(yes.uncut_gradient_bytes, no.uncut_gradient_bytes),
    )
