"""Seconds and bytes of one piece of the model - a layer, the embedding, the head - for one
micro-batch.

Times are kept apart by what they are (matmuls and other operators, exposed tensor-parallel
communication, host), because the report prints them apart.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..cluster import Pool
from ..model import Layer, Model
from ..traced import TracedOperator, TracedWeight
from . import traced
from .exposed import (
    Beside,
    again_collectives,
    backward_collectives,
    exposed_copy_s,
    exposed_s,
    forward_collectives,
    ranks_of,
    wire_bytes,
)
from .graph import Array, Collective, Graph, Sizes, Tensor, volume
from .halo_levels import LEVELS
from .layers import decoder_layer, embedding, head
from .layers.attention import CORE
from .layers.profiles import stack_graph
from .layers.rings import BLOCKS
from .layout import Layouts, local_sizes
from .liveness import Liveness, liveness, saved_tensors
from .operator_times import OperatorTimes, operator_times, waiting_bytes
from .options import Options
from .packing import packing_sizes
from .prices import Prices
from .state_bytes import in_units
from .techniques import apply, local_axes, lora, offload, precision
from .techniques.halo import CODES
from .trained import TrainedTensor, trained_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Costs of one micro-batch through one piece."""

    options: Options
    """What it is priced under."""
    forward_s: Array
    backward_s: Array
    """Without recomputation and communication."""
    weight_s: Array
    """Part of `backward_s` that no other stage waits for: the gradients of weights."""
    waiting_bytes: Array
    """What that part needs where it is put off: inputs and output gradients of matmuls."""
    recompute_s: Array
    streaming_s: Array
    """Part of `forward_s` and `backward_s` that is bound by memory."""
    comm_forward_s: dict[str, Array]
    """Exposed communication by mesh axis (tp, cp, ep)."""
    comm_backward_s: dict[str, Array]
    host_forward_s: Array
    """What the host adds. Of a head it is negative by what its device work hides of the layers'."""
    host_backward_s: Array
    spare_forward_s: Array
    """What the device works on after the host has launched all of it."""
    spare_backward_s: Array
    params: Array
    """Local parameters (elements), after tensor parallelism, before data-parallel sharding; those
    of routed experts not included."""
    expert_params: Array
    """Local parameters of routed experts, after expert and tensor parallelism. They are replicated
    over dp * cp / ep ranks."""
    trainable_params: Array
    """Those of `params` that have gradients and optimiser states."""
    trainable_expert_params: Array
    """The same of `expert_params`."""
    spared_bytes: Array
    """What frozen weights among `params` take less than in the dtype of use."""
    spared_expert_bytes: Array
    """The same of `expert_params`."""
    gathered_codes: Array
    """Those of `params` whose codes of one byte are gathered in place of them."""
    coded_tensors: int
    """The tensors that they are."""
    tensors: int
    """Parameter tensors."""
    trained: tuple[TrainedTensor, ...]
    """Those with optimiser states."""
    live: Liveness
    moved_bytes: Array
    """Off the device, and later back, per micro-batch."""
    stays: Array
    """Share of what is saved that stays on the device."""
    lands_bytes: Array
    """Of the buffer that what was moved comes back into."""
    boundary_bytes: Array
    wire_bytes: dict[str, Array]
    """Per micro-batch, `collective@axis`: bytes of the logical buffers."""
    again_wire_bytes: dict[str, Array]
    """The part of it that tokens made again exchange."""
    uncut_gradient_bytes: Array
    """Per step: gradients of weights that tp does not cut, which its ranks sum: all of them under
    sp, else those of routers and adapters."""

    def take(self, rows: NDArray[np.intp]) -> Piece:
        """The costs under the layouts at these positions."""
        return Piece(**{f.name: taken(getattr(self, f.name), rows) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """All pieces of a model under many layouts."""

    embedding: Piece
    layers: tuple[Piece, ...]
    """One per entry of `model.layers`."""
    head: Piece
    tied_params: Array
    """Local parameters of the table where embedding and head share one, else zero."""

    @property
    def tied_trained(self) -> Array:
        """Those that have a gradient."""
        return np.minimum(self.tied_params, self.embedding.trainable_params)

    def take(self, rows: NDArray[np.intp]) -> Pieces:
        """The pieces under the layouts at these positions; like layers stay one object."""
        known: dict[int, Piece] = {}
        for piece in self.layers:
            if id(piece) not in known:
                known[id(piece)] = piece.take(rows)
        return Pieces(
            embedding=self.embedding.take(rows),
            layers=tuple(known[id(piece)] for piece in self.layers),
            head=self.head.take(rows),
            tied_params=taken(self.tied_params, rows),
        )


T = TypeVar("T")


def taken(value: T, rows: NDArray[np.intp]) -> T:
    """`value` with every array in it at these positions; arrays of length one hold for all."""
    if isinstance(value, np.ndarray):
        return cast("T", value if len(value) == 1 else value[rows])
    if isinstance(value, dict):
        return cast("T", {name: taken(part, rows) for name, part in value.items()})
    if isinstance(value, tuple):
        return cast("T", tuple(taken(part, rows) for part in value))
    if isinstance(value, (Liveness, TrainedTensor)):
        own = {f.name: taken(getattr(value, f.name), rows) for f in fields(value)}
        return cast("T", type(value)(**own))
    return value


Known = dict[bytes, Piece]
"""Pieces by all that they depend on: plans of one model share most of theirs."""


def pieces(
    model: Model,
    layouts: Layouts,
    seq_tokens: int,
    prices: Prices,
    options: Options,
    by_layer: Sequence[Options] | None = None,
    known: Known | None = None,
) -> Pieces:
    """The costs of every piece of a model under each layout.

    `options` are those of the whole, `by_layer` those of each of `model.layers` where they differ.
    What is in `known` is taken from there, what is not is added.
    """
    each = tuple(by_layer or (options,) * len(model.layers))
    if model.traced is not None:
        return _traced_pieces(model, layouts, prices, options, each)
    here: dict[tuple[str, Layer, Options], Piece] = {}

    def one(build: str, layer: Layer, options: Options) -> Piece:
        place = (build, _nearby(model, layer)[1], options)
        if place not in here:
            here[place] = _priced(build, layer, model, layouts, seq_tokens, prices, options, known)
        return here[place]

    first, last = model.layers[0], model.layers[-1]
    table = model.vocab * model.hidden / layouts.tp
    if options.runtime == "compiled" and not prices.pool.stack.compiles_ends:
        options = replace(options, runtime="eager")
    found = Pieces(
        embedding=one("embedding", first, options),
        layers=tuple(one("layer", x, own) for x, own in zip(model.layers, each, strict=True)),
        head=one("head", last, options),
        tied_params=table if model.tied_embeddings else 0.0 * table,
    )
    return replace(found, head=_hiding(found.head, model, [found.layers], prices))


def _hiding(
    head: Piece, model: Model, policies: Sequence[Sequence[Piece]], prices: Prices
) -> Piece:
    """The head with what it hides of the layers' host time, whichever policy they are under.

    The host runs ahead of a device that works on the head's large matmul and loss, so that layers
    which take longer to launch than to compute catch up there:

        max(0, sum over layers of host_s - spare_s)   at most for the rank that holds the head

    Where the host waits for the device behind the head's forward, that is so in backward alone,
    which begins with the head.
    """

    def hidden(way: str) -> Array:
        of_layers = [
            sum(
                (group.repeat * getattr(piece, f"host_{way}_s") for group, piece in
                 zip(model.layers, layers, strict=True)), np.zeros(1),
            )
            for layers in policies
        ]  # fmt: skip
        return np.minimum(getattr(head, f"spare_{way}_s"), np.max(of_layers, axis=0))

    once_s = prices.pool.stack.host_s_per_micro_batch
    back = hidden("backward")
    there = 0.0 * back if prices.pool.stack.host_waits else hidden("forward")
    return replace(
        head,
        host_forward_s=np.maximum(head.host_forward_s, 0.0) - there + once_s,
        host_backward_s=np.maximum(head.host_backward_s, 0.0) - back,
    )


def pieces_of_each(
    model: Model,
    layouts: Layouts,
    seq_tokens: int,
    prices: Prices,
    policies: Sequence[Options],
    known: Known | None = None,
) -> list[Pieces]:
    """`pieces` under each of several options that differ in what layers keep for backward: the ends
    of the model, which keep all, are the same."""
    first = pieces(model, layouts, seq_tokens, prices, policies[0], None, known)
    if len(policies) == 1:
        return [first]
    others = [
        pieces(model, layouts, seq_tokens, prices, own, None, known).layers
        if model.traced is not None
        else tuple(
            _priced("layer", layer, model, layouts, seq_tokens, prices, own, known)
            for layer in model.layers
        )
        for own in policies[1:]
    ]
    every = [first.layers, *others]
    head = first.head if model.traced is not None else _hiding(first.head, model, every, prices)
    return [replace(first, layers=layers, head=head) for layers in every]


def graph_and_sizes(
    model: Model,
    layer: Layer,
    layout: Layouts,
    seq_tokens: int,
    prices: Prices,
    options: Options,
) -> tuple[Graph, Sizes]:
    """The rewritten graph of a layer under one layout, and the local sizes of its axes."""
    near, layer = _nearby(model, layer)
    split = bool(layout.sequence_parallel[0])
    graph = _graph("layer", near, layer, split, *_of_pool(prices.pool, options))
    return graph, local_axes(local_sizes(near, layer, layout, seq_tokens), options)


def _of_pool(pool: Pool, options: Options) -> tuple[bool, Options, bool, bool, bool]:
    """What a graph depends on besides its layer: fused norms, options, kept operands, casts, counts
    of rows that ranks tell each other."""
    stack, low = pool.stack, options.compute != options.tensor_dtype
    low = low and options.recipe not in LEVELS  # which say themselves what is cast and kept
    fused = pool.device.kind == "gpu"
    return (
        fused,
        options,
        stack.keeps_operands and low,
        stack.casts_weights and low,
        stack.exchanges_counts,
    )


def _priced(
    build: str,
    layer: Layer,
    model: Model,
    layouts: Layouts,
    seq_tokens: int,
    prices: Prices,
    options: Options,
    known: Known | None,
) -> Piece:
    """A piece, out of those that are known; how it is updated is no matter."""
    near, layer = _nearby(model, layer)
    options = replace(options, optimizer="adamw", clips=False)
    if known is None or prices.profile is not None:  # curves depend on the whole mesh
        return _both(build, near, layer, layouts, seq_tokens, prices, options)
    key = _key(build, near, layer, layouts, seq_tokens, prices, options)
    if key not in known:
        known[key] = _both(build, near, layer, layouts, seq_tokens, prices, options)
    return known[key]


def _both(
    build: str,
    near: Model,
    layer: Layer,
    layouts: Layouts,
    seq_tokens: int,
    prices: Prices,
    options: Options,
) -> Piece:
    """A piece under layouts with a split sequence and without."""
    sizes = local_axes(local_sizes(near, layer, layouts, seq_tokens), options)
    sizes = {**sizes, **packing_sizes(options.packing, options.cp_kind, layouts)}
    variants: list[Piece] = []
    for sp in np.unique(layouts.sequence_parallel):
        plain = replace(options, packing=None)  # which changes no operator
        graph = _graph(build, near, layer, bool(sp), *_of_pool(prices.pool, plain))
        variants.append(_piece(graph, sizes, layouts, prices, options, bool(sp)))
    if len(variants) == 1:
        return variants[0]
    return _choose(layouts.sequence_parallel > 0, variants[1], variants[0])


def kept_by_tensor(
    build: str,
    model: Model,
    layer: Layer,
    layouts: Layouts,
    seq_tokens: int,
    prices: Prices,
    options: Options,
) -> dict[str, Array]:
    """What a micro-batch keeps of one piece under one layout: bytes by tensor."""
    if model.traced is not None:
        prefix, *layers, suffix = traced.parts(model)
        ends = {"embedding": prefix, "head": suffix}
        operators = layers[model.layers.index(layer)] if build == "layer" else ends[build]
        graph = apply(traced.graph(build, operators), options)
        return saved_tensors(graph, traced.sizes(operators, layouts))
    near, layer = _nearby(model, layer)
    sizes = local_axes(local_sizes(near, layer, layouts, seq_tokens), options)
    split = bool(layouts.sequence_parallel[0])
    graph = _graph(build, near, layer, split, *_of_pool(prices.pool, options))
    return saved_tensors(graph, sizes)


def _nearby(model: Model, layer: Layer) -> tuple[Model, Layer]:
    """What a piece depends on: of a decoder neither its depth nor its other layers."""
    once = msgspec.structs.replace(layer, repeat=1)
    if not model.is_decoder:
        return model, once
    return msgspec.structs.replace(model, name="", layers=(once,), source=""), once


def _key(
    build: str,
    near: Model,
    layer: Layer,
    layouts: Layouts,
    seq_tokens: int,
    prices: Prices,
    options: Options,
) -> bytes:
    """All that a piece depends on without a profile: not pp, the number of nodes, nor, but for
    losses and counts over all samples and packed documents, dp."""
    degrees = [
        layouts.micro_batch_seqs, layouts.tp, layouts.cp, layouts.ulysses, layouts.ep,
        layouts.expert_tp, layouts.sequence_parallel, layouts.zero,
    ]  # fmt: skip
    over_samples = options.packing is not None or options.balance_loss == "global-batch"
    if not near.is_decoder or over_samples:
        degrees.append(layouts.replicas)
    if options.packing is not None:
        degrees += [layouts.num_microbatches, layouts.pp]
    pool = msgspec.structs.replace(prices.pool, num_nodes=1)
    local = [degree.tolist() for degree in degrees]
    return msgspec.json.encode((build, near, layer, local, seq_tokens, pool, options))


def _traced_pieces(
    model: Model, layouts: Layouts, prices: Prices, options: Options, by_layer: Sequence[Options]
) -> Pieces:
    """The pieces of a traced module: prefix, layers, suffix; cut ones where tp divides it."""
    assert model.traced is not None

    def piece(
        name: str,
        operators: Sequence[TracedOperator],
        options: Options,
        more: Sequence[TracedWeight],
    ) -> Piece:
        sizes = {**traced.sizes(operators, layouts), **traced.weight_table(more, layouts)}
        there = apply(traced.graph(name, operators, more), options)
        back = apply(traced.backward_graph(operators), options)
        costs = _piece(there, sizes, layouts, prices, options, False)
        again = _piece(back, sizes, layouts, prices, options, False)
        return replace(
            costs,
            backward_s=costs.backward_s + again.forward_s,
            host_backward_s=costs.host_backward_s + again.host_forward_s,
        )

    def all_pieces(divided: bool) -> list[Piece]:
        prefix, *layers, suffix = traced.parts(model, divided)
        shared = traced.shared_weights(model, divided)
        return [
            piece("embedding", prefix, options, ()),
            *(piece("layer", x, own, ()) for x, own in zip(layers, by_layer, strict=True)),
            piece("head", suffix, options, shared),
        ]

    made = all_pieces(divided=False)
    if model.traced.divided is not None and np.any(layouts.tp > 1):
        cut = all_pieces(divided=True)
        made = [_choose(layouts.tp > 1, c, m) for c, m in zip(cut, made, strict=True)]
    embedding, *layers, head = made
    return Pieces(
        embedding=embedding,
        layers=tuple(layers),
        head=head,
        tied_params=traced.shared_params(model, layouts),
    )


@functools.lru_cache(maxsize=512)
def _graph(
    build: str,
    model: Model,
    layer: Layer,
    sp: bool,
    fused: bool,
    options: Options,
    keeps_operands: bool,
    casts_weights: bool,
    counted: bool,
) -> Graph:
    """The rewritten graph of a piece: it does not depend on the layout, so that one serves all."""
    graph = apply(_plain_graph(build, model, layer, sp, fused, options, counted), options)
    if casts_weights:
        graph = precision.cast_weights(graph)
    return precision.keep_operands(graph, options.compute) if keeps_operands else graph


def layer_graph(model: Model, layer: Layer, options: Options, pool: Pool, sp: bool) -> Graph:
    """The rewritten graph of a layer of a model on the devices and the stack of a pool."""
    near, layer = _nearby(model, layer)
    fused, counted = pool.device.kind == "gpu", pool.stack.exchanges_counts
    return _graph("layer", near, layer, sp, fused, options, False, False, counted)


def _plain_graph(
    build: str,
    model: Model,
    layer: Layer,
    sp: bool,
    fused: bool,
    options: Options,
    counted: bool,
) -> Graph:
    if not model.is_decoder:
        return stack_graph(build, model, layer, sp=sp, fused=fused, options=options)
    if build == "embedding":
        return embedding(model, sequence_parallel=sp)
    if build == "head":
        return head(model, sequence_parallel=sp, fused=fused)
    return decoder_layer(
        model, layer, sequence_parallel=sp, fused=fused, options=options, counted=counted
    )


RUNTIME_LAUNCHES = {"eager": 1.0, "compiled": 0.5, "graphs": 0.05}
"""Host time per operator relative to eager launches: a compiled layer has about half the kernels, a
captured graph is launched as a whole. Assumed."""


def _coded(graph: Graph) -> list[Tensor]:
    """Weights that are gathered as codes."""
    return [weight for weight in graph.weights if weight.dtype == CODES]


def _piece(
    graph: Graph, sizes: Sizes, layouts: Layouts, prices: Prices, options: Options, sp: bool
) -> Piece:
    zero = np.zeros(len(layouts))
    times = operator_times(graph, sizes, layouts, prices, options)
    live = liveness(graph, sizes, lands=offload.moves(options) and graph.name == "layer")
    there = forward_collectives(graph, options, prices)
    back = backward_collectives(graph, times.again, options)
    host_forward, host_backward = _host(graph, sizes, layouts, prices, options, times.again, sp)
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
    launching, launching_back = _launching(graph, times, prices, options)
    hooks, hooks_back = _hooks_s(graph, layouts, prices, options)
    floor_forward, spare_forward = _floor(
        times.forward_s, comm_forward, launching + hooks, there, layouts, prices
    )
    floor_backward, spare_backward = _floor(
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


def _launching(
    graph: Graph, times: OperatorTimes, prices: Prices, options: Options
) -> tuple[float, float]:
    """Host time to launch a piece's operators on a GPU, forward and backward, Python included."""
    launch_s = prices.launch_s * RUNTIME_LAUNCHES[options.runtime]
    forward, backward = times.forward_launches * launch_s, times.backward_launches * launch_s
    if graph.name != "layer":
        return forward, backward
    glue = prices.beside("layer_forward"), prices.beside("layer_backward")
    if options.runtime == "compiled" and prices.beside("compiled_layer_forward"):
        forward, backward = (prices.beside(f"compiled_layer_{d}") for d in ("forward", "backward"))
        glue = 0.0, 0.0
    if graph.checkpointed:
        again = forward if options.runtime == "compiled" else 0.0  # launches of eager ones are in
        backward += again + glue[0] + prices.beside("checkpoint")
    return forward + glue[0], backward + glue[1]


def _hooks_s(
    graph: Graph, layouts: Layouts, prices: Prices, options: Options
) -> tuple[Array, Array]:
    """Host time of the hooks around an FSDP unit, which on a GPU runs beside the device."""
    stack = prices.pool.stack
    if graph.name != "layer" or prices.launch_s == 0.0 or stack.sharding != "fsdp":
        return np.zeros(1), np.zeros(1)
    units = in_units(layouts, options, stack)
    forward = prices.beside("fsdp_unit_forward", stack.host_s_per_unit)
    backward = prices.beside("fsdp_unit_backward", stack.host_s_per_unit)
    return np.where(units, forward, 0.0), np.where(units, backward, 0.0)


def _floor(
    compute_s: Array,
    comm_s: dict[str, Array],
    launching_s: Array,
    collectives: Sequence[Collective],
    layouts: Layouts,
    prices: Prices,
) -> tuple[Array, Array]:
    """What a piece takes beyond its device work because the host must launch it, and how much
    longer the device works on it than the host.

    Host and device work side by side: together (device^q + host^q)^(1/q).
    """
    if not np.any(launching_s):
        return np.zeros(1), np.zeros(1)
    stack = prices.pool.stack
    device_s = sum(comm_s.values(), compute_s)
    host_s = launching_s
    for c in collectives:
        host_s = host_s + np.where(ranks_of(c.axis, layouts) > 1, stack.host_s_per_collective, 0.0)
    q = stack.host_smoothness
    floor = (device_s**q + host_s**q) ** (1 / q) - device_s
    return floor, np.maximum(device_s - host_s, 0.0)


def _host(
    graph: Graph,
    sizes: Sizes,
    layouts: Layouts,
    prices: Prices,
    options: Options,
    again: frozenset[str],
    sp: bool,
) -> tuple[Array, Array]:
    """Host time beyond the operators: Python and autograd glue, DTensor dispatch, checkpoints."""
    if graph.name != "layer":
        return np.zeros(1), np.zeros(1)
    routed = any(op.kind == "routing" for op in graph.operators)
    forward, backward = prices.host("layer_forward"), prices.host("layer_backward")
    if routed:
        forward = max(forward, prices.host("expert_layer_forward"))
        backward = max(backward, prices.host("expert_layer_backward"))
    if graph.checkpointed:
        backward += forward + prices.host("checkpoint")
    prefix = "tp_sp_layer" if sp else "tp_layer"
    tp = layouts.tp > 1
    extra = prices.host(f"{prefix}_backward")
    if graph.checkpointed:
        extra += prices.host(f"{prefix}_forward")
    forward = forward + np.where(tp, prices.host(f"{prefix}_forward"), 0.0)
    backward = backward + np.where(tp, extra, 0.0)
    if "ring" not in sizes:  # a traced module
        return forward, backward
    several = {"ring_block": (sizes[BLOCKS[options.cp_kind][0]], CORE in again),
               "ulysses_layer": (layouts.ulysses > 1, graph.checkpointed),
               "ep_layer": ((layouts.ep > 1) & routed, graph.checkpointed)}  # fmt: skip
    if "documents" in sizes:  # those of a rank's share of the sequence, of every row
        count = sizes["batch"] * np.maximum(sizes["documents"] / sizes["ring"], 1.0)
        several["document"] = (count, CORE in again)
    for name, (count, twice) in several.items():
        one = prices.host(f"{name}_forward")
        forward = forward + count * one
        backward = backward + count * (prices.host(f"{name}_backward") + twice * one)
    return forward, backward


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
            landed=pick(a.landed, b.landed),
        )

    def pick_each(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
        zero = np.zeros(1)
        return {n: pick(a.get(n, zero), b.get(n, zero)) for n in sorted({*a, *b})}

    def pick_tensors() -> tuple[TrainedTensor, ...]:
        cut, whole = ({t.name: t for t in piece.trained} for piece in (yes, no))
        none = np.zeros(1)
        return tuple(
            replace(
                tensor,
                rows=pick(cut[name].rows if name in cut else none,
                          whole[name].rows if name in whole else none),
                columns=pick(cut.get(name, tensor).columns, whole.get(name, tensor).columns),
            )
            for name, tensor in {**whole, **cut}.items()
        )  # fmt: skip

    return Piece(
        options=yes.options,
        forward_s=pick(yes.forward_s, no.forward_s),
        backward_s=pick(yes.backward_s, no.backward_s),
        weight_s=pick(yes.weight_s, no.weight_s),
        waiting_bytes=pick(yes.waiting_bytes, no.waiting_bytes),
        recompute_s=pick(yes.recompute_s, no.recompute_s),
        streaming_s=pick(yes.streaming_s, no.streaming_s),
        comm_forward_s=pick_each(yes.comm_forward_s, no.comm_forward_s),
        comm_backward_s=pick_each(yes.comm_backward_s, no.comm_backward_s),
        host_forward_s=pick(yes.host_forward_s, no.host_forward_s),
        host_backward_s=pick(yes.host_backward_s, no.host_backward_s),
        spare_forward_s=pick(yes.spare_forward_s, no.spare_forward_s),
        spare_backward_s=pick(yes.spare_backward_s, no.spare_backward_s),
        params=pick(yes.params, no.params),
        expert_params=pick(yes.expert_params, no.expert_params),
        trainable_params=pick(yes.trainable_params, no.trainable_params),
        trainable_expert_params=pick(yes.trainable_expert_params, no.trainable_expert_params),
        spared_bytes=pick(yes.spared_bytes, no.spared_bytes),
        spared_expert_bytes=pick(yes.spared_expert_bytes, no.spared_expert_bytes),
        gathered_codes=pick(yes.gathered_codes, no.gathered_codes),
        coded_tensors=yes.coded_tensors,
        tensors=yes.tensors,
        trained=pick_tensors(),
        live=live(yes.live, no.live),
        moved_bytes=pick(yes.moved_bytes, no.moved_bytes),
        stays=pick(yes.stays, no.stays),
        lands_bytes=pick(yes.lands_bytes, no.lands_bytes),
        boundary_bytes=pick(yes.boundary_bytes, no.boundary_bytes),
        wire_bytes=pick_each(yes.wire_bytes, no.wire_bytes),
        again_wire_bytes=pick_each(yes.again_wire_bytes, no.again_wire_bytes),
        uncut_gradient_bytes=pick(yes.uncut_gradient_bytes, no.uncut_gradient_bytes),
    )
