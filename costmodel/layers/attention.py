"""Causal self-attention with grouped queries, and its core under context parallelism.

Context parallelism over cp = ulysses * ring ranks, s tokens of which a rank holds s / cp:

    ulysses   all-to-alls turn a part of the sequence with all heads into a longer part with heads /
              ulysses: of Q, K, V before the core and of its output after it, 4 forward and 4
              backward; with fewer K and V heads than ulysses these are repeated before they go
    ring      blocks of K and V pass from rank to rank while the core works on those it has, and in
              backward again with their gradients (`rings.py`)

A core sees s / ring tokens. Of the causal square of s tokens a ring rank owns the share that a
number of causal squares of s / ring tokens makes up, so the operator is priced by local squares:

    zigzag    ring squares on every rank: two blocks from opposite ends each
    ring      2 ring - 1 on the slowest rank: one causal and ring - 1 full squares of two each;
              2 - 1 / ring times the balanced share
    lightseq  ring + 1: one causal and ring / 2 full squares; the balanced share is
              ring / (ring + 1) of that

Sources: Liu, Zaharia, Abbeel 2023 (Ring Attention); Jacobs et al. 2023 (DeepSpeed-Ulysses).
"""

from __future__ import annotations

from dataclasses import replace

from ...model import Layer, Model
from ..graph import Axes, Collective, Operator, Tensor
from ..options import Options
from .parts import TOKENS, elementwise, enter, leave, linear, norm, part, whole
from .rings import SQUARES, messages

CORE = "attention_core"


def self_attention(
    model: Model, layer: Layer, x: Tensor, out: Tensor, *, sp: bool, fused: bool, options: Options
) -> list[Operator]:
    """Norm, projections, core and output projection; `x` and `out` lie outside the matmuls."""
    n1, n1g = part("attention_norm.out"), whole("attention.in")
    width: Axes = ("heads", "head_dim")
    kv_width: Axes = ("kv_heads", "head_dim")
    q0 = Tensor(name="q0", axes=(*TOKENS, *width))
    k0 = Tensor(name="k0", axes=(*TOKENS, *kv_width))
    sent_width: Axes = ("kv_heads_sent", "head_dim")  # as ulysses sends them, repeated if few
    v = Tensor(name="v", axes=(*TOKENS, *sent_width))
    o = Tensor(name="o", axes=(*TOKENS, *width))
    qkv_bias = layer.bias or layer.qkv_bias
    wq = linear("wq", n1g, q0, ("hidden",), width, qkv_bias)
    wk = linear("wk", n1g, k0, ("hidden",), kv_width, qkv_bias)
    wv = linear("wv", n1g, v, ("hidden",), kv_width, qkv_bias)
    before = [
        norm("attention_norm", layer.norm, x, n1, fused=fused),
        enter("attention.enter", n1, n1g, sp),
    ]
    if model.positions == "rope":
        q, k = Tensor(name="q", axes=q0.axes), Tensor(name="k", axes=v.axes)
        rope_q = elementwise("rope_q", "rope", (q0,), q)
        rope_k = replace(elementwise("rope_k", "rope", (k0,), k), price_axes=(k0.axes,))
        projections = [
            wq,
            wk,
            send(wv, v),
            send(rope_q, q),
            send(rope_k, k),
        ]
    else:
        q, k = q0, replace(k0, axes=v.axes)
        wk = replace(wk, outputs=(k,))
        projections = [send(wq, q), send(wk, k), send(wv, v)]
    return [
        *before,
        *projections,
        core(q, k, v, o, options.cp_kind),
        *output_projection(layer, o, out, width, sp),
    ]


def core(q: Tensor, k: Tensor, v: Tensor, o: Tensor, cp_kind: str) -> Operator:
    """The attention core; priced by (batch x heads x local squares, tokens, head size)."""
    around = messages(cp_kind, CORE)
    lse = Tensor(name="lse", axes=(*TOKENS, "heads"), dtype="fp32")
    # with ulysses the core's output and the one sent back are two tensors, both kept
    sent = Tensor(name="o.sent", axes=(*o.axes, "if_ulysses"))
    return Operator(
        name=CORE,
        kind="attention",
        price_axes=(("batch", "heads_core", SQUARES[cp_kind]), ("seq_core",), ("core_dim",)),
        inputs=(q, k, v),
        outputs=(o,),
        saves=(q, k, v, o, lse, sent),
        forward_collectives=around.forward,
        backward_collectives=around.backward,
        held_forward=around.held_forward,
        held_backward=around.held_backward,
    )


def output_projection(
    layer: Layer, o: Tensor, out: Tensor, width: Axes, sp: bool
) -> tuple[Operator, ...]:
    """The linear after the core, and the edge out of tensor parallelism."""
    partial = whole("attention.partial")
    wo = linear("wo", o, partial, width, ("hidden",), layer.bias)
    return send(wo, o), leave("attention.leave", partial, out, sp)


def send(op: Operator, tensor: Tensor) -> Operator:
    """The operator with ulysses' all-to-all of a tensor beside it, and of its gradient."""
    exchange = Collective(kind="all_to_all", axis="ulysses", buffer=tensor)
    return replace(
        op,
        forward_collectives=(*op.forward_collectives, exchange),
        backward_collectives=(*op.backward_collectives, exchange),
    )


def send_kv(op: Operator, tensor: Tensor, head_size: str) -> Operator:
    """The same for K or V, with heads repeated where there are fewer than ulysses ranks."""
    repeated = Tensor(name=f"{tensor.name}.sent", axes=(*TOKENS, "kv_heads_sent", head_size))
    return send(op, repeated)
