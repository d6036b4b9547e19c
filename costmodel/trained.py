"""Trained weights as the matrices that an optimiser sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .graph import Array, Graph, Operator, Sizes, Tensor, volume


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTensor:
    """One parameter on its rank, before data parallelism shards its rows."""

    name: str
    rows: Array
    """Of its first dimension: outputs of a linear, entries of a table, experts; 1 of a vector."""
    columns: Array
    is_matrix: bool
    is_expert: bool


def trained_tensors(graph: Graph, sizes: Sizes) -> tuple[TrainedTensor, ...]:
    """Every trained weight of a graph, once."""
    found: dict[str, TrainedTensor] = {}
    for op in graph.operators:
        for index, weight in enumerate(op.weights):
            if weight.trainable and weight.name not in found:
                found[weight.name] = _as_matrix(op, weight, index == 0, sizes)
    return tuple(found.values())


def _as_matrix(op: Operator, weight: Tensor, is_first: bool, sizes: Sizes) -> TrainedTensor:
    elements = volume(weight.axes, sizes)
    rows, is_matrix = np.ones(1), True
    if op.kind.startswith("linear") and is_first:
        rows = volume(op.price_axes[1], sizes)
    elif len(weight.axes) > 1 and not weight.name.endswith(".bias"):
        rows = sizes[weight.axes[0]]
    else:
        is_matrix = False
    return TrainedTensor(
        name=weight.name,
        rows=rows,
        columns=elements / np.maximum(rows, 1.0),
        is_matrix=is_matrix,
        is_expert="experts" in weight.axes,
    )
