"""Multi-head latent attention: queries, keys and values expanded from low-rank projections.

tp divides heads; the projections down to the ranks have no heads, so every tp rank holds them whole
and works on its part of the sequence where that is split. What is gathered over tp is then the
low-rank tensors, not the hidden states. In training keys are materialised per head: a part of its
own and the rotary part that all heads share. Query and key heads are larger than value heads; the
core is priced by their mean, which gives the forward's FLOPs exactly and the backward's (3 matmuls
of the one size, 2 of the other) within 4 % for 192 and 128. A CPU's fused kernel wants heads of one
size: values are filled up with zeros to that of keys, and what comes out is cut off again.

Source: DeepSeek-AI 2024, DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

from __future__ import annotations

from dataclasses import replace

from ...model import LatentAttention, Layer
from ..graph import Axes, Operator, Tensor
from ..options import Options
from .attention import core, output_projection, send, send_kv
from .parts import PART, TOKENS, elementwise, enter, linear, norm, part, whole

QK: Axes = ("heads", "qk_dim")
VALUES: Axes = ("heads", "v_dim")


def latent_attention(
    layer: Layer,
    latent: LatentAttention,
    x: Tensor,
    out: Tensor,
    *,
    sp: bool,
    fused: bool,
    options: Options,
) -> list[Operator]:
    """Norm, low-rank projections, core and output projection; counterpart of `self_attention`."""
    n1 = part("attention_norm.out")
    q0 = Tensor(name="q0", axes=(*TOKENS, *QK))
    q, k = Tensor(name="q", axes=q0.axes), Tensor(name="k", axes=q0.axes)
    v, o = Tensor(name="v", axes=(*TOKENS, *VALUES)), Tensor(name="o", axes=(*TOKENS, *VALUES))
    rope_q = replace(
        elementwise("rope_q", "rope", (q0,), q), price_axes=((*TOKENS, "heads", "rope_dim"),)
    )
    attention = [core(q, k, v, o, options.cp_kind)]
    if not fused and latent.v_head_dim < latent.qk_nope_head_dim + latent.qk_rope_head_dim:
        attention = _one_size(q, k, v, o, options.cp_kind)
    return [
        norm("attention_norm", layer.norm, x, n1, fused=fused),
        *_queries(latent, n1, q0, sp, fused),
        send(rope_q, q),
        *_keys_values(n1, k, v, sp, fused),
        *attention,
        *output_projection(layer, o, out, VALUES, sp),
    ]


def _one_size(q: Tensor, k: Tensor, v: Tensor, o: Tensor, cp_kind: str) -> list[Operator]:
    """The core on values as wide as keys."""
    wide_v, wide_o = replace(q, name="v.padded"), replace(q, name="o.padded")
    attention = core(q, k, wide_v, wide_o, cp_kind)
    squares, tokens, _ = attention.price_axes
    return [
        elementwise("attention.pad", "copy", (v,), wide_v),
        replace(attention, price_axes=(squares, tokens, ("qk_dim",))),
        elementwise("attention.cut", "copy", (wide_o,), o),
    ]


def _queries(
    latent: LatentAttention, n1: Tensor, q: Tensor, sp: bool, fused: bool
) -> list[Operator]:
    """Queries before their rotary part is turned."""
    if latent.q_lora_rank is None:
        n1g = whole("attention.in")
        return [
            enter("attention.enter", n1, n1g, sp),
            linear("wq", n1g, q, ("hidden",), QK, False),
        ]
    low, normed = _low("q_a.out", PART, "q_rank"), _low("q_a_norm.out", PART, "q_rank")
    gathered = _low("q_b.in", TOKENS, "q_rank")
    return [
        linear("q_a", n1, low, ("hidden",), ("q_rank",), False, tokens=PART),
        norm("q_a_norm", "rmsnorm", low, normed, fused=fused),
        enter("q_b.enter", normed, gathered, sp),
        linear("q_b", gathered, q, ("q_rank",), QK, False),
    ]


def _keys_values(n1: Tensor, k: Tensor, v: Tensor, sp: bool, fused: bool) -> list[Operator]:
    """Keys with their rotary part, and values: one matmul yields both, one operator parts them."""
    low, normed = _low("kv_a.out", PART, "kv_rank"), _low("kv_a_norm.out", PART, "kv_rank")
    gathered = _low("kv_b.in", TOKENS, "kv_rank")
    shared = _low("k_rope0", PART, "rope_dim")
    shared_whole = _low("k_rope", TOKENS, "rope_dim")
    kv = Tensor(name="kv_b.out", axes=(*TOKENS, "heads", "nope_v_dim"))
    down = linear("kv_a", n1, low, ("hidden",), ("kv_latent",), False, tokens=PART)
    split = Operator(
        name="rope_k",
        kind="rope",
        price_axes=((*TOKENS, "heads", "kv_dims"),),
        inputs=(kv, shared_whole),
        outputs=(k, v),
    )
    return [
        replace(down, outputs=(low, shared)),
        norm("kv_a_norm", "rmsnorm", low, normed, fused=fused),
        enter("kv_b.enter", normed, gathered, sp),
        enter("k_rope.enter", shared, shared_whole, sp),
        linear("kv_b", gathered, kv, ("kv_rank",), ("heads", "nope_v_dim"), False),
        send_kv(send_kv(split, k, "qk_dim"), v, "v_dim"),
    ]


def _low(name: str, tokens: Axes, rank: str) -> Tensor:
    return Tensor(name=name, axes=(*tokens, rank))
