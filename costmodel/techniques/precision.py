"""Compute precision: gives every tensor its dtype.

Parameters at rest, gradients at rest and optimiser states stay fp32; matmuls, attention and the
tensors between them use the compute dtype; norms and the loss work in fp32 inside.
"""

from __future__ import annotations

from dataclasses import replace

from ..graph import Collective, Graph, Operator, Tensor


def rewrite(graph: Graph, compute: str) -> Graph:
    """The graph with the compute dtype (fp32, bf16, fp16) in place of the open ones."""

    def tensor(t: Tensor) -> Tensor:
        return replace(t, dtype=compute) if t.dtype in ("compute", "param") else t

    def collective(c: Collective) -> Collective:
        return replace(c, buffer=tensor(c.buffer))

    def operator(op: Operator) -> Operator:
        return replace(
            op,
            inputs=tuple(map(tensor, op.inputs)),
            outputs=tuple(map(tensor, op.outputs)),
            saves=_saves(op, compute, tuple(map(tensor, op.saves))),
            weights=tuple(map(tensor, op.weights)),
            forward_collectives=tuple(map(collective, op.forward_collectives)),
            backward_collectives=tuple(map(collective, op.backward_collectives)),
        )

    return replace(
        graph,
        operators=tuple(map(operator, graph.operators)),
        boundary=tensor(graph.boundary),
        weights=tuple(map(tensor, graph.weights)),
    )


def _saves(op: Operator, compute: str, saves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Composed norms keep an fp32 copy of a 16-bit input instead of the input itself."""
    upcast = [t for t in saves if t.dtype == "upcast"]
    if not upcast:
        return saves
    kept = [t for t in saves if t.dtype != "upcast"]
    if compute == "fp32":
        return tuple(kept)
    copies = [replace(t, dtype="fp32") for t in upcast]
    return tuple(copies + [t for t in kept if t.name != op.inputs[0].name])
