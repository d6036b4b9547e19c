"""Recompute: drops saved tensors and runs forward operators again in backward."""

from __future__ import annotations

from dataclasses import replace

from ..graph import Graph, Operator


def rewrite(graph: Graph, mode: str) -> Graph:
    """The graph of a layer under a recompute mode.

    none: everything autograd saves is kept. selective: the attention core runs again in backward,
    so its statistics (or, unfused, its scores) are not kept. full: only the layer's input is kept.
    Embedding and head are never recomputed.
    """
    if graph.name != "layer" or mode == "none":
        return graph
    if mode == "full":
        return replace(graph, checkpointed=True)

    def operator(op: Operator) -> Operator:
        if op.kind != "attention":
            return op
        return replace(op, saves=op.inputs, recomputed=True)

    return replace(graph, operators=tuple(map(operator, graph.operators)))
