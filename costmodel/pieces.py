"""Seconds and bytes of one piece of the model - a layer, the embedding, the head - for one
micro-batch.

Times are kept apart by what they are (matmuls and other operators, exposed tensor-parallel
communication, host), because the report prints them apart.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..model import Layer, Model
from ..traced import TracedOperator
from . import traced
from .graph import Array, Axes, Collective, Graph, Operator, Sizes, volume
from .layers import decoder_layer, embedding, head
from .layers.profiles import stack_graph
from .layout import Layouts, local_sizes
from .liveness import Liveness, liveness
from .operators import KINDS
from .options import Options
from .prices import Prices
from .techniques import apply, local_axes


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Costs of one micro-batch through one piece."""

    forward_s: Array
    backward_s: Array
    """Without recomputation and communication."""
    recompute_s: Array
    comm_forward_s: dict[str, Array]
    """Exposed communication by mesh axis (tp, cp, ep)."""
    comm_backward_s: dict[str, Array]
    host_forward_s: Array
    host_backward_s: Array
    params: Array
    """Local parameters (elements), after tensor parallelism, before data-parallel sharding; those
    of routed experts not included."""
    expert_params: Array
    """Local parameters of routed experts, after expert and tensor parallelism. They are replicated
    over dp * cp / ep ranks."""
    trainable_params: Array
    """Those of `params` that have gradients and optimiser states."""
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
    options: Options,
) -> Pieces:
    """The costs of every piece of a model under each layout."""
    if model.traced is not None:
        return _traced_pieces(model, layouts, prices, options)
    fused = prices.pool.device.kind == "gpu"
    sp_values = np.unique(layouts.sequence_parallel)

    def both(build: str, layer: Layer) -> Piece:
        sizes = local_axes(local_sizes(model, layer, layouts, seq_tokens), options)
        variants: list[Piece] = []
        for sp in sp_values:
            graph = _graph(build, model, layer, bool(sp), fused, options)
            variants.append(_piece(graph, sizes, layouts, prices, options, bool(sp)))
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


def _traced_pieces(model: Model, layouts: Layouts, prices: Prices, options: Options) -> Pieces:
    """The pieces of a traced module: prefix, layers, suffix."""

    def piece(name: str, operators: Sequence[TracedOperator]) -> Piece:
        sizes = traced.sizes(operators, layouts)
        there = apply(traced.graph(name, operators), options)
        back = apply(traced.backward_graph(operators), options)
        costs = _piece(there, sizes, layouts, prices, options, False)
        more = _piece(back, sizes, layouts, prices, options, False)
        return replace(
            costs,
            backward_s=costs.backward_s + more.forward_s,
            host_backward_s=costs.host_backward_s + more.host_forward_s,
        )

    prefix, *layers, suffix = traced.parts(model)
    return Pieces(
        embedding=piece("embedding", prefix),
        layers=tuple(piece("layer", layer) for layer in layers),
        head=piece("head", suffix),
        tied_params=np.zeros(len(layouts)),
    )


@functools.lru_cache(maxsize=512)
def _graph(
    build: str, model: Model, layer: Layer, sp: bool, fused: bool, options: Options
) -> Graph:
    """The rewritten graph of a piece: it does not depend on the layout, so that one serves all."""
    return apply(_plain_graph(build, model, layer, sp, fused, options), options)


def _plain_graph(
    build: str, model: Model, layer: Layer, sp: bool, fused: bool, options: Options
) -> Graph:
    if not model.is_decoder:
        return stack_graph(build, model, layer, sp=sp, fused=fused, options=options)
    if build == "embedding":
        return embedding(model, sequence_parallel=sp)
    if build == "head":
        return head(model, sequence_parallel=sp, fused=fused)
    return decoder_layer(model, layer, sequence_parallel=sp, fused=fused, options=options)


RUNTIME_LAUNCHES = {"eager": 1.0, "compiled": 0.5, "graphs": 0.05}
"""Host time per operator relative to eager launches: a compiled layer has about half the kernels, a
captured graph is launched as a whole. Assumed."""


