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

KERNELS = ("flash", "unfused")
SCORES: Axes = ("batch", "heads", "seq", "seq_whole")


def rewrite(graph: Graph, kernel: str) -> Graph:
    """The graph with the attention kernel of that name; layers come with flash attention."""
    if kernel not in KERNELS:
        raise InputError("attention", kernel, "unknown kernel", f"use {' or '.join(KERNELS)}")
    if kernel == "flash":
        return graph
    return replace(graph, operators=tuple(map(_unfused, graph.operators)))


def _unfused(op: Operator) -> Operator:
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
    return replace(op, kind="attention_unfused", saves=(*op.inputs, *scores))
