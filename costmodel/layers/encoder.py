"""Encoder layers, decoder layers that look at an encoder, and modulation by a conditioning vector.

An encoder layer is a decoder layer whose core works through the whole square of scores instead of
its causal half; context parallelism is balanced however it cuts the sequence.
"""

from __future__ import annotations

from dataclasses import replace

from ...model import Layer, Model
from ..graph import Axes, Graph, Operator, Tensor
from ..options import Options
from .attention import CORE, self_attention
from .decoder import decoder_layer
from .mlp import dense_mlp
from .parts import TOKENS, elementwise, enter, leave, linear, norm, part, whole

SOURCE: Axes = ("batch", "seq_source")
SAMPLE: Axes = ("batch",)


def encoder_layer(
    model: Model, layer: Layer, *, sequence_parallel: bool, fused: bool, options: Options
) -> Graph:
    """One bidirectional layer, modulated where its layer says so."""
    graph = decoder_layer(
        model, layer, sequence_parallel=sequence_parallel, fused=fused, options=options
    )
    graph = replace(graph, operators=tuple(map(_full_square, graph.operators)))
    return _modulated(graph) if layer.modulated else graph


def cross_decoder_layer(
    model: Model, layer: Layer, *, sequence_parallel: bool, fused: bool, options: Options
) -> Graph:
    """One layer of causal self-attention, attention over the encoder's output, and MLP."""
    sp = sequence_parallel
    x, a, x1, c, x2, d, y = (
        part(n) for n in ("x", "attention.out", "x1", "cross.out", "x2", "mlp.out", "y")
    )
    ops = [
        *self_attention(model, layer, x, a, sp=sp, fused=fused, options=options),
        elementwise("attention_residual", "add", (x, a), x1),
        *_cross_attention(layer, x1, c, sp=sp, fused=fused),
        elementwise("cross_residual", "add", (x1, c), x2),
        *dense_mlp(layer, x2, d, sp=sp, fused=fused),
        elementwise("mlp_residual", "add", (x2, d), y),
    ]
    return Graph(name="layer", operators=tuple(ops), boundary=x)


def _full_square(op: Operator) -> Operator:
    """The attention core over all keys instead of those before each query."""
    if op.name != CORE:
        return op
    axes = (("batch", "heads"), ("seq",), ("core_dim",), ("seq_whole",))
    return replace(op, kind="attention_full", price_axes=axes)


def _cross_attention(
    layer: Layer, x: Tensor, out: Tensor, *, sp: bool, fused: bool
) -> list[Operator]:
    """Queries from the decoder, keys and values from the encoder's output.

    That output is one tensor for all layers: it is kept once, by what stands before them
    (`layers/inputs.py`), not here. Its gradient is summed over the layers.
    """
    normed, entered, partial = part("cross_norm.out"), whole("cross.in"), whole("cross.partial")
    source = Tensor(name="source", axes=("batch", "seq_source_part", "hidden_source"))
    gathered = Tensor(name="source.in", axes=(*SOURCE, "hidden_source"))
    width: Axes = ("heads", "head_dim")
    kv_width: Axes = ("kv_heads", "head_dim")
    q, o = (Tensor(name=f"cross.{n}", axes=(*TOKENS, *width)) for n in ("q", "o"))
    k, v = (Tensor(name=f"cross.{n}", axes=(*SOURCE, *kv_width)) for n in ("k", "v"))
    lse = Tensor(name="cross.lse", axes=(*TOKENS, "heads"), dtype="fp32")
    bias = layer.bias or layer.qkv_bias
    keys = linear("cross.wk", gathered, k, ("hidden_source",), kv_width, bias, tokens=SOURCE)
    values = linear("cross.wv", gathered, v, ("hidden_source",), kv_width, bias, tokens=SOURCE)
    return [
        norm("cross_norm", layer.norm, x, normed, fused=fused),
        enter("cross.enter", normed, entered, sp),
        linear("cross.wq", entered, q, ("hidden",), width, bias),
        enter("source.enter", source, gathered, sp),
        replace(keys, saves=()),
        replace(values, saves=()),
        Operator(
            name="cross_core",
            kind="attention_full",
            price_axes=(("batch", "heads"), ("seq",), ("head_dim",), ("seq_source",)),
            inputs=(q, k, v),
            outputs=(o,),
            saves=(q, k, v, o, lse),
        ),
        linear("cross.wo", o, partial, width, ("hidden",), layer.bias),
        leave("cross.leave", partial, out, sp),
    ]


def modulation(name: str, width: str) -> tuple[Tensor, list[Operator]]:
    """The linear layer from the conditioning vector to `width` scales, shifts and gates.

    It works once per sample and is not split by tp.
    """
    vector = Tensor(name="conditioning", axes=(*SAMPLE, "hidden"))
    active = Tensor(name=f"{name}.in", axes=vector.axes)
    out = Tensor(name=f"{name}.out", axes=(*SAMPLE, width))
    return out, [
        elementwise(f"{name}.silu", "silu", (vector,), active, saves=(vector,)),
        linear(name, active, out, ("hidden",), (width,), True, tokens=SAMPLE),
    ]


def modulate(op: Operator, factors: Tensor) -> list[Operator]:
    """A norm without weights, then scale and shift by `factors` under the norm's output name."""
    out = op.outputs[0]
    hat = replace(out, name=f"{op.name}.hat")
    plain = replace(op, weights=(), outputs=(hat,))
    return [
        plain,
        elementwise(f"{op.name}.modulate", "modulate", (hat, factors), out, saves=(hat, factors)),
    ]


def _modulated(graph: Graph) -> Graph:
    """Norms scaled and shifted, residual branches gated, all by the conditioning vector."""
    factors, operators = modulation("modulation", "modulation")
    for op in graph.operators:
        if op.name in ("attention_norm", "mlp_norm"):
            operators += modulate(op, factors)
        elif op.name in ("attention_residual", "mlp_residual"):
            skip, branch = op.inputs
            gated = replace(branch, name=f"{branch.name}.gated")
            gate = elementwise(
                f"{op.name}.gate", "gate", (branch, factors), gated, saves=(branch, factors)
            )
            operators += [gate, replace(op, inputs=(skip, gated))]
        else:
            operators.append(op)
    return replace(graph, operators=tuple(operators), weights=())
