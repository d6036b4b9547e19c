"""Each layer kind as a graph of operators: the counterpart of `executors/decoder.py`.

Where a tensor-parallel producer and consumer disagree on a tensor's layout, a collective stands on
the edge: partial sums become whole by all-reduce (or by reduce-scatter onto a split sequence), a
split sequence becomes whole by all-gather; the backward of each is its mirror image.
"""

from __future__ import annotations

from ..model import Layer, Model
from .graph import Axes, Collective, Graph, Operator, Tensor

TOKENS: Axes = ("batch", "seq")
PART: Axes = ("batch", "seq_part")


def _whole(name: str) -> Tensor:
    return Tensor(name=name, axes=(*TOKENS, "hidden"))


def _part(name: str) -> Tensor:
    return Tensor(name=name, axes=(*PART, "hidden"))


def linear(
    name: str,
    x: Tensor,
    out: Tensor,
    width_in: Axes,
    width_out: Axes,
    bias: bool,
    *,
    forward_collectives: tuple[Collective, ...] = (),
    tokens: Axes = TOKENS,
) -> Operator:
    """A matmul (tokens, width_in) -> (tokens, width_out) with its weight."""
    weights = [Tensor(name=f"{name}.weight", axes=(*width_out, *width_in), dtype="param")]
    if bias:
        weights.append(Tensor(name=f"{name}.bias", axes=width_out, dtype="param"))
    return Operator(
        name=name,
        kind="linear",
        price_axes=(tokens, width_out, width_in),
        inputs=(x,),
        outputs=(out,),
        saves=(x,),
        weights=tuple(weights),
        forward_collectives=forward_collectives,
    )


def norm(name: str, kind: str, x: Tensor, out: Tensor, *, fused: bool) -> Operator:
    """RMSNorm or LayerNorm; without a fused kernel RMSNorm keeps its normalised input as well."""
    rows = Tensor(name=f"{name}.rstd", axes=x.axes[:-1], dtype="fp32")
    saves: tuple[Tensor, ...]
    if kind == "rmsnorm" and not fused:
        # Composed from elementary operators in fp32: in 16-bit the input is kept as an fp32 copy.
        upcast = Tensor(name=f"{name}.x", axes=x.axes, dtype="upcast")
        hat = Tensor(name=f"{name}.normalised", axes=x.axes, dtype="fp32")
        saves = (x, upcast, hat, rows)
    elif kind == "layernorm":
        saves = (x, rows, Tensor(name=f"{name}.mean", axes=x.axes[:-1], dtype="fp32"))
    else:
        saves = (x, rows)
    weights = [Tensor(name=f"{name}.weight", axes=("hidden",), dtype="param")]
    if kind == "layernorm":
        weights.append(Tensor(name=f"{name}.bias", axes=("hidden",), dtype="param"))
    return Operator(
        name=name,
        kind=kind,
        price_axes=(x.axes[:-1], x.axes[-1:]),
        inputs=(x,),
        outputs=(out,),
        saves=saves,
        weights=tuple(weights),
    )


def elementwise(
    name: str, kind: str, inputs: tuple[Tensor, ...], out: Tensor, saves: tuple[Tensor, ...] = ()
) -> Operator:
    """An operator priced by the elements of its output."""
    return Operator(
        name=name, kind=kind, price_axes=(out.axes,), inputs=inputs, outputs=(out,), saves=saves
    )


def _enter(x: Tensor, sequence_parallel: bool) -> tuple[Collective, ...]:
    """Forward collective on entering tensor-parallel matmuls."""
    return (Collective(kind="all_gather", axis="tp", buffer=x),) if sequence_parallel else ()


def _enter_backward(x: Tensor, sequence_parallel: bool) -> tuple[Collective, ...]:
    kind = "reduce_scatter" if sequence_parallel else "all_reduce"
    return (Collective(kind=kind, axis="tp", buffer=x),)


