"""Recompute: drops saved tensors and runs forward operators again in backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...errors import InputError
from ...plan import RECOMPUTE_MODES, TENSORS
from ..graph import Graph, Operator, Tensor
from ..rates import is_matmul


def rewrite(graph: Graph, mode: str, keep: Sequence[str] = ()) -> Graph:
    """The graph of a layer under a recompute mode.

    none: everything autograd saves is kept. selective: the attention core runs again in backward,
    so its statistics (or, unfused, its scores) are not kept. elementwise: norms, activation
    functions, rotary positions and the up-projections of latent attention run again, so that what
    they make is not kept (Megatron-Core's recompute modules). per_op: of the layer's tensors only
    its input, the attention's output and the output of every second matmul are kept, and all other
    operators run again. full: only the layer's input is kept. full_keep_attn: that, and the output
    of attention with its statistics, so that attention does not run again (Li et al. 2023,
    LightSeq, section 3.3). tensors: the layer's input and the tensors of `keep` are kept, and
    whatever makes the others again from them runs again. Embedding and head are never recomputed.
    """
    if mode not in (*RECOMPUTE_MODES, TENSORS):
        raise InputError("recompute", mode, "unknown mode",
                         f"use {', '.join((*RECOMPUTE_MODES, TENSORS))}")  # fmt: skip
    if graph.name != "layer" or mode == "none":
        return graph
    if mode == TENSORS:
        return _tensors(graph, keep)
    if mode == "full":
        return replace(graph, checkpointed=True)
    if mode == "full_keep_attn":
        return replace(graph, checkpointed=True, kept=_of_attention(graph))
    if mode == "per_op":
        return _per_op(graph)
    if mode == "elementwise":
        return _elementwise(graph)
    return replace(graph, operators=tuple(map(_selective, graph.operators)))


def _of_attention(graph: Graph) -> tuple[Tensor, ...]:
    """Outputs of attention and what it alone makes."""
    kept: list[Tensor] = []
    for op in graph.operators:
        if op.kind.startswith("attention_unfused"):
            problem = "keeps attention's output and statistics, and this kernel has scores instead"
            raise InputError("recompute", "full_keep_attn", problem, "use --attention flash")
        if op.kind.startswith("attention"):
            kept += [*op.outputs, *(t for t in op.saves if t.name == "lse")]
    return tuple(kept)


def tensor_names(graph: Graph) -> tuple[str, ...]:
    """The tensors of a layer that can be kept, in the order in which its forward makes them."""
    found: dict[str, None] = {graph.boundary.name: None}
    for op in graph.operators:
        found |= dict.fromkeys(t.name for t in (*op.outputs, *op.saves))
    return tuple(found)


def _tensors(graph: Graph, keep: Sequence[str]) -> Graph:
    """The layer with its input and some tensors kept.

    Backwards through the operators, one runs again if something that it makes is wanted, by a
    backward or by an operator that runs again, and not kept; then what it reads is wanted, too.
    What an operator saves that is neither input nor output of any (statistics of a norm) is made
    again by the operator itself.
    """
    made: dict[str, int] = {}
    for index, op in enumerate(graph.operators):
        for tensor in (*op.outputs, *op.saves):
            if tensor.name != graph.boundary.name:
                made.setdefault(tensor.name, index)
    kept = {graph.boundary.name, *keep}
    saved = {t.name: t for op in graph.operators for t in op.saves}
    wanted = {name for name in saved if name in made} - kept
    again: set[int] = set()
    for index in reversed(range(len(graph.operators))):
        if any(made[name] == index for name in wanted):
            again.add(index)
            reads = {t.name for t in graph.operators[index].inputs if t.name in made}
            wanted |= {name for name in reads if made[name] < index} - kept
    known = {t.name: t for op in graph.operators for t in (*op.inputs, *op.outputs, *op.saves)}
    extra: dict[int, list[Tensor]] = {}
    for name in keep:  # kept for the sake of others: by the operator that makes it
        if name in made and name not in saved:
            extra.setdefault(made[name], []).append(known[name])
    if again and graph.boundary.name not in saved:
        extra.setdefault(0, []).append(graph.boundary)
    operators = tuple(
        replace(
            op,
            saves=(*(t for t in op.saves if t.name in kept), *extra.get(index, ())),
            recomputed=index in again,
        )
        for index, op in enumerate(graph.operators)
    )
    return replace(graph, operators=operators)


def _selective(op: Operator) -> Operator:
    if not op.kind.startswith("attention"):
        return op
    inputs = {t.name for t in op.inputs}
    made = tuple(t for t in op.saves if t.name not in inputs and t.name in ("o", "lse"))
    there = (*op.held_backward, *made)  # what a fused kernel keeps is made again for its backward
    return replace(op, saves=op.inputs, recomputed=True, held_backward=there)


CHEAP = ("rmsnorm", "layernorm", "swiglu", "geglu", "gelu", "squared_relu", "relu", "rope")
"""Kinds that cost little time and leave large outputs."""


UP_PROJECTIONS = ("q_b", "kv_b")
"""Matmuls that expand the low ranks of latent attention to all heads: their outputs are large for
their time, and run again as the norms do (DeepSeek-AI 2024, arXiv 2412.19437, section 3.2.3;
`mla_up_proj` of Megatron-Core)."""


def _elementwise(graph: Graph) -> Graph:
    """Cheap operators keep their inputs alone, and nothing keeps what they make.

    Edges behind them run again too: a sequence gathered for a matmul is gathered again.
    """
    made: set[str] = set()
    operators: list[Operator] = []
    for op in graph.operators:
        again = op.kind in CHEAP
        if op.kind == "edge" and any(t.name in made for t in op.inputs):
            again = True
        if again:
            made.update(t.name for t in op.outputs)
            saves = () if op.kind == "edge" else op.inputs
            op = replace(op, saves=saves, recomputed=True)
        elif op.name in UP_PROJECTIONS:
            made.update(t.name for t in op.outputs)
            op = replace(op, recomputed=True)
        operators.append(replace(op, saves=tuple(t for t in op.saves if t.name not in made)))
    return replace(graph, operators=tuple(operators))


def _per_op(graph: Graph) -> Graph:
    """Torch's selective checkpointing of a block with every second matmul saved.

    Matmuls count in forward order, the first kept. A kept output stays until the block's backward
    even where no gradient needs it. Operators behind the last that saves anything do not run
    again: everything is back by then.
    """
    last = max(index for index, op in enumerate(graph.operators) if op.saves)
    operators: list[Operator] = []
    matmuls = 0
    for index, op in enumerate(graph.operators):
        again = index < last
        if is_matmul(op.kind):
            matmuls += 1
        if is_matmul(op.kind) and matmuls % 2 == 1:
            operators.append(replace(op, saves=op.outputs))
        elif op.kind.startswith("attention_unfused"):  # its scores are not kept
            operators.append(replace(op, saves=op.outputs, recomputed=True))
        elif op.kind.startswith("attention"):  # a fused kernel's statistics are an output too
            inputs = {t.name for t in op.inputs}
            kept = tuple(t for t in op.saves if t.name not in inputs)
            operators.append(replace(op, saves=kept))
        else:
            operators.append(replace(op, saves=(), recomputed=again))
    first = operators[0]
    operators[0] = replace(first, saves=(graph.boundary, *first.saves))
    return replace(graph, operators=tuple(operators))