def _piece(
    graph: Graph, sizes: Sizes, layouts: Layouts, prices: Prices, options: Options, sp: bool
) -> Piece:
    zero = np.zeros(len(layouts))
    forward, backward, recompute = zero.copy(), zero.copy(), zero.copy()
    launches_forward = launches_backward = 0
    beside_forward: dict[str, Array] = {}
    beside_backward: dict[str, Array] = {}
    again = _runs_again(graph, prices.pool.stack.recompute_stops_early)
    for op in graph.operators:
        if op.kind == "edge":
            copies = _edge_copies(op, sizes, prices)
            forward, backward = forward + copies[0], backward + copies[1]
            if op.name in again:
                recompute = recompute + copies[0]
            continue
        dtype = op.compute or (op.inputs[0].dtype if op.grad_inputs else op.outputs[0].dtype)
        shape = [volume(axes, sizes) for axes in op.price_axes]
        seconds_forward, seconds_backward = prices.operator(op.kind, shape, dtype)
        if dtype == "fp8" and options.recipe == "rowwise":
            seconds_forward = seconds_forward / prices.pool.stack.rowwise_fraction
            seconds_backward = seconds_backward / prices.pool.stack.rowwise_fraction
        if op.kind.startswith("grouped"):
            busiest = prices.pool.stack.expert_imbalance
            seconds_forward, seconds_backward = (
                seconds_forward * busiest, seconds_backward * busiest
            )  # fmt: skip
        forward = forward + seconds_forward
        backward = backward + seconds_backward
        if op.kind == "linear" and op.weights[0].trainable:
            backward = backward + prices.operator("linear_wgrad", shape, dtype)[0]
        launches_forward += KINDS[op.kind].launches
        launches_backward += 2 * KINDS[op.kind].launches
        beside_forward[op.name], beside_backward[op.name] = seconds_forward, seconds_backward
        if op.name in again:
            beside_backward[op.name] = seconds_backward + seconds_forward
            recompute = recompute + seconds_forward
            launches_backward += KINDS[op.kind].launches
    backward = backward + _joins(graph, sizes, prices)
    low = options.gathers_low(prices.pool.stack)
    collectives_forward = [
        _low_precision(c) if low else c for op in graph.operators for c in op.forward_collectives
    ]
    collectives_backward = [c for op in graph.operators for c in op.backward_collectives]
    collectives_backward += [
        c for op in graph.operators if op.name in again for c in op.forward_collectives
    ]
    tp = layouts.tp.astype(float)
    host_forward, host_backward = _host(graph, layouts, prices, sp)
    wire: dict[str, Array] = {}
    for c in [*collectives_forward, *collectives_backward]:
        key = f"{c.kind}@{_mesh_axis(c.axis)}"
        moved = np.where(_ranks(c.axis, layouts) > 1, c.buffer.num_bytes(sizes), 0.0)
        wire[key] = wire.get(key, zero) + moved
    comm_forward = _communication(
        collectives_forward, sizes, layouts, prices, forward + host_forward, beside_forward
    )
    busy_backward = backward + recompute + host_backward
    comm_backward = _communication(
        collectives_backward, sizes, layouts, prices, busy_backward, beside_backward
    )
    host_scale = prices.scale("host")
    launch_s = prices.launch_s * RUNTIME_LAUNCHES[options.runtime]
    floor_forward = _floor(
        forward, comm_forward, launches_forward * launch_s, collectives_forward, layouts, prices
    )
    floor_backward = _floor(
        backward + recompute,
        comm_backward,
        launches_backward * launch_s,
        collectives_backward,
        layouts,
        prices,
    )
    return Piece(
        forward_s=forward * prices.scale("forward"),
        backward_s=backward * prices.scale("backward"),
        recompute_s=recompute * prices.scale("recompute"),
        comm_forward_s=comm_forward,
        comm_backward_s=comm_backward,
        host_forward_s=zero + (host_forward + floor_forward) * host_scale,
        host_backward_s=zero + (host_backward + floor_backward) * host_scale,
        params=graph.num_params(sizes) + zero,
        expert_params=graph.num_params(sizes, experts=True) + zero,
        trainable_params=graph.num_params(sizes, trainable=True) + zero,
        tensors=len(graph.weights),
        live=liveness(graph, sizes),
        boundary_bytes=graph.boundary.num_bytes(sizes) + zero,
        wire_bytes=wire,
        uncut_gradient_bytes=_uncut_gradient_bytes(graph, sizes, tp, sp),
    )


