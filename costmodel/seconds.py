"""Seconds of every piece of a model under several policies: what the bounds of a grid sum up.

A row per piece (embedding, layers by group, head), a column per way of cutting a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .graph import Array
from .pieces import Piece, Pieces
from .ranks import IN_LAYER_AXES

Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Least seconds of every piece and one micro-batch, whatever the policy."""

    forward: Array
    backward: Array
    inputs: Array
    """Part of the backward for which the stage before waits."""

    @property
    def both(self) -> Array:
        """Forward and backward."""
        return self.forward + self.backward

    def take(self, rows: Index) -> Seconds:
        """The columns at these positions."""
        return Seconds(
            forward=self.forward[:, rows], backward=self.backward[:, rows],
            inputs=self.inputs[:, rows],
        )  # fmt: skip

    def first(self, count: int) -> Seconds:
        """The first columns."""
        if count == self.forward.shape[1]:
            return self
        return Seconds(
            forward=self.forward[:, :count], backward=self.backward[:, :count],
            inputs=self.inputs[:, :count],
        )  # fmt: skip

    def where(self, condition: Array, other: Seconds) -> Seconds:
        """These in the columns where the condition holds, the other's elsewhere."""
        return Seconds(
            forward=np.where(condition, self.forward, other.forward),
            backward=np.where(condition, self.backward, other.backward),
            inputs=np.where(condition, self.inputs, other.inputs),
        )


def fastest(of_pools: Sequence[Seconds]) -> Seconds:
    """The least of several, each figure for itself."""
    if len(of_pools) == 1:
        return of_pools[0]
    names = ("forward", "backward", "inputs")
    return Seconds(**{n: np.min([getattr(x, n) for x in of_pools], axis=0) for n in names})


def seconds_of(policies: Sequence[Pieces]) -> tuple[Seconds, Array]:
    """The least seconds, and by policy, piece and column what a policy takes beyond them.

    Forward and backward are smallest each for itself: a chain of actions grows with both.
    """
    forward, backward, weight = (
        np.stack([_table(costs, part) for costs in policies])
        for part in (_forward_s, _backward_s, _weight_s)
    )
    least = Seconds(
        forward=forward.min(axis=0),
        backward=backward.min(axis=0),
        inputs=(backward - weight).min(axis=0),
    )
    return least, forward + backward - least.both


def joined(parts: Sequence[tuple[Seconds, Array]]) -> tuple[Seconds, Array]:
    """Several tables side by side."""
    names = ("forward", "backward", "inputs")
    tables = {n: np.concatenate([getattr(p, n) for p, _ in parts], axis=-1) for n in names}
    return Seconds(**tables), np.concatenate([extra for _, extra in parts], axis=-1)


def _table(costs: Pieces, part: Callable[[Piece], Array]) -> Array:
    values = [part(piece) for piece in (costs.embedding, *costs.layers, costs.head)]
    return np.stack(np.broadcast_arrays(*values))


def _forward_s(piece: Piece) -> Array:
    own = piece.forward_s + piece.host_forward_s
    return own + sum((piece.comm_forward_s.get(axis, 0.0) for axis in IN_LAYER_AXES), np.zeros(1))


def _backward_s(piece: Piece) -> Array:
    own = piece.backward_s + piece.recompute_s + piece.host_backward_s
    return own + sum((piece.comm_backward_s.get(axis, 0.0) for axis in IN_LAYER_AXES), np.zeros(1))


def _weight_s(piece: Piece) -> Array:
    return piece.weight_s
