"""The saved tensors of a model's layers, from the cost model's operators and prices.

What a layer needs in backward is what its graph without recompute saves; bytes, seconds of the
operators and of the collectives between them are the cost model's, so that keeping everything is
its `recompute none`. What an operator saves that is neither input nor output of any other (the
statistics of a norm, the scores of unfused attention) comes back when the operator runs again.
Compressed forms and their conversions are those of the technique `storage` (COAT, Xi et al. 2024,
arXiv 2410.19313): norms and activation functions in fp8 with scales by group, operands of matmuls
in fp8 with one scale, attention in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...costmodel import traced
from ...costmodel.exposed import Beside, exposed_s
from ...costmodel.graph import Graph, Sizes, Tensor, volume
from ...costmodel.layers import decoder_layer
from ...costmodel.layers.profiles import stack_graph
from ...costmodel.layout import Layouts, local_sizes
from ...costmodel.operator_times import OperatorTimes, operator_times
from ...costmodel.options import Options
from ...costmodel.prices import Prices
from ...costmodel.techniques import apply, local_axes, storage
from ...errors import InputError
from ...model import Layer, Model
from .problem import LayerType, Maker, SavedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the tensors of all layers of a stage follow from; `layouts` has length one."""

    model: Model
    layouts: Layouts
    seq_tokens: int
    prices: Prices
    options: Options

    def __post_init__(self) -> None:
        if len(self.layouts) != 1:
            raise InputError("layouts", len(self.layouts), "not one layout", "give one")

    @property
    def plain(self) -> Options:
        """The options without what is decided here."""
        return replace(self.options, recompute="none", activations=None, offload=0.0)


def layer_types(setting: Setting, counts: Sequence[int]) -> tuple[LayerType, ...]:
    """The layer types of a stage; `counts` says how many layers it has of each group of the model.

    Groups without a layer are left out.
    """
    groups = enumerate(zip(setting.model.layers, counts, strict=True))
    return tuple(_layer_type(setting, i, layer, n) for i, (layer, n) in groups if n > 0)


def _layer_type(setting: Setting, index: int, layer: Layer, count: int) -> LayerType:
    graph, sizes = _graph(setting, index, layer)
    layouts, prices, options = setting.layouts, setting.prices, setting.plain
    times = operator_times(graph, sizes, layouts, prices, options)
    backward_s = float(times.backward_s[0])
    if setting.model.traced is not None:
        more = apply(traced.backward_graph(traced.parts(setting.model)[1 + index]), options)
        backward_s += float(operator_times(more, sizes, layouts, prices, options).forward_s[0])
    latency_s = prices.pool.host.latency_s if prices.pool.host is not None else 0.0
    return LayerType(
        name=f"layer {index}",
        count=count,
        tensors=_tensors(graph, sizes, setting),
        makers=_makers(graph, sizes, setting, times),
        forward_s=max(0.0, float(times.forward_s[0]) - latency_s),
        backward_s=max(0.0, backward_s - latency_s),
    )


def _graph(setting: Setting, index: int, layer: Layer) -> tuple[Graph, Sizes]:
    """The graph of a layer that keeps everything, and its local sizes."""
    model, layouts, options = setting.model, setting.layouts, setting.plain
    if model.traced is not None:
        operators = traced.parts(model)[1 + index]
        return apply(traced.graph("layer", operators), options), traced.sizes(operators, layouts)
    fused = setting.prices.pool.device.kind == "gpu"
    sp = bool(layouts.sequence_parallel[0])
    if model.is_decoder:
        counted = setting.prices.pool.stack.exchanges_counts
        graph = decoder_layer(
            model, layer, sequence_parallel=sp, fused=fused, options=options, counted=counted
        )
    else:
        graph = stack_graph("layer", model, layer, sp=sp, fused=fused, options=options)
    sizes = local_axes(local_sizes(model, layer, layouts, setting.seq_tokens), options)
    return apply(graph, options), sizes


