"""What each layer keeps for backward, on one layout.

    sets         ranks r of the pipeline, policies k (recompute modes, offloaded fractions)
    variables    n[r, k], whole numbers of layers
    minimise     sum_k n[r, k] t_k                  seconds of a micro-batch, on every rank alone
    subject to   sum_k n[r, k] = layers of r        (all)
                 peak_r(n) <= capacity              (memory)

Ranks share no memory, and a step is never faster for a slower rank, so they are solved apart. The
fractional relaxation has at most two policies in use on a rank (one inequality beside the sum), so
pairs are enumerated: the rank's first x layers under one policy, the others under another. Peaks
and times are the cost model's, of all pairs, numbers and ranks at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from ..costmodel.fleet import Fleet
from ..costmodel.layout import Layouts
from ..costmodel.mixed import Mixed
from ..costmodel.options import Options
from ..model import Model
from ..plan import SCHEDULES, even_sizes, rank_of, stages_of

Ints = NDArray[np.intp]


def choose_layers(
    fleet: Fleet, objective: str, sizes: Sequence[int] | None = None
) -> tuple[Options, ...]:
    """The options of every layer with the least time that fits; where none does, the least peak.

    The fleet has one layout, whose stages hold `sizes` layers; None = as even as can be. Of equal
    times the choice with more layers under the first policy wins, then the one that keeps less;
    where memory is optimised, the least peak is all that counts.
    """
    model, policies = fleet.model, fleet.policies
    if len(policies) == 1:
        return policies
    chunks = _chunks_of_ranks(model, fleet.layouts, sizes)
    on_rank = [np.concatenate(parts) for parts in chunks]
    groups = _group_of_layers(model)
    rows, counts, ranks = _pairs(on_rank, groups, len(policies), len(model.layers))
    pool = fleet.at(ranks.astype(float), np.zeros(1, dtype=np.intp))
    peaks, seconds = np.zeros((2, len(ranks)))
    for k, (grid, capacity) in enumerate(zip(fleet.grids, fleet.capacities, strict=True)):
        here = np.flatnonzero(pool == k)
        mixed = Mixed.of(grid)
        peaks[here] = mixed.peaks(counts[here], ranks[here]) / capacity
        seconds[here] = mixed.seconds(counts[here], ranks[here])
    chosen = np.zeros(model.num_layers, dtype=np.intp)
    for rank, layers in enumerate(on_rank):
        here = np.flatnonzero(ranks == rank)
        fitting = here[peaks[here] <= 1.0]
        if objective == "memory" or not len(fitting):
            best = here[np.argmin(peaks[here])]
        else:
            plain = counts[fitting, 0].sum(axis=1)
            order = np.lexsort((peaks[fitting], -plain, np.round(seconds[fitting], 12)))
            best = fitting[order[0]]
        some, lean, rest = rows[best]
        chosen[layers] = rest
        chosen[layers[_spread([len(part) for part in chunks[rank]], some)]] = lean
    return tuple(policies[k] for k in chosen)


def _chunks_of_ranks(
    model: Model, layout: Layouts, sizes: Sequence[int] | None
) -> list[list[Ints]]:
    """The layers of every chunk of each pipeline rank."""
    pp, vpp = int(layout.pp[0]), int(layout.vpp[0])
    schedule = SCHEDULES[int(layout.schedule[0])]
    held: list[list[Ints]] = [[] for _ in range(pp)]
    stages = even_sizes(model.num_layers, pp * vpp) if sizes is None else sizes
    for index, stage in enumerate(stages_of(stages, "")):
        first, last = stage.layers
        held[rank_of(schedule, index, pp)].append(np.arange(first, last + 1, dtype=np.intp))
    return held


def _group_of_layers(model: Model) -> Ints:
    """The layer group of each layer."""
    return np.repeat(np.arange(len(model.layers)), [layer.repeat for layer in model.layers])


def _pairs(
    on_rank: Sequence[Ints], groups: Ints, num_policies: int, num_groups: int
) -> tuple[Ints, NDArray[np.float64], Ints]:
    """All choices: (layers under the first of a pair, that policy, the other), the counts by
    policy and group, and the rank of each."""
    rows: list[tuple[int, int, int]] = []
    counts: list[NDArray[np.float64]] = []
    ranks: list[int] = []
    pairs = list(permutations(range(num_policies), 2)) or [(0, 0)]
    for rank, layers in enumerate(on_rank):
        of_group = np.zeros((len(layers) + 1, num_groups))
        np.add.at(of_group[1:], (np.arange(len(layers)), groups[layers]), 1.0)
        below = np.cumsum(of_group, axis=0)  # in the first x layers
        for one, other in pairs:
            table = np.zeros((len(layers), num_policies, num_groups))
            table[:, one] += below[:-1]
            table[:, other] += below[-1] - below[:-1]
            counts.append(table)
            rows += [(x, one, other) for x in range(len(layers))]
            ranks += [rank] * len(layers)
    return np.array(rows, dtype=np.intp), np.concatenate(counts), np.array(ranks, dtype=np.intp)


def _spread(sizes: Sequence[int], some: int) -> Ints:
    """`some` of the layers of a rank's chunks, the first of each and as many of each as can be.

    >>> _spread([3, 3], 3)
    array([0, 1, 3])
    """
    starts = np.cumsum([0, *sizes[:-1]])
    places = sorted(
        (offset, start + offset)
        for start, size in zip(starts, sizes, strict=True)
        for offset in range(size)
    )
    return np.array(sorted(place for _, place in places[:some]), dtype=np.intp)
