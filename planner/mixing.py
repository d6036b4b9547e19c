"""What each layer keeps for backward, on one layout.

    sets         ranks r of the pipeline, policies k (recompute modes, offloaded fractions)
    variables    n[r, k], whole numbers of layers
    minimise     sum_k n[r, k] t_k                  seconds of a micro-batch, on every rank alone
    subject to   sum_k n[r, k] = layers of r        (all)
                 peak_r(n) <= capacity              (memory)

Ranks share no memory, and a step is never faster for a slower rank, so they are solved apart. The
fractional relaxation has at most two policies in use on a rank (one inequality beside the sum), so
pairs are enumerated: the rank's first x layers under one policy, the others under another. Peaks
and times are the cost model's; a stage whose last layer is off the device waits for it first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from ..costmodel.fleet import Fleet
from ..costmodel.graph import Array
from ..costmodel.layout import Layouts
from ..costmodel.mixed import Mixed
from ..costmodel.options import Options
from ..model import Model
from ..plan import even_sizes, stages_of
from ..schedules import SCHEDULES, rank_of

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
    groups = _group_of_layers(model)
    all_of = _mixtures(chunks, groups, len(policies), len(model.layers))
    pool = fleet.at(all_of.ranks.astype(float), np.zeros(1, dtype=np.intp))
    on_pool = [Mixed.of(grid) for grid in fleet.grids]

    def peaks_of(some: Ints) -> Array:
        """Peaks of mixtures, as shares of what a plan may fill."""
        found = np.zeros(len(some))
        for k, (mixed, capacity) in enumerate(zip(on_pool, fleet.capacities, strict=True)):
            here = np.flatnonzero(pool[some] == k)
            if len(here):
                counts, ranks = all_of.counts[some[here]], all_of.ranks[some[here]]
                found[here] = mixed.peaks(counts, ranks) / capacity
        return found

    if objective == "memory":
        peaks = peaks_of(np.arange(len(all_of.ranks)))
        best = [int(here[np.argmin(peaks[here])]) for here in all_of.of_ranks()]
    else:
        seconds = np.zeros(len(pool))
        for k, mixed in enumerate(on_pool):
            here = np.flatnonzero(pool == k)
            seconds[here] = mixed.seconds(all_of.counts[here], all_of.ranks[here])
            seconds[here] += all_of.fetch_s(here, chunks, groups, mixed)
        best = _fastest_that_fit(all_of, seconds, peaks_of)
    chosen = np.zeros(model.num_layers, dtype=np.intp)
    for rank, index in enumerate(best):
        layers = np.concatenate(chunks[rank])
        chosen[layers] = all_of.rest[index]
        spread = _spread([len(part) for part in chunks[rank]])
        chosen[layers[spread[: all_of.some[index]]]] = all_of.lean[index]
    return tuple(policies[k] for k in chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mixtures:
    """Choices of ranks, rank by rank: arrays of one length."""

    ranks: Ints
    some: Ints
    """Layers under the first policy of a pair, `lean`; the others are under `rest`."""
    lean: Ints
    rest: Ints
    counts: Array
    """Layers by policy and group."""

    def of_ranks(self) -> list[Ints]:
        """The choices of every rank."""
        ends = np.flatnonzero(np.diff(self.ranks)) + 1
        return np.split(np.arange(len(self.ranks)), ends)

    def fetch_s(
        self, some: Ints, chunks: Sequence[Sequence[Ints]], groups: Ints, mixed: Mixed
    ) -> Array:
        """What the backwards of a rank's stages wait for first: their last layers' bytes that are
        off the device (`costmodel/away.py`)."""
        found, each = np.zeros(len(some)), mixed.fetch_s()
        if not each.any():
            return found
        rank, num_layers = self.ranks[some], len(groups)
        for number in np.unique(rank):
            here = np.flatnonzero(rank == number)
            count, lean, rest = (x[some[here]] for x in (self.some, self.lean, self.rest))
            sizes = [len(part) for part in chunks[number]]
            place = np.argsort(_spread(sizes))
            for part, end in zip(chunks[number], np.cumsum(sizes) - 1, strict=True):
                if part[-1] == num_layers - 1 and mixed.last_is_there:
                    continue
                policy = np.where(count > place[end], lean, rest)
                found[here] += each[policy, groups[part[-1]]]
        return found


FIRST_LOOK = 12
"""Choices of a rank whose memory is looked at first; then ever more of them."""
MORE = 6


def _fastest_that_fit(
    all_of: _Mixtures, seconds: Array, peaks_of: Callable[[Ints], Array]
) -> list[int]:
    """By rank the choice that `choose_layers` wants; memory is worked out in the order of time, for
    no more than it takes."""
    seconds = np.round(seconds, 12)
    plain = all_of.counts[:, 0].sum(axis=1)
    order = np.lexsort((-plain, seconds, all_of.ranks))
    ranks, keys = all_of.ranks[order], np.stack([seconds, plain])[:, order]
    alike = np.cumsum(np.append(0, np.any(np.diff(keys) != 0, axis=0) | (np.diff(ranks) != 0)))
    ends = np.searchsorted(ranks, np.arange(ranks[-1] + 1), side="right")
    begin = np.append(0, ends[:-1])
    best = np.full(len(ends), -1, dtype=np.intp)
    peaks = np.full(len(order), np.inf)
    at, size = begin.copy(), FIRST_LOOK
    while (best < 0).any():
        open_ = np.flatnonzero(best < 0)
        last = np.minimum(at[open_] + size, ends[open_]) - 1
        until = np.searchsorted(alike, alike[last], side="right")  # equal ones together
        places = np.concatenate([np.arange(a, b) for a, b in zip(at[open_], until, strict=True)])
        peaks[places] = peaks_of(order[places])
        for rank, stop in zip(open_, until, strict=True):
            here = np.arange(at[rank], stop)
            fitting = here[peaks[here] <= 1.0]
            if len(fitting):
                equal = fitting[alike[fitting] == alike[fitting[0]]]
                best[rank] = order[equal[np.argmin(peaks[equal])]]
            elif stop == ends[rank]:
                every = np.arange(begin[rank], stop)
                best[rank] = order[every[np.argmin(peaks[every])]]
            at[rank] = stop
        size *= MORE
    return best.tolist()


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


def _mixtures(
    chunks: Sequence[Sequence[Ints]], groups: Ints, num_policies: int, num_groups: int
) -> _Mixtures:
    """All choices of all ranks."""
    pairs = np.array(list(permutations(range(num_policies), 2)) or [(0, 0)], dtype=np.intp)
    found: list[tuple[Ints, ...]] = []
    counts: list[Array] = []
    for rank, parts in enumerate(chunks):
        layers = np.concatenate(parts)
        of_group = np.zeros((len(layers) + 1, num_groups))
        np.add.at(of_group[1:], (np.arange(len(layers)), groups[layers]), 1.0)
        below = np.cumsum(of_group, axis=0)  # in the first x layers
        which, some = (x.ravel() for x in np.indices((len(pairs), len(layers))))
        alone = np.unique(pairs[:, 1], return_index=True)[1]  # all layers alike: once per policy
        new = (some > 0) | np.isin(which, alone)
        which, some = which[new], some[new]
        lean, rest = pairs[which].T
        every = np.arange(len(some))
        table = np.zeros((len(some), num_policies, num_groups))
        table[every, lean] += below[some]
        table[every, rest] += below[-1] - below[some]
        counts.append(table)
        found.append((np.full(len(some), rank), some, lean, rest))
    ranks, some, lean, rest = map(np.concatenate, zip(*found, strict=True))
    return _Mixtures(ranks=ranks, some=some, lean=lean, rest=rest, counts=np.concatenate(counts))


def _spread(sizes: Sequence[int]) -> Ints:
    """The layers of a rank's chunks in the order in which some of them are taken: the first of each
    chunk, the second of each, ...

    >>> _spread([3, 3])
    array([0, 3, 1, 4, 2, 5])
    """
    starts = np.cumsum([0, *sizes[:-1]])
    places = sorted(
        (offset, start + offset)
        for start, size in zip(starts, sizes, strict=True)
        for offset in range(size)
    )
    return np.array([place for _, place in places], dtype=np.intp)
