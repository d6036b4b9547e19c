"""Attention kernel: flash, or unfused with its scores in memory.

Unfused attention computes the whole square of scores and keeps, per score and in 16 bits, the
softmax's output (2 B), the dropout's output (2 B) and its mask (1 B): the 5 a s^2 b bytes of
Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1. It holds for one context-parallel rank,
whose keys are its own sequence; over several, kernels are fused.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import InputError
from ..graph import Axes, Graph, Operator, Tensor

KERNELS = ("flash", "flash1", "flash2", "flash3", "unfused", "eager")
IN_MEMORY = {"unfused": "attention_unfused", "eager": "attention_unfused_eager"}
"""Kernels with scores in memory, and their operator kinds."""
SCORES: Axes = ("batch", "heads", "seq", "seq_whole")


def rewrite(graph: Graph, kernel: str) -> Graph:
    """The graph with the attention kernel of that name; layers come with flash attention."""
    if kernel not in KERNELS:
        raise InputError("attention", kernel, "unknown kernel", f"use {', '.join(KERNELS)}")
    if kernel not in IN_MEMORY:
        return graph
    kind = IN_MEMORY[kernel]
    return replace(graph, operators=tuple(_unfused(op, kind) for op in graph.operators))


def _unfused(op: Operator, kind: str) -> Operator:
    if op.kind == "attention_full":
        raise InputError("attention", "unfused", "only causal attention is modelled unfused",
                         "use flash")  # fmt: skip
    if op.kind != "attention":
        return op
    scores = (
        Tensor(name="softmax.out", axes=SCORES),
        Tensor(name="attention_dropout.out", axes=SCORES),
        Tensor(name="attention_dropout.mask", axes=SCORES, dtype="int8"),
    )
    return replace(op, kind=kind, saves=(*op.inputs, *scores))