def _floor(
    compute_s: Array,
    comm_s: dict[str, Array],
    launch_s: float,
    collectives: Sequence[Collective],
    layouts: Layouts,
    prices: Prices,
) -> Array:
    """What a piece takes beyond its device work because the host must launch it.

    Host and device work side by side: together (device^q + host^q)^(1/q).
    """
    if launch_s == 0.0:
        return np.zeros(1)
    stack = prices.pool.stack
    device_s = sum(comm_s.values(), compute_s)
    host_s = np.zeros(1) + launch_s
    for c in collectives:
        host_s = host_s + np.where(_ranks(c.axis, layouts) > 1, stack.host_s_per_collective, 0.0)
    q = stack.host_smoothness
    return (device_s**q + host_s**q) ** (1 / q) - device_s


def _joins(graph: Graph, sizes: Sizes, prices: Prices) -> Array:
    """Backward additions where a tensor has several consumers: their gradients are summed."""
    uses: dict[str, int] = {}
    tensors = {}
    for op in graph.operators:
        if not op.grad_inputs:
            continue
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
            if c.axis == "tp" and c.kind != "all_reduce":
                shape = [volume(c.buffer.axes, sizes)]
                seconds = seconds + prices.operator("copy", shape, c.buffer.dtype)[0]
        return np.where((sizes["tp"] > 1) & (sizes["batch"] > 1), seconds, 0.0)

    if not prices.pool.stack.sequence_copies:
        return np.zeros(1), np.zeros(1)
    return copies(op.forward_collectives), copies(op.backward_collectives)


def _communication(
    group: Sequence[Collective],
    sizes: Sizes,
    layouts: Layouts,
    prices: Prices,
    compute_s: Array,
    beside: dict[str, Array],
) -> dict[str, Array]:
    """Exposed time by mesh axis: collectives stand between dependent operators, or run beside one.

    At each of the former the ranks, which computed for `compute_s` in all, wait for the slowest.
    Of the latter those of one operator are hidden together, up to a part of its time (`beside`).
    """
    seconds: dict[str, Array] = {}
    hidden: dict[tuple[str, str], Array] = {}
    known: dict[tuple[str, str, Axes, str], Array] = {}
    meetings = np.zeros(1)
    for c in group:
        meetings = meetings + ((_ranks(c.axis, layouts) > 1) & (c.overlaps is None))
    for c in group:
        ranks, stride = _ranks(c.axis, layouts), _stride(c.axis, layouts)
        groups = layouts.world / ranks
        key = (c.kind, c.axis, c.buffer.axes, c.buffer.dtype)
        if key not in known:
            moved = c.buffer.num_bytes(sizes)
            known[key] = prices.collective(c.kind, moved, ranks, stride, groups)
        one, axis = known[key], _mesh_axis(c.axis)
        if c.overlaps is not None:
            key = (axis, c.overlaps)
            hidden[key] = hidden.get(key, 0.0) + np.where(ranks > 1, one, 0.0)
            continue
        lost = prices.wait(compute_s / np.maximum(meetings, 1.0), ranks, groups)
        if axis == "tp":
            one = one * prices.pool.stack.tensor_parallel_exposed
        here = np.where(ranks > 1, (one + lost) * prices.scale(f"exposed.{axis}"), 0.0)
        seconds[axis] = seconds.get(axis, 0.0) + here
    share = HIDDEN_SHARE if prices.pool.stack.can_overlap else 0.0
    for (axis, name), total in hidden.items():
        left = np.maximum(0.0, total - share * beside[name])
        seconds[axis] = seconds.get(axis, 0.0) + left * prices.scale(f"exposed.{axis}")
    return seconds


