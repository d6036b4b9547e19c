"""Recompute: drops saved tensors and runs forward operators again in backward.

A mode says which of a layer's tensors are held between forward and backward; which operators run
again follows. With N_o the tensors that the backward of operator o reads, out_o those that o makes
(what it alone keeps included), in_o those that it reads, K the kept ones,

    required   R = union of N_o, and of in_o over all o that run again
    again      o runs again when some t in out_o is in R and not in K
    held       R intersected with K

in one pass in reverse: no operator runs that nothing needs, none runs twice, and what is named kept
but never needed is not held. The layer's input is always kept. `executors/frames.py` does the same
to the module that runs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ...choices import RECOMPUTE_MODES, TENSORS
from ...errors import InputError
from ..graph import Graph, Operator, Tensor
from ..rates import is_matmul


def rewrite(graph: Graph, mode: str, keep: Collection[str] = ()) -> Graph:
    """The graph of a layer under a recompute mode.

    none: everything autograd saves is kept. selective: the attention core runs again in backward,
    so its statistics (or, unfused, its scores) are not kept. elementwise: norms, activation
    functions, rotary positions and the up-projections of latent attention run again, so that what
    they make is not kept (Megatron-Core's recompute modules). tensors: of the layer's tensors those
    named in `keep` are held, as far as they are needed; names that it does not have say nothing.
    per_op: only the layer's input, the attention's output and the output of every second matmul
    are kept, and all other operators run again at once. full: only the layer's input is kept.
    full_keep_attn: that, and the output of attention with its statistics, so that attention does
    not run again (Li et al. 2023, LightSeq, section 3.3). Embedding and head are never recomputed.
    """
    if mode not in (*RECOMPUTE_MODES, TENSORS):
        raise InputError("recompute", mode, "unknown mode",
                         f"use {', '.join((*RECOMPUTE_MODES, TENSORS))}")  # fmt: skip
    if graph.name != "layer" or mode == "none":
        return graph
    if mode == "full":
        return replace(graph, checkpointed=True)
    if mode == "full_keep_attn":
        return replace(graph, checkpointed=True, kept=_of_attention(graph))
    if mode == "per_op":
        return _per_op(graph)
    if mode == TENSORS:
        return holding(graph, keep)
    if mode == "selective":
        return _selective(graph)
    return holding(graph, set(tensor_names(graph)) - _cheap(graph))


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


def internals(graph: Graph) -> dict[str, tuple[Tensor, ...]]:
    """By operator: what it alone makes beyond its outputs, and keeps (statistics of a norm)."""
    known = {graph.boundary.name}
    for op in graph.operators:
        known |= {t.name for t in (*op.inputs, *op.outputs)}
    found: dict[str, tuple[Tensor, ...]] = {}
    for op in graph.operators:
        found[op.name] = tuple(t for t in op.saves if t.name not in known)
        known.update(t.name for t in found[op.name])
    return found


def holding(graph: Graph, keep: Collection[str]) -> Graph:
    """The graph with the tensors in `keep` held where they are needed, all others made again.

    What is held only to make others from is saved by the first operator that reads it.
    """
    inside = internals(graph)
    made_here = {t.name for op in graph.operators for t in (*op.outputs, *inside[op.name])}
    names = {t.name for op in graph.operators for t in (*op.inputs, *op.outputs, *op.saves)}
    kept = {*keep, *(names - made_here)}  # what comes from outside is there anyway
    kept |= {name for name in names if name.removesuffix(SENT) in kept}
    for op in graph.operators:  # a sum over ranks is made in place: to keep its parts is to keep it
        if any(c.kind == "all_reduce" for c in op.forward_collectives) and op.kind == "edge":
            kept |= {t.name for t in op.outputs if op.inputs[0].name in kept}
    needed = {t.name for op in graph.operators for t in op.saves}
    required, again = set(needed), set[str]()
    for op in reversed(graph.operators):
        made = {t.name for t in (*op.outputs, *inside[op.name])}
        if made & required - kept:
            again.add(op.name)
            required |= {t.name for t in op.inputs}
    saved = needed & kept
    operators: list[Operator] = []
    for op in graph.operators:
        held = [t for t in op.saves if t.name in kept]
        needs = op.saves if len(held) < len(op.saves) or op.name in again else ()
        if op.name in again:
            held += [t for t in op.inputs if t.name in kept - saved]
            saved |= {t.name for t in held}
        operators.append(replace(op, saves=tuple(held), needs=needs, recomputed=op.name in again))
    return replace(graph, operators=tuple(operators))


SENT = ".sent"
"""Ends the name of a tensor's second form, beside which it lies under ulysses: kept with it."""


def _selective(graph: Graph) -> Graph:
    """The attention core keeps its inputs; its output stays where the projection reads it."""
    inside = internals(graph)
    cores = [op for op in graph.operators if op.kind.startswith("attention")]
    dropped = {t.name for op in cores for t in inside[op.name]}
    rewritten = holding(graph, set(tensor_names(graph)) - dropped)
    operators = (
        replace(op, saves=op.inputs) if op.kind.startswith("attention") else op
        for op in rewritten.operators
    )
    return replace(rewritten, operators=tuple(operators))


CHEAP = ("rmsnorm", "layernorm", "swiglu", "geglu", "gelu", "squared_relu", "relu", "rope")
"""Kinds that cost little time and leave large outputs."""


UP_PROJECTIONS = ("q_b", "kv_b")
"""Matmuls that expand the low ranks of latent attention to all heads: their outputs are large for
their time, and run again as the norms do (DeepSeek-AI 2024, arXiv 2412.19437, section 3.2.3;
`mla_up_proj` of Megatron-Core)."""


def _cheap(graph: Graph) -> set[str]:
    """What cheap operators make, and what edges behind them hand on: a sequence gathered for a
    matmul is gathered again."""
    inside = internals(graph)
    made: set[str] = set()
    for op in graph.operators:
        behind = op.kind == "edge" and any(t.name in made for t in op.inputs)
        if op.kind in CHEAP or op.name in UP_PROJECTIONS or behind:
            made |= {t.name for t in (*op.outputs, *inside[op.name])}
    return made


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
