"""The rewritten graphs of pieces: what they depend on, and what a micro-batch keeps of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import msgspec

from ..cluster import Pool
from ..model import Layer, Model
from . import traced
from .graph import Array, Graph, Sizes
from .halo_levels import LEVELS
from .layers import decoder_layer, embedding, head
from .layers.profiles import stack_graph
from .layout import Layouts, local_sizes
from .liveness import saved_tensors
from .options import Options
from .prices import Prices
from .techniques import apply, local_axes, precision


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOf:
    """All that the graph of a piece depends on. A layout is not among it: one graph serves all."""

    build: str
    """Of the embedding, a layer or the head."""
    model: Model
    """As `nearby` has it."""
    layer: Layer
    options: Options
    sequence_parallel: bool
    fused: bool
    """Norms and losses are one kernel."""
    counted: bool
    """Ranks tell each other how many rows they exchange."""
    keeps_operands: bool = False
    """Of matmuls, in the dtype that they multiply in."""
    casts_weights: bool = False

    @classmethod
    def on(
        cls,
        pool: Pool,
        build: str,
        near: Model,
        layer: Layer,
        options: Options,
        sequence_parallel: bool,
    ) -> GraphOf:
        """With what the devices and the stack of a pool add."""
        stack, low = pool.stack, options.compute != options.tensor_dtype
        low = low and options.recipe not in LEVELS  # which say themselves what is cast and kept
        return cls(
            build=build,
            model=near,
            layer=layer,
            options=options,
            sequence_parallel=sequence_parallel,
            fused=pool.device.kind == "gpu",
            counted=stack.exchanges_counts,
            keeps_operands=stack.keeps_operands and low,
            casts_weights=stack.casts_weights and low,
        )


@functools.lru_cache(maxsize=512)
def graph_of(of: GraphOf) -> Graph:
    """The rewritten graph of a piece."""
    graph = apply(_plain_graph(of), of.options)
    if of.casts_weights:
        graph = precision.cast_weights(graph)
    return precision.keep_operands(graph, of.options.compute) if of.keeps_operands else graph


def _plain_graph(of: GraphOf) -> Graph:
    """The graph before it is rewritten."""
    split = of.sequence_parallel
    if not of.model.is_decoder:
        return stack_graph(
            of.build, of.model, of.layer, sp=split, fused=of.fused, options=of.options
        )
    if of.build == "embedding":
        return embedding(of.model, sequence_parallel=split)
    if of.build == "head":
        return head(of.model, sequence_parallel=split, fused=of.fused)
    return decoder_layer(
        of.model, of.layer, sequence_parallel=split, fused=of.fused, options=of.options,
        counted=of.counted,
    )  # fmt: skip


def layer_graph(model: Model, layer: Layer, options: Options, pool: Pool, sp: bool) -> Graph:
    """The rewritten graph of a layer of a model on the devices and the stack of a pool, without
    what the stack casts and keeps."""
    near, layer = nearby(model, layer)
    of = GraphOf.on(pool, "layer", near, layer, options, sp)
    return graph_of(replace(of, keeps_operands=False, casts_weights=False))


def graph_and_sizes(
    model: Model,
    layer: Layer,
    layout: Layouts,
    seq_tokens: int,
    prices: Prices,
    options: Options,
) -> tuple[Graph, Sizes]:
    """The rewritten graph of a layer under one layout, and the local sizes of its axes."""
    return _under("layer", model, layer, layout, seq_tokens, prices, options)


def _under(
    build: str,
    model: Model,
    layer: Layer,
    layout: Layouts,
    seq_tokens: int,
    prices: Prices,
    options: Options,
) -> tuple[Graph, Sizes]:
    """The rewritten graph of a piece under one layout, and the local sizes of its axes."""
    near, layer = nearby(model, layer)
    split = bool(layout.sequence_parallel[0])
    graph = graph_of(GraphOf.on(prices.pool, build, near, layer, options, split))
    return graph, local_axes(local_sizes(near, layer, layout, seq_tokens), options)


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
    return saved_tensors(*_under(build, model, layer, layouts, seq_tokens, prices, options))


def nearby(model: Model, layer: Layer) -> tuple[Model, Layer]:
    """What a piece depends on: of a decoder neither its depth nor its other layers."""
    once = msgspec.structs.replace(layer, repeat=1)
    if not model.is_decoder:
        return model, once
    return msgspec.structs.replace(model, name="", layers=(once,), source=""), once
