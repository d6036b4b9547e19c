"""Runtime: what a compiled layer keeps for backward.

Fused operators hand their intermediate results on in registers: what an activation function keeps
between its two halves is made again inside the backward's own kernel. Inputs of matmuls, which are
kernels of their own, stay as they are. Time is priced operator by operator (`Prices.operator`) and
layer by layer for the host (`costmodel/host_times.py`).
"""

from __future__ import annotations

from dataclasses import replace

from ..graph import Graph, Operator
from ..rates import is_compute


def rewrite(graph: Graph, mode: str) -> Graph:
    """The graph of a layer under a runtime; embedding and head are not compiled."""
    if mode != "compiled" or graph.name != "layer":
        return graph
    return replace(graph, operators=tuple(map(_fused, graph.operators)))


def _fused(op: Operator) -> Operator:
    """An operator that keeps its inputs, outputs and statistics, nothing between."""
    if is_compute(op.kind):
        return op
    known = {t.name for t in (*op.inputs, *op.outputs)}
    kept = tuple(t for t in op.saves if t.name in known or len(t.axes) < len(op.outputs[0].axes))
    return replace(op, saves=kept)