def _leave(x: Tensor, sequence_parallel: bool) -> tuple[Collective, ...]:
    """Forward collective on leaving them with partial sums."""
    kind = "reduce_scatter" if sequence_parallel else "all_reduce"
    return (Collective(kind=kind, axis="tp", buffer=x),)


def _leave_backward(x: Tensor, sequence_parallel: bool) -> tuple[Collective, ...]:
    return (Collective(kind="all_gather", axis="tp", buffer=x),) if sequence_parallel else ()


def boundary_op(
    name: str,
    x: Tensor,
    out: Tensor,
    forward: tuple[Collective, ...],
    backward: tuple[Collective, ...],
) -> Operator:
    """The edge between a replicated (or split) region and a tensor-parallel one."""
    return Operator(
        name=name,
        kind="edge",
        price_axes=(x.axes,),
        inputs=(x,),
        outputs=(out,),
        forward_collectives=forward,
        backward_collectives=backward,
    )


def decoder_layer(model: Model, layer: Layer, *, sequence_parallel: bool, fused: bool) -> Graph:
    """One decoder layer; `fused` says whether the device has fused norm kernels."""
    sp = sequence_parallel
    x, n1, n1g = _part("x"), _part("attention_norm.out"), _whole("attention.in")
    width: Axes = ("heads", "head_dim")
    kv_width: Axes = ("kv_heads", "head_dim")
    q0 = Tensor(name="q0", axes=(*TOKENS, *width))
    k0 = Tensor(name="k0", axes=(*TOKENS, *kv_width))
    v = Tensor(name="v", axes=(*TOKENS, *kv_width))
    qkv_bias = layer.bias or layer.qkv_bias
    o = Tensor(name="o", axes=(*TOKENS, *width))
    lse = Tensor(name="lse", axes=(*TOKENS, "heads"), dtype="fp32")
    a, a_sum, x1 = _whole("attention.partial"), _part("attention.out"), _part("x1")
    ops = [
        norm("attention_norm", layer.norm, x, n1, fused=fused),
        boundary_op("attention.enter", n1, n1g, _enter(n1g, sp), _enter_backward(n1g, sp)),
        linear("wq", n1g, q0, ("hidden",), width, qkv_bias),
        linear("wk", n1g, k0, ("hidden",), kv_width, qkv_bias),
        linear("wv", n1g, v, ("hidden",), kv_width, qkv_bias),
    ]
    q, k = q0, k0
    if model.positions == "rope":
        q, k = Tensor(name="q", axes=q0.axes), Tensor(name="k", axes=k0.axes)
        ops += [elementwise("rope_q", "rope", (q0,), q), elementwise("rope_k", "rope", (k0,), k)]
    ops += [
        Operator(
            name="attention_core",
            kind="attention",
            price_axes=(("batch", "heads"), ("seq",), ("head_dim",)),
            inputs=(q, k, v),
            outputs=(o,),
            saves=(q, k, v, o, lse),
        ),
        linear("wo", o, a, width, ("hidden",), layer.bias),
        boundary_op("attention.leave", a, a_sum, _leave(a, sp), _leave_backward(a, sp)),
        elementwise("attention_residual", "add", (x, a_sum), x1),
        *_mlp(layer, x1, sp, fused),
    ]
    return Graph(name="layer", operators=tuple(ops), boundary=x)


