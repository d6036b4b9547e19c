"""What one pipeline stage, or all chunks of one pipeline rank, cost: sums of pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..model import Model
from .graph import Array
from .layout import Layouts
from .pieces import Piece, Pieces

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Around the last layer of each group, by group: (groups, groups)."""

    behind: tuple[tuple[Array, ...], ...]
    """Layers of the other groups that follow it."""
    before: tuple[tuple[Array, ...], ...]
    """The layer in front of it: one of some group, or none."""
    first: tuple[Array, ...]
    """By group, whether the first layer of all is of it."""
    second: tuple[Array, ...]

    @staticmethod
    def of(groups: Sequence[int], count: int) -> Order:
        """Of layers in their order, each known by its group."""
        behind = np.zeros((count, count, 1))
        before = np.zeros((count, count, 1))
        for group in sorted(set(groups)):
            last = max(i for i, other in enumerate(groups) if other == group)
            for other in groups[last + 1 :]:
                behind[group, other] += 1.0
            if last:
                before[group, groups[last - 1]] = 1.0
        ends = np.zeros((2, count, 1))
        for place, group in enumerate(groups[:2]):
            ends[place, group] = 1.0
        return Order(
            behind=tuple(map(tuple, behind)),
            before=tuple(map(tuple, before)),
            first=tuple(ends[0]),
            second=tuple(ends[1]),
        )

    @staticmethod
    def stacked(orders: Sequence[Order]) -> Order:
        """Orders of one layout each as one of many."""

        def joined(
            tables: Sequence[tuple[tuple[Array, ...], ...]],
        ) -> tuple[tuple[Array, ...], ...]:
            rows = zip(*tables, strict=True)
            return tuple(tuple(map(np.concatenate, zip(*row, strict=True))) for row in rows)

        return Order(
            behind=joined([order.behind for order in orders]),
            before=joined([order.before for order in orders]),
            first=tuple(map(np.concatenate, zip(*(order.first for order in orders), strict=True))),
            second=tuple(
                map(np.concatenate, zip(*(order.second for order in orders), strict=True))
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How often each piece occurs: layers by group, embedding and head 0 or 1."""

    layers: tuple[Array, ...]
    embedding: Array
    head: Array
    order: Order | None = None
    """Where the groups' last layers stand, where it is known."""

    @property
    def key(self) -> bytes:
        """Equal for equal loads."""
        return b"".join(np.asarray(a).tobytes() for a in (*self.layers, self.embedding, self.head))

    @property
    def num_layers(self) -> Array:
        """Layers of all groups."""
        return sum(self.layers, np.zeros(1))

    def take(self, rows: NDArray[np.intp]) -> Load:
        """The loads at these positions."""
        return Load(
            layers=tuple(count[rows] for count in self.layers),
            embedding=self.embedding[rows],
            head=self.head[rows],
        )

    def plus(self, other: Load) -> Load:
        """Both together."""
        return merge([self, other])

    @property
    def counts(self) -> Array:
        """Embedding, layers by group and head, one row each."""
        return np.stack(np.broadcast_arrays(self.embedding, *self.layers, self.head))

    def times(self, share: Array) -> Load:
        """The same, each piece as often as `share` says."""
        return Load(
            layers=tuple(count * share for count in self.layers),
            embedding=self.embedding * share,
            head=self.head * share,
        )

    def total(self, costs: Pieces, name: str) -> Array:
        """The sum of one cost over all pieces of the load."""
        value = self.embedding * getattr(costs.embedding, name)
        value = value + self.head * getattr(costs.head, name)
        for count, piece in zip(self.layers, costs.layers, strict=True):
            value = value + count * getattr(piece, name)
        return value

    def host_s(self, costs: Pieces) -> tuple[Array, Array]:
        """What the host adds to a micro-batch's forward and backward; a head may hide some of it,
        of its own rank's."""
        there, back = (self.total(costs, f"host_{way}_s") for way in ("forward", "backward"))
        return np.maximum(there, 0.0), np.maximum(back, 0.0)

    def communication(self, costs: Pieces, axis: str) -> tuple[Array, Array]:
        """Exposed communication of one mesh axis, forward and backward, per micro-batch."""
        forward, backward = np.zeros(1), np.zeros(1)
        for count, piece in self.each(costs):
            forward = forward + count * piece.comm_forward_s.get(axis, 0.0)
            backward = backward + count * piece.comm_backward_s.get(axis, 0.0)
        return forward, backward

    def params(self, costs: Pieces) -> Array:
        """Local parameters; a table that embedding and head share on one rank counts once."""
        return self.total(costs, "params") - self.embedding * self.head * costs.tied_params

    def trainable_params(self, costs: Pieces) -> Array:
        """Those of `params` with gradients and optimiser states."""
        shared = self.embedding * self.head * costs.tied_trained
        return np.maximum(0.0, self.total(costs, "trainable_params") - shared)

    def rest_params(self, costs: Pieces) -> Array:
        """Those outside the layers."""
        both = self.embedding * costs.embedding.params + self.head * costs.head.params
        return both - self.embedding * self.head * costs.tied_params

    def each(self, costs: Pieces) -> list[tuple[Array, Piece]]:
        """Every piece with its count."""
        layers = list(zip(self.layers, costs.layers, strict=True))
        return [(self.embedding, costs.embedding), *layers, (self.head, costs.head)]


def for_each(
    loads: Sequence[Load], compute: Callable[[Load, int], Result], pools: Sequence[int]
) -> list[Result]:
    """`compute` of every load on its pool, done once for equal ones: most stages are alike."""
    done: dict[tuple[bytes, int], Result] = {}
    for load, pool in zip(loads, pools, strict=True):
        if (load.key, pool) not in done:
            done[load.key, pool] = compute(load, pool)
    return [done[load.key, pool] for load, pool in zip(loads, pools, strict=True)]


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


def stacked(loads: Sequence[Load]) -> Load:
    """Loads of one layout each as one of many."""
    groups = zip(*(load.layers for load in loads), strict=True)
    return Load(
        layers=tuple(np.concatenate(group) for group in groups),
        embedding=np.concatenate([load.embedding for load in loads]),
        head=np.concatenate([load.head for load in loads]),
        order=Order.stacked([load.order for load in loads if load.order is not None])
        if all(load.order is not None for load in loads)
        else None,
    )


def merge(loads: list[Load]) -> Load:
    """Several stages of one rank together."""
    groups = zip(*(load.layers for load in loads), strict=True)
    return Load(
        layers=tuple(sum(group, np.zeros(1)) for group in groups),
        embedding=sum((load.embedding for load in loads), np.zeros(1)),
        head=sum((load.head for load in loads), np.zeros(1)),
    )


def stage_start(
    model: Model, layouts: Layouts, stage: Array, sizes: Sequence[int] | None = None
) -> Array:
    """The first layer of stage number `stage`; of the number of stages, the layers of the model.

    `sizes` are the layers of every stage, the same under all layouts; None = cut evenly, the first
    stages take the rest.
    """
    if sizes is not None:
        starts = np.concatenate([[0.0], np.cumsum(np.asarray(sizes, dtype=float))])
        return starts[np.asarray(stage, dtype=np.intp)]
    stages = (layouts.pp * layouts.vpp).astype(float)
    base = np.floor(model.num_layers / stages)
    return stage * base + np.minimum(stage, model.num_layers - base * stages)


def load_between(
    model: Model,
    layouts: Layouts,
    first: Array,
    stop: Array,
    sizes: Sequence[int] | None = None,
) -> Load:
    """The load of the stages first .. stop - 1; nothing where there are none."""
    start = stage_start(model, layouts, first, sizes)
    end = stage_start(model, layouts, stop, sizes)
    load = stage_load(model, start, end - 1)
    return load.times((stop > first).astype(float))


def even_load(model: Model, layouts: Layouts, stage: Array) -> Load:
    """The load of stage number `stage` when layers are cut evenly (first stages take the rest)."""
    return load_between(model, layouts, stage, stage + 1)


def rank_load(
    model: Model, layouts: Layouts, rank: Array, sizes: Sequence[int] | None = None
) -> Load:
    """All chunks of pipeline rank number `rank`, placed as `rank_of` says; `sizes` as in
    `stage_start`."""
    p, v = layouts.pp.astype(float), layouts.vpp.astype(float)
    folded = layouts.folded
    if len(model.layers) > 1 or sizes is not None:
        here: list[Load] = []
        for chunk in range(int(v.max(initial=1))):
            back = 2 * p - 1 - rank if chunk == 1 else rank + chunk * p
            stage = np.minimum(np.where(folded, back, rank + chunk * p), p * v - 1)
            load = load_between(model, layouts, stage, stage + 1, sizes)
            here.append(load.times((chunk < v).astype(float)))
        return merge(here)
    base = np.floor(model.num_layers / (p * v))
    extra = model.num_layers - base * p * v
    more = np.clip(np.ceil((extra - rank) / p), 0.0, v)
    up = 1.0 * (rank < extra) + (2 * p - 1 - rank < extra)
    more = np.where(folded, up, more)
    return Load(
        layers=(base * v + more,),
        embedding=(rank == 0).astype(float),
        head=(rank == np.where(folded, 0.0, p - 1)).astype(float),
    )
