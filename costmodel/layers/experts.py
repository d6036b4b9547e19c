"""Routed experts in the place of the MLP: token choice, expert and tensor parallel.

Every token goes to top_k experts (times the capacity factor, where there is one: buffers are
computed full); `copies` is that number. ep divides the experts, tp each expert's width. Rows are
copies of tokens, sorted by expert; a rank receives as many as it sends, on average (`held` per own
token, more on the fullest rank). What a collective moves is counted as the mean over ranks, which
no routing changes: every row is sent once.

    router -> permute -> all-to-all over ep -> [gather over tp] -> grouped matmuls
           -> [scatter over tp] -> all-to-all over ep -> weighted sum per token

Stacks that tell counts first, as our executors do, send them ahead of the rows, and sort what
arrives from several ranks by expert. Dropless rows that come over ep are unequally many on each
rank: all-to-alls gather them over tp.

A balance loss counts the choices of all ranks, beside the matmuls, and once: a recomputed layer
does not count again.

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

from dataclasses import replace

from ...model import GATED, Experts, Layer
from ..graph import Axes, Collective, Operator, Tensor
from .mlp import mlp_matmuls
from .parts import (
    PART,
    boundary_op,
    elementwise,
    enter,
    leave,
    linear,
    local_copy,
    norm,
    part,
    whole,
)

ROWS: Axes = ("batch", "expert_seq", "held")
ROWS_PART: Axes = (*PART, "held")
SENT: Axes = (*PART, "copies")
MEAN: Axes = ("batch", "expert_seq", "copies")
COUNTED = {"micro-batch": "micro_batch_ranks", "global-batch": "batch_ranks"}
"""Over which ranks a balance loss counts choices."""


def experts_mlp(
    layer: Layer,
    experts: Experts,
    x: Tensor,
    out: Tensor,
    *,
    sp: bool,
    fused: bool,
    balance: str = "none",
    counted: bool = False,
) -> list[Operator]:
    """Norm, router, routed and shared experts; counterpart of `dense_mlp`.

    `counted` says whether counts are told and rows sorted as steps of their own.
    """
    normed = part("mlp_norm.out")
    ops = [norm("mlp_norm", layer.norm, x, normed, fused=fused)]
    tokens = normed
    if not sp:
        tokens = part("experts.in")
        ops.append(enter("experts.enter", normed, tokens, sp))
    shared = experts.shared_ffn_hidden > 0
    total = part("experts.partial") if not sp else out
    routed = part("routed") if shared else total
    ops += _routed(layer, experts, tokens, routed, sp, balance, counted)
    if shared:
        ops += _shared(layer, tokens, routed, total, sp)
    if not sp:
        ops.append(leave("experts.leave", total, out, sp))
    return ops


def _routed(
    layer: Layer,
    experts: Experts,
    tokens: Tensor,
    out: Tensor,
    sp: bool,
    balance: str,
    counted: bool,
) -> list[Operator]:
    """From tokens to the weighted sum of their experts' outputs."""
    logits = Tensor(name="router.logits", axes=(*PART, "all_experts"))
    probabilities = Tensor(name="router.probabilities", axes=logits.axes, dtype="fp32")
    weights = Tensor(name="router.weights", axes=(*PART, "top_k"), dtype="fp32")
    chosen = Tensor(name="router.chosen", axes=weights.axes, dtype="int64")
    scores = Tensor(name="router.scores", axes=weights.axes, dtype="fp32")
    places = Tensor(name="router.places", axes=weights.axes, dtype="int64")
    rows, received = _rows("rows", SENT), _rows("rows.received", ROWS_PART)
    results, returned = _rows("rows.results", ROWS_PART), _rows("rows.returned", SENT)
    dropless = experts.capacity_factor is None
    dispatch = _exchange("dispatch", rows, received)
    if counted and dropless:
        counts = Tensor(name="counts", axes=("all_slots",), dtype="int64")
        first = Collective(kind="all_to_all", axis="ep", buffer=counts)
        dispatch = replace(dispatch, forward_collectives=(first, *dispatch.forward_collectives))
    return [
        linear("router", tokens, logits, ("hidden",), ("all_experts",), False, tokens=PART),
        Operator(
            name="routing",
            kind="routing",
            price_axes=(PART, ("all_experts",)),
            inputs=(logits,),
            outputs=(weights,),
            saves=(probabilities, chosen, scores) if counted else (probabilities,),
            forward_collectives=_counting(balance),
        ),
        Operator(
            name="permute",
            kind="permute",
            price_axes=(tokens.axes, ("copies",)),
            inputs=(tokens,),
            outputs=(rows,),
            saves=(places,),
        ),
        dispatch,
        *_matmuls(layer, received, results, sp, dropless, counted),
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


def _counting(balance: str) -> tuple[Collective, ...]:
    """The sum of choices that a balance loss takes: four bytes per expert."""
    if balance == "none":
        return ()
    choices = Tensor(name="router.counts", axes=("all_experts",), dtype="fp32")
    axis = COUNTED[balance]
    return (
        Collective(kind="all_reduce", axis=axis, buffer=choices, overlaps="experts.up", once=True),
    )


def _matmuls(
    layer: Layer, received: Tensor, results: Tensor, sp: bool, dropless: bool, counted: bool
) -> list[Operator]:
    """The local experts' MLPs on the rows that a rank received."""
    ops: list[Operator] = []
    x, y = received, results
    if sp:
        x, y = _rows("experts.rows", ROWS), _rows("experts.partial_rows", ROWS)
        ops.append(_gather(received, x, dropless, counted))
    inside, outside = x, y
    if counted:
        inside, outside = _rows("experts.sorted", ROWS), _rows("experts.sorted_partial", ROWS)
        ops.append(local_copy("experts.sort", x, inside, "sorted"))
    up, act = _wide("up"), _wide("activation")
    if layer.mlp in GATED:
        gate = _wide("gate")
        ops += [
            grouped_linear("experts.gate", inside, gate, "hidden", "expert_ffn"),
            grouped_linear("experts.up", inside, up, "hidden", "expert_ffn"),
            elementwise(f"experts.{layer.mlp}", layer.mlp, (gate, up), act, saves=(gate, up)),
        ]
    else:
        saves = (act,) if layer.mlp == "relu" else (up,)
        ops += [
            grouped_linear("experts.up", inside, up, "hidden", "expert_ffn"),
            elementwise(f"experts.{layer.mlp}", layer.mlp, (up,), act, saves=saves),
        ]
    ops.append(grouped_linear("experts.down", act, outside, "expert_ffn", "hidden"))
    if counted:
        ops.append(local_copy("experts.unsort", outside, y, "sorted"))
    if sp:
        ops.append(_scatter(y, results, dropless, counted))
    return ops


def _gather(x: Tensor, out: Tensor, dropless: bool, counted: bool) -> Operator:
    """The rows of all tp ranks, for experts that are cut along their width."""
    mean = _rows(out.name, MEAN)
    if not (counted and dropless):
        there = Collective(kind="all_gather", axis="expert_tp", buffer=mean)
        back = replace(there, kind="reduce_scatter")
        return boundary_op("experts.gather", x, out, (there,), (back,))
    counts = Tensor(name="counts.gathered", axes=("expert_tp", "all_slots"), dtype="int64")
    told = Collective(kind="all_gather", axis="expert_tp", buffer=counts)
    return boundary_op(
        "experts.gather", x, out, (told, *_uneven("all_gather", mean)),
        _uneven("reduce_scatter", mean),
    )  # fmt: skip


def _scatter(x: Tensor, out: Tensor, dropless: bool, counted: bool) -> Operator:
    """The mirror image of `_gather`: partial sums back to the rank of each row."""
    mean = _rows(x.name, MEAN)
    if not (counted and dropless):
        there = Collective(kind="reduce_scatter", axis="expert_tp", buffer=mean)
        back = replace(there, kind="all_gather")
        return boundary_op("experts.scatter", x, out, (there,), (back,))
    there, back = _uneven("reduce_scatter", mean), _uneven("all_gather", mean)
    return boundary_op("experts.scatter", x, out, there, back)


def _uneven(kind: str, buffer: Tensor) -> tuple[Collective, Collective]:
    """A gather or scatter of equal parts where there is no ep, and its all-to-all where there is:
    one of the two axes has a single rank."""
    return (
        Collective(kind=kind, axis="even_tp", buffer=buffer),
        Collective(kind="all_to_all", axis="uneven_tp", buffer=buffer),
    )


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
    """An all-to-all over the expert-parallel ranks, and back in backward: of what is sent, which is
    what is received on average."""
    exchange = (Collective(kind="all_to_all", axis="ep", buffer=_rows(name, SENT)),)
    return boundary_op(name, x, out, exchange, exchange)


def _rows(name: str, rows: Axes) -> Tensor:
    return Tensor(name=name, axes=(*rows, "hidden"))


def _wide(name: str) -> Tensor:
    return Tensor(name=f"experts.{name}", axes=(*ROWS, "expert_ffn"))
