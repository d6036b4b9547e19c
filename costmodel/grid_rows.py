"""Rows of a grid of layouts: which share a result, and what a pipeline rank of each holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..model import Model
from ..schedules import SCHEDULES
from .graph import Array
from .in_flight import Shares, least_in_flight, least_moment
from .kept import Kept
from .layout import Layouts
from .memory import InFlight
from .stages import Load

GPIPE, INTERLEAVED = SCHEDULES.index("gpipe"), SCHEDULES.index("interleaved")
ZB_H2 = SCHEDULES.index("zb-h2")
Index = NDArray[np.intp]


def ranks_looked_at(
    model: Model,
    layouts: Layouts,
    sizes: Sequence[int] | None = None,
    until: Sequence[Array] = (),
) -> list[Array]:
    """The pipeline ranks that are looked at: the first, the second, the first one beyond the first
    group of layers (the fullest, where a few lighter layers come first), the first of each further
    pool, and the last; of stages of given sizes all."""
    last = (layouts.pp - 1).astype(float)
    if sizes is not None:
        return [np.minimum(float(r), last) for r in range(int(layouts.pp.max(initial=1)))]
    ranks = [np.zeros(len(layouts)), np.minimum(1.0, last)]
    if len(model.layers) > 1:
        largest = np.ceil(model.num_layers / (layouts.pp * layouts.vpp))
        ranks.append(np.minimum(np.ceil(model.layers[0].repeat / largest), last))
    return [*ranks, *until[:-1], last]


def cuts_of_a_layer(
    model: Model, layouts: Layouts, balance_loss: str = "none"
) -> list[NDArray[np.int64]]:
    """Everything of a layout that the cost of one micro-batch through a layer depends on."""
    x = layouts
    over_samples = not model.is_decoder or balance_loss == "global-batch"
    return [
        x.micro_batch_seqs, x.tp, x.sequence_parallel, x.cp, x.ulysses, x.ep, x.expert_tp,
        (x.zero > 0).astype(np.int64), (x.zero > 2).astype(np.int64),
        x.dp if over_samples else np.zeros(1, dtype=np.int64),
    ]  # fmt: skip


def alike(columns: Sequence[NDArray[np.int64]]) -> tuple[Index, Index]:
    """The first row of each kind, and the kind of each row; rows of a kind agree in all columns."""
    key = np.zeros(1, dtype=np.int64)
    span = 1
    for column in columns:
        size = int(column.max(initial=0)) + 1
        if span * size >= 2**62:
            key = np.unique(key, return_inverse=True)[1]
            span = int(key.max(initial=0)) + 1
        key, span = key * size + column, span * size
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return first, inverse


def in_flight_of(layouts: Layouts, rank: Array, load: Load, kept: Kept) -> InFlight:
    """Live chunk activations of a rank."""
    first, later = _whole_in_flight(layouts, rank)
    split = layouts.splits
    if split.any():
        held = least_in_flight(layouts, rank, Shares.of(load, layouts, kept))
        first, later = np.where(split, 0.0, first), np.where(split, held, later)
    return InFlight(first=first, later=later)


def least_live(layouts: Layouts, rank: Array) -> tuple[Array, Array]:
    """Chunks of a rank in flight at one of its backwards, and chunks whose weights' gradients wait
    then: the fewer of the moments that `in_flight_of` tells apart."""
    first, later = _whole_in_flight(layouts, rank)
    whole, waiting = InFlight(first=first, later=later).least, np.zeros(len(layouts))
    split = layouts.splits
    if split.any():
        some, others = least_moment(layouts, rank)
        whole, waiting = np.where(split, some, whole), np.where(split, others, waiting)
    return whole, waiting


def _whole_in_flight(layouts: Layouts, rank: Array) -> tuple[Array, Array]:
    """At the first backward and at later ones, where the backward is one action."""
    m = layouts.num_microbatches.astype(float)
    p, v = layouts.pp.astype(float), layouts.vpp.astype(float)
    warm = np.where(layouts.schedule == GPIPE, m, np.minimum(m, p - rank))
    chunked = np.minimum((v - 1) * p + 2 * (p - 1 - rank) + 1, m * v)
    first = np.where((layouts.schedule == INTERLEAVED) & (v > 1), chunked, warm)
    return first, np.where(first < m * v, first, first - 1)
