"""Routed experts in the place of the MLP: token choice, expert and tensor parallel.

Every token goes to top_k experts (times the capacity factor, where there is one: buffers are
computed full); `copies` is that number. ep divides the experts, tp each expert's width. Rows are
copies of tokens, sorted by expert; a rank receives as many as it sends, on average.

    router -> permute -> all-to-all over ep -> [gather over tp] -> grouped matmuls
           -> [scatter over tp] -> all-to-all over ep -> weighted sum per token

With sequence parallelism a tp rank routes its own part of the sequence, and rows are gathered and
scattered over tp around the matmuls. Where ep lies over tp as well, experts are whole
(expert_tp is 1) and rows stay where they arrive. Without sequence parallelism every tp rank routes
and sends the whole sequence, and the partial sums over tp are added after the weighted sum, where
they are top_k times smaller; a shared expert's partial sums go with them.

For backward are kept, besides inputs: the routing probabilities and weights, the places of rows,
the permuted input, gate and up, their product, and the rows that come back.

Source: Gale et al. 2022 (MegaBlocks); Lepikhin et al. 2020 (GShard) for the two all-to-alls.
"""

from __future__ import annotations

from ...model import GATED, Experts, Layer
from ..graph import Axes, Collective, Operator, Tensor
from .mlp import mlp_matmuls
from .parts import PART, boundary_op, elementwise, enter, leave, linear, norm, part, whole

ROWS: Axes = ("batch", "expert_seq", "copies")
ROWS_PART: Axes = (*PART, "copies")


def experts_mlp(
    layer: Layer, experts: Experts, x: Tensor, out: Tensor, *, sp: bool, fused: bool
) -> list[Operator]:
    """Norm, router, routed and shared experts; counterpart of `dense_mlp`."""
    normed = part("mlp_norm.out")
    ops = [norm("mlp_norm", layer.norm, x, normed, fused=fused)]
    tokens = normed
    if not sp:
        tokens = part("experts.in")
        ops.append(enter("experts.enter", normed, tokens, sp))
    shared = experts.shared_ffn_hidden > 0
    total = part("experts.partial") if not sp else out
    routed = part("routed") if shared else total
    ops += _routed(layer, tokens, routed, sp)
    if shared:
        ops += _shared(layer, tokens, routed, total, sp)
    if not sp:
        ops.append(leave("experts.leave", total, out, sp))
    return ops


def _routed(layer: Layer, tokens: Tensor, out: Tensor, sp: bool) -> list[Operator]:
    """From tokens to the weighted sum of their experts' outputs."""
    logits = Tensor(name="router.logits", axes=(*PART, "all_experts"))
    probabilities = Tensor(name="router.probabilities", axes=logits.axes, dtype="fp32")
    weights = Tensor(name="router.weights", axes=(*PART, "top_k"), dtype="fp32")
    places = Tensor(name="router.places", axes=ROWS_PART, dtype="int64")
    rows, received = _rows("rows", ROWS_PART), _rows("rows.received", ROWS_PART)
    results, returned = _rows("rows.results", ROWS_PART), _rows("rows.returned", ROWS_PART)
    return [
        linear("router", tokens, logits, ("hidden",), ("all_experts",), False, tokens=PART),
        Operator(
            name="routing",
            kind="routing",
            price_axes=(PART, ("all_experts",)),
            inputs=(logits,),
            outputs=(weights,),
            saves=(probabilities,),
        ),
        Operator(
            name="permute",
            kind="permute",
            price_axes=(tokens.axes, ("copies",)),
            inputs=(tokens,),
            outputs=(rows,),
            saves=(places,),
        ),
        _exchange("dispatch", rows, received),
        *_matmuls(layer, received, results, sp),
        _exchange("combine", results, returned),
        Operator(
            name="unpermute",
            kind="unpermute",
            price_axes=(tokens.axes, ("copies",)),
            inputs=(returned, weights),
            outputs=(out,),
            saves=(returned, weights, places),
        ),
    ]


def _matmuls(layer: Layer, received: Tensor, results: Tensor, sp: bool) -> list[Operator]:
    """The local experts' MLPs on the rows that a rank received."""
    ops: list[Operator] = []
    x, y = received, results
    if sp:
        x, y = _rows("experts.rows", ROWS), _rows("experts.partial_rows", ROWS)
        ops.append(enter("experts.gather", received, x, sp, "expert_tp"))
    up, act = _wide("up"), _wide("activation")
    if layer.mlp in GATED:
        gate = _wide("gate")
        ops += [
            grouped_linear("experts.gate", x, gate, "hidden", "expert_ffn"),
            grouped_linear("experts.up", x, up, "hidden", "expert_ffn"),
            elementwise(f"experts.{layer.mlp}", layer.mlp, (gate, up), act, saves=(gate, up)),
        ]
    else:
        ops += [
            grouped_linear("experts.up", x, up, "hidden", "expert_ffn"),
            elementwise(f"experts.{layer.mlp}", layer.mlp, (up,), act, saves=(up,)),
        ]
    ops.append(grouped_linear("experts.down", act, y, "expert_ffn", "hidden"))
    if sp:
        ops.append(leave("experts.scatter", y, results, sp, "expert_tp"))
    return ops


def _shared(layer: Layer, tokens: Tensor, routed: Tensor, out: Tensor, sp: bool) -> list[Operator]:
    """The expert that every token passes, and its sum with the routed ones."""
    partial, prefix = whole("shared.partial"), "shared."
    if not sp:
        return [
            *mlp_matmuls(layer, tokens, partial, bias=False, ffn="shared_ffn", prefix=prefix),
            elementwise("experts.sum", "add", (routed, partial), out),
        ]
    x, y = whole("shared.in"), part("shared.out")
    return [
        enter("shared.enter", tokens, x, sp),
        *mlp_matmuls(layer, x, partial, bias=False, ffn="shared_ffn", prefix=prefix),
        leave("shared.leave", partial, y, sp),
        elementwise("experts.sum", "add", (routed, y), out),
    ]


def grouped_linear(name: str, x: Tensor, out: Tensor, width_in: str, width_out: str) -> Operator:
    """One matmul per local expert on its rows: (rows of all, out, in, local experts)."""
    weight = Tensor(name=f"{name}.weight", axes=("experts", width_out, width_in), dtype="param")
    return Operator(
        name=name,
        kind="grouped_linear",
        price_axes=(ROWS, (width_out,), (width_in,), ("experts",)),
        inputs=(x,),
        outputs=(out,),
        saves=(x,),
        weights=(weight,),
    )


def _exchange(name: str, x: Tensor, out: Tensor) -> Operator:
    """An all-to-all over the expert-parallel ranks, and back in backward."""
    exchange = (Collective(kind="all_to_all", axis="ep", buffer=x),)
    return boundary_op(name, x, out, exchange, exchange)


def _rows(name: str, rows: Axes) -> Tensor:
    return Tensor(name=name, axes=(*rows, "hidden"))


def _wide(name: str) -> Tensor:
    return Tensor(name=f"experts.{name}", axes=(*ROWS, "expert_ffn"))
