"""What one pipeline stage, or all chunks of one pipeline rank, cost: sums of pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..model import Model
from ..plan import Phase
from .graph import Array
from .layout import Layouts
from .pieces import Piece, Pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How often each piece occurs: layers by group, embedding and head 0 or 1."""

    layers: tuple[Array, ...]
    embedding: Array
    head: Array

    @property
    def num_layers(self) -> Array:
        """Layers of all groups."""
        return sum(self.layers, np.zeros(1))

    def total(self, costs: Pieces, name: str) -> Array:
        """The sum of one cost over all pieces of the load."""
        value = self.embedding * getattr(costs.embedding, name)
        value = value + self.head * getattr(costs.head, name)
        for count, piece in zip(self.layers, costs.layers, strict=True):
            value = value + count * getattr(piece, name)
        return value

    def params(self, costs: Pieces) -> Array:
        """Local parameters; a table that embedding and head share on one rank counts once."""
        return self.total(costs, "params") - self.embedding * self.head * costs.tied_params

    def rest_params(self, costs: Pieces) -> Array:
        """Those outside the layers."""
        both = self.embedding * costs.embedding.params + self.head * costs.head.params
        return both - self.embedding * self.head * costs.tied_params

    def each(self, costs: Pieces) -> list[tuple[Array, Piece]]:
        """Every piece with its count."""
        layers = list(zip(self.layers, costs.layers, strict=True))
        return [(self.embedding, costs.embedding), *layers, (self.head, costs.head)]


def _group_counts(model: Model, first: Array, last: Array) -> tuple[Array, ...]:
    """Layers of each group within `first..last`, both included."""
    counts: list[Array] = []
    start = 0.0
    for layer in model.layers:
        end = start + layer.repeat
        overlap = np.minimum(last + 1, end) - np.maximum(first, start)
        counts.append(np.maximum(0.0, overlap))
        start = end
    return tuple(counts)


def stage_load(model: Model, first: Array, last: Array) -> Load:
    """The load of the layers `first..last`, both included; arrays for many layouts at once."""
    return Load(
        layers=_group_counts(model, first, last),
        embedding=(first == 0).astype(float),
        head=(last == model.num_layers - 1).astype(float),
    )


def plan_loads(model: Model, phase: Phase) -> list[Load]:
    """The loads of a plan's stages in order."""
    return [
        stage_load(model, np.array([float(s.layers[0])]), np.array([float(s.layers[1])]))
        for s in phase.stages
    ]


def merge(loads: list[Load]) -> Load:
    """Several stages of one rank together."""
    groups = zip(*(load.layers for load in loads), strict=True)
    return Load(
        layers=tuple(sum(group, np.zeros(1)) for group in groups),
        embedding=sum((load.embedding for load in loads), np.zeros(1)),
        head=sum((load.head for load in loads), np.zeros(1)),
    )


def even_load(model: Model, layouts: Layouts, stage: Array) -> Load:
    """The load of stage number `stage` when layers are cut evenly (first stages take the rest)."""
    stages = (layouts.pp * layouts.vpp).astype(float)
    base = np.floor(model.num_layers / stages)
    extra = model.num_layers - base * stages
    first = stage * base + np.minimum(stage, extra)
    size = base + (stage < extra)
    return stage_load(model, first, first + size - 1)