HIDDEN_SHARE = 0.5
"""Part of an operator's time that communication beside it can hide behind: a ring's first and last
steps have nothing to hide behind, and both want the device. Assumed."""


def _mesh_axis(axis: str) -> str:
    """The mesh axis that a group lies on: ulysses and ring are the two parts of cp, expert_tp what
    tp is for experts."""
    return {"ulysses": "cp", "ring": "cp", "expert_tp": "tp"}.get(axis, axis)


def _low_precision(c: Collective) -> Collective:
    """A gather of what fp8 matmuls read moves fp8."""
    if c.kind != "all_gather" or c.axis != "tp":
        return c
    return replace(c, buffer=replace(c.buffer, dtype="fp8"))


def _ranks(axis: str, layouts: Layouts) -> Array:
    """Ranks of a group along a mesh axis."""
    return getattr(layouts, axis).astype(float)


def _stride(axis: str, layouts: Layouts) -> Array:
    """Distance of neighbours along it: tp is innermost, then cp with ulysses inside the ring.

    ep lies over cp and dp, and over tp where experts are not cut by it.
    """
    if axis in ("tp", "expert_tp"):
        return np.ones(1)
    if axis == "ep":
        return layouts.expert_tp.astype(float)
    inside = layouts.tp * layouts.ulysses if axis == "ring" else layouts.tp
    return inside.astype(float)


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


CUT_AXES = frozenset({"heads", "kv_heads", "ffn", "expert_ffn", "shared_ffn", "vocab"})
"""Axes that tensor parallelism divides."""


def _uncut_gradient_bytes(graph: Graph, sizes: Sizes, tp: Array, sp: bool) -> Array:
    """With a split sequence each rank sees a part of it: gradients of whole weights are summed."""
    total = np.zeros(len(tp))
    if sp:
        for weight in graph.weights:
            if weight.trainable and not CUT_AXES & set(weight.axes):
                total = total + volume(weight.axes, sizes) * 4
    return np.where(tp > 1, total, 0.0)


def _runs_again(graph: Graph, stops_early: bool) -> frozenset[str]:
    """Operators that run again in backward: of a checkpointed graph all of them.

    Or, where recomputation stops once everything saved is back, those before the last that saves
    something, which saves its inputs alone.
    """
    if not graph.checkpointed:
        return frozenset(op.name for op in graph.operators if op.recomputed)
    if not stops_early:
        return frozenset(op.name for op in graph.operators)
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

    def pick_each(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
        zero = np.zeros(1)
        return {n: pick(a.get(n, zero), b.get(n, zero)) for n in sorted({*a, *b})}

    return Piece(
        forward_s=pick(yes.forward_s, no.forward_s),
        backward_s=pick(yes.backward_s, no.backward_s),
        recompute_s=pick(yes.recompute_s, no.recompute_s),
        comm_forward_s=pick_each(yes.comm_forward_s, no.comm_forward_s),
        comm_backward_s=pick_each(yes.comm_backward_s, no.comm_backward_s),
        host_forward_s=pick(yes.host_forward_s, no.host_forward_s),
        host_backward_s=pick(yes.host_backward_s, no.host_backward_s),
        params=pick(yes.params, no.params),
        expert_params=pick(yes.expert_params, no.expert_params),
        trainable_params=pick(yes.trainable_params, no.trainable_params),
        tensors=yes.tensors,
        live=live(yes.live, no.live),
        boundary_bytes=pick(yes.boundary_bytes, no.boundary_bytes),
        wire_bytes=pick_each(yes.wire_bytes, no.wire_bytes),
        uncut_gradient_bytes=pick(yes.uncut_gradient_bytes, no.uncut_gradient_bytes),
    )