def _mlp(layer: Layer, x1: Tensor, sp: bool, fused: bool) -> list[Operator]:
    n2, n2g = _part("mlp_norm.out"), _whole("mlp.in")
    up = Tensor(name="up", axes=(*TOKENS, "ffn"))
    act = Tensor(name="activation", axes=(*TOKENS, "ffn"))
    d, d_sum, y = _whole("mlp.partial"), _part("mlp.out"), _part("y")
    ops = [
        norm("mlp_norm", layer.norm, x1, n2, fused=fused),
        boundary_op("mlp.enter", n2, n2g, _enter(n2g, sp), _enter_backward(n2g, sp)),
    ]
    inner = Tensor(name="inner", axes=up.axes)
    if layer.mlp == "swiglu":
        gate = Tensor(name="gate", axes=up.axes)
        ops += [
            linear("gate", n2g, gate, ("hidden",), ("ffn",), layer.bias),
            linear("up", n2g, up, ("hidden",), ("ffn",), layer.bias),
            elementwise("swiglu", "swiglu", (gate, up), act, saves=(gate, up, inner)),
        ]
    else:
        saves = (up,) if layer.mlp == "gelu" else (inner,)
        ops += [
            linear("up", n2g, up, ("hidden",), ("ffn",), layer.bias),
            elementwise(layer.mlp, layer.mlp, (up,), act, saves=saves),
        ]
    ops += [
        linear("down", act, d, ("ffn",), ("hidden",), layer.bias),
        boundary_op("mlp.leave", d, d_sum, _leave(d, sp), _leave_backward(d, sp)),
        elementwise("mlp_residual", "add", (x1, d_sum), y),
    ]
    return ops


def embedding(model: Model, *, sequence_parallel: bool) -> Graph:
    """Token embedding (vocabulary split by tp) and learned positions."""
    ids = Tensor(name="ids", axes=TOKENS, dtype="int64")
    e, x = _whole("embedding.partial"), _part("embedding.out")
    table = Tensor(name="embedding.weight", axes=("vocab", "hidden"), dtype="param")
    ops = [
        Operator(
            name="embedding",
            kind="embedding",
            price_axes=(TOKENS, ("hidden",), ("vocab",)),
            inputs=(ids,),
            outputs=(e,),
            saves=(ids,),
            weights=(table,),
            grad_inputs=False,
        ),
        boundary_op(
            "embedding.leave",
            e,
            x,
            _leave(e, sequence_parallel),
            _leave_backward(e, sequence_parallel),
        ),
    ]
    if model.positions == "learned":
        positions = Tensor(name="positions.weight", axes=("positions", "hidden"), dtype="param")
        y = _part("positions.out")
        op = elementwise("positions", "add", (x,), y)
        ops.append(
            Operator(
                name=op.name, kind=op.kind, price_axes=op.price_axes, inputs=op.inputs,
                outputs=op.outputs, weights=(positions,),
            )
        )  # fmt: skip
    return Graph(name="embedding", operators=tuple(ops), boundary=ids)


def head(model: Model, *, sequence_parallel: bool, fused: bool) -> Graph:
    """Final norm, output head (vocabulary split by tp) and the loss."""
    sp = sequence_parallel
    x, n, ng = _part("x"), _part("norm.out"), _whole("head.in")
    logits = Tensor(name="logits", axes=(*TOKENS, "vocab"))
    loss = Tensor(name="loss", axes=("one",), dtype="fp32")
    log_softmax = Tensor(name="log_softmax", axes=logits.axes, dtype="fp32")
    stat = Tensor(name="loss.stat", axes=TOKENS, dtype="fp32")
    reduce = Collective(kind="all_reduce", axis="tp", buffer=stat)
    projection = linear("head", ng, logits, ("hidden",), ("vocab",), False)
    if model.tied_embeddings:
        table = Tensor(name="embedding.weight", axes=("vocab", "hidden"), dtype="param")
        projection = Operator(
            name="head", kind="linear", price_axes=projection.price_axes, inputs=(ng,),
            outputs=(logits,), saves=(ng,), weights=(table,),
        )  # fmt: skip
    ops = (
        norm("norm", model.layers[-1].norm, x, n, fused=fused),
        boundary_op("head.enter", n, ng, _enter(ng, sp), _enter_backward(ng, sp)),
        projection,
        Operator(
            name="loss",
            kind="cross_entropy",
            price_axes=(TOKENS, ("vocab",)),
            inputs=(logits,),
            outputs=(loss,),
            saves=(log_softmax,),
            forward_collectives=(reduce, reduce, reduce),
        ),
    )
    return Graph(name="head", operators=ops, boundary=x)