def _internal(graph: Graph) -> dict[str, list[str]]:
    """By operator: what it alone makes beyond its outputs, and keeps."""
    known = {graph.boundary.name}
    for op in graph.operators:
        known |= {t.name for t in (*op.inputs, *op.outputs)}
    found: dict[str, list[str]] = {}
    for op in graph.operators:
        found[op.name] = [t.name for t in op.saves if t.name not in known]
        known.update(found[op.name])
    return found


def _makers(
    graph: Graph, sizes: Sizes, setting: Setting, times: OperatorTimes
) -> tuple[Maker, ...]:
    """The operators with their seconds, collectives between them included."""
    internal = _internal(graph)
    outside = _outside(graph)
    prices = setting.prices
    makers: list[Maker] = []
    for op in graph.operators:
        outputs = (*(t.name for t in op.outputs), *internal[op.name])
        reads = (*op.inputs, *op.saves)
        inputs = dict.fromkeys(
            t.name for t in reads if t.name not in outputs and t.name not in outside
        )
        exchange = exposed_s(
            op.forward_collectives, sizes, setting.layouts, prices, setting.plain,
            times.forward_s,
            Beside(operators=times.beside_forward, matmuls=times.near_forward, weights={}),
        )  # fmt: skip
        seconds = float(np.broadcast_to(times.beside_forward[op.name], (1,))[0])
        makers.append(
            Maker(
                name=op.name,
                inputs=tuple(inputs),
                outputs=outputs,
                seconds=seconds * prices.scale("recompute")
                + float(sum(exchange.values(), np.zeros(1))[0]),
            )
        )
    return tuple(makers)


def _outside(graph: Graph) -> set[str]:
    """Tensors that others keep for this layer: neither made nor saved here, nor its input."""
    made = {t.name for op in graph.operators for t in op.outputs}
    kept = {t.name for op in graph.operators for t in op.saves} | {graph.boundary.name}
    return {t.name for op in graph.operators for t in op.inputs} - made - kept


def _tensors(graph: Graph, sizes: Sizes, setting: Setting) -> tuple[SavedTensor, ...]:
    """Every tensor in the order in which the forward makes it, the input first."""
    outside = _outside(graph)
    found: dict[str, Tensor] = {graph.boundary.name: graph.boundary}
    for op in graph.operators:
        for tensor in (*op.inputs, *op.outputs, *op.saves):
            if tensor.name not in outside:
                found.setdefault(tensor.name, tensor)
    needed = {t.name for op in graph.operators for t in op.saves}
    forms = _compressed_forms(graph, sizes, setting)
    return tuple(
        SavedTensor(
            name=name,
            bytes=float(np.broadcast_to(tensor.num_bytes(sizes), (1,))[0]),
            needed=name in needed,
            compressed_bytes=forms[name][0] if name in forms else None,
            compress_s=forms[name][1] if name in forms else 0.0,
            decompress_s=forms[name][2] if name in forms else 0.0,
        )
        for name, tensor in found.items()
    )


def _compressed_forms(
    graph: Graph, sizes: Sizes, setting: Setting
) -> dict[str, tuple[float, float, float]]:
    """Bytes of the fp8 form, seconds there and back, of every tensor that has one."""
    rewritten = storage.rewrite(graph, "fp8", "none")
    times = operator_times(rewritten, sizes, setting.layouts, setting.prices, setting.plain)
    saves = {t.name: t for op in graph.operators for t in op.saves}
    wide = {t.name for op in rewritten.operators for t in op.saves if t.name in saves}
    forms: dict[str, tuple[float, float, float]] = {}
    for op in rewritten.operators:
        if op.kind != "quantize_store":
            continue
        whole = sum(float(volume(t.axes, sizes)[0]) for t in op.outputs)
        for stored in op.outputs:
            name = stored.name.rpartition(".")[0]
            if name in wide or whole == 0:
                continue
            share = float(volume(stored.axes, sizes)[0]) / whole
            more = (
                float(stored.num_bytes(sizes)[0]),
                share * float(times.beside_forward[op.name][0]),
                share * float(times.beside_backward[op.name][0]),
            )
            before = forms.get(name, (0.0, 0.0, 0.0))
            forms[name] = (before[0] + more[0], before[1] + more[1], before[2] + more[2])
    return forms
