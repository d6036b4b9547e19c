"""What every rank of one layout's pipeline costs, by the layers that it may hold.

A way is a rank with the layers of earlier ranks and those up to its own last one. For each there
are

    work_s    seconds of a micro-batch, the layers keeping what fits in the least time
    chain_s   the makespan that this rank alone asks for, as in `reach.py`; with earlier ranks
              keeping an equal share of their layers in each chunk
    share     its peak under the leanest policy, as a share of what a plan may fill

so that the cut with the least largest chain is a good one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..schedules import SCHEDULES, rank_of
from .cut_ranks import Before, Rank
from .fleet import Fleet
from .graph import Array
from .mixtures import least_extra_s, part
from .reach import Reach
from .schedule import Action, slowest_chain_s
from .seconds import fastest
from .stages import Load

Ints = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """Ways of ranks; arrays of one length."""

    rank: Ints
    first: Ints
    stop: Ints
    work_s: Array
    extra_s: Array
    """What of it the memory costs; infinite where no policy fits."""
    chain_s: Array
    share: Array


def ways_of(fleet: Fleet, most_layers: int) -> Ways:
    """All ways of ranks of the fleet's only layout, with so many layers at most, and one per chunk
    at least."""
    layout, model = fleet.layouts, fleet.model
    p, v, total = int(layout.pp[0]), int(layout.vpp[0]), model.num_layers
    rank, first, stop = (
        np.concatenate(columns) for columns in zip(*_pairs(p, v, total, most_layers), strict=True)
    )
    of_group = np.repeat(np.arange(len(model.layers)), [layer.repeat for layer in model.layers])
    until_layer = np.zeros((len(model.layers), total + 1))
    np.add.at(until_layer, (of_group, np.arange(1, total + 1)), 1.0)
    until_layer = np.cumsum(until_layer, axis=1)
    counts = until_layer[:, stop] - until_layer[:, first]
    work_s, extra_s, share = np.zeros((3, len(rank)))
    pool = fleet.at(rank.astype(float), np.zeros(len(rank), dtype=np.intp))
    for k in range(len(fleet.grids)):
        here = np.flatnonzero(pool == k)
        work_s[here], extra_s[here], share[here] = _held(fleet, k, rank[here], counts[:, here])
    chain_s = np.full(len(rank), np.inf)
    one = np.zeros(1, dtype=np.intp)
    repeats = tuple(layer.repeat for layer in model.layers)
    reach = Reach(layouts=layout, repeats=repeats, pools=fleet.on_pools(one)[0])
    steps = [float(Rank.of(reach, r, 1).lead_s(np.zeros((len(repeats), 1)))[0]) for r in range(p)]
    for r in range(p):
        here = np.flatnonzero((rank == r) & np.isfinite(extra_s))
        before, own = until_layer[:, first[here]], counts[:, here]
        used = np.unique(fleet.at(np.arange(r, dtype=float), one)).tolist() if r else []
        lead = sum(steps[:r]) + _lead_s(reach, used, before)
        if reach.flat[0]:
            lead = np.full(len(here), reach.flat_lead_s[0])
        chain_s[here] = _chain_s(reach, r, lead, before, own, extra_s[here])
    return Ways(
        rank=rank, first=first, stop=stop, work_s=work_s + extra_s, extra_s=extra_s,
        chain_s=chain_s, share=share,
    )  # fmt: skip


def held_by(fleet: Fleet, sizes: Sequence[int]) -> Ints:
    """Layers of every rank, of stages of these sizes."""
    p = int(fleet.layouts.pp[0])
    schedule = SCHEDULES[int(fleet.layouts.schedule[0])]
    held = np.zeros(p, dtype=np.intp)
    np.add.at(held, [rank_of(schedule, stage, p) for stage in range(len(sizes))], sizes)
    return held


def makespan_s(fleet: Fleet, sizes: Sequence[int], extra_s: Array) -> float:
    """The longest chain of actions of the fleet's only layout, its stages of these sizes; memory
    costs every rank `extra_s` per micro-batch."""
    layout, model = fleet.layouts, fleet.model
    p, v, m = int(layout.pp[0]), int(layout.vpp[0]), int(layout.num_microbatches[0])
    schedule = SCHEDULES[int(layout.schedule[0])]
    if not np.all(np.isfinite(extra_s)):
        return np.inf
    of_group = np.repeat(np.arange(len(model.layers)), [layer.repeat for layer in model.layers])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    counts = np.array(
        [np.bincount(of_group[a:b], minlength=len(model.layers)) for a, b in pairwise(starts)]
    ).T.astype(float)
    owner = np.array([rank_of(schedule, stage, p) for stage in range(p * v)])
    one = np.zeros(1, dtype=np.intp)
    pool = fleet.at(owner.astype(float), one)
    ends = np.zeros((2, p * v))
    ends[0, 0] = ends[1, -1] = 1.0
    pieces = np.concatenate([ends[:1], counts, ends[1:]])
    pools = fleet.on_pools(one)[0]
    actions = np.array([pools[k].action_s for k in pool])
    seconds: dict[str, Array] = {}
    for kind, name in (("F", "forward"), ("B", "backward"), ("I", "inputs")):
        tables = np.stack([getattr(on.seconds, name)[:, 0] for on in pools])
        seconds[kind] = np.einsum("ps,sp->s", pieces, tables[pool]) + actions
    share = counts.sum(axis=0) / held_by(fleet, sizes)[owner]
    more = extra_s[owner] * share
    weights = seconds["B"] - seconds["I"] + actions
    seconds = {**seconds, "B": seconds["B"] + more, "I": seconds["I"] + more, "W": weights}
    hop_s = min(float(on.hop_s[0]) for on in pools)

    def duration(action: Action) -> float:
        return float(seconds[action[0]][action[1]])

    return slowest_chain_s(schedule, p, v, m, duration, hop_s)


def _pairs(p: int, v: int, total: int, most: int) -> list[tuple[Ints, Ints, Ints]]:
    """(rank, first, stop) of every rank."""
    found: list[tuple[Ints, Ints, Ints]] = []
    for r in range(p):
        behind = p - 1 - r
        earliest, latest = max(r * v, total - (p - r) * most), min(total - (p - r) * v, r * most)
        starts = np.arange(earliest, latest + 1)[:, None]
        first, stop = np.broadcast_arrays(starts, starts + np.arange(v, most + 1))
        legal = (stop <= total - behind * v) & (stop >= total - behind * most)
        found.append((np.full(int(legal.sum()), r), first[legal], stop[legal]))
    return found


def _held(fleet: Fleet, pool: int, rank: Ints, counts: Array) -> tuple[Array, Array, Array]:
    """By way: seconds of a micro-batch, the least beyond them that fits, share of the memory."""
    grid, capacity = fleet.grids[pool], fleet.capacities[pool]
    layout = grid.layouts
    key = np.concatenate([rank[None], counts]).T
    kinds, of_way = np.unique(key, axis=0, return_inverse=True)
    ranks, held = kinds[:, 0], kinds[:, 1:].T
    rows = np.zeros(len(kinds), dtype=np.intp)
    folded = layout.folded[0]
    last = 0 if folded else int(layout.pp[0]) - 1
    load = Load(
        layers=tuple(held), embedding=(ranks == 0).astype(float), head=(ranks == last).astype(float)
    )
    peaks = part(grid.peaks([ranks], [load], rows), 0)
    seconds = np.einsum("pr,pr->r", load.counts, grid.seconds(rows).both)
    of_policy = np.einsum("pr,kpr->kr", load.counts, grid.extra_s(rows))
    extra_s = least_extra_s(peaks, of_policy, capacity)
    least = np.maximum(peaks.kept + peaks.working, peaks.others * peaks.kept + peaks.closing)
    share = np.min(least, axis=0) / capacity
    actions = 2 * float(layout.vpp[0]) * grid.action_s
    return (seconds + actions)[of_way], extra_s[of_way], share[of_way]


def _lead_s(reach: Reach, pools: Sequence[int], before: Array) -> Array:
    """What the layers of earlier ranks, on some of the pools, add to the way to a rank's start."""
    if not len(pools):
        return np.zeros(before.shape[1])
    quickest = fastest([reach.pools[k].seconds for k in pools])
    back = np.where(reach.layouts.splits, 0.0, quickest.backward)
    through = (quickest.forward + back)[1:-1] / reach.layouts.vpp
    return np.einsum("gr,g->r", before, through[:, 0])


def _chain_s(reach: Reach, r: int, lead: Array, before: Array, own: Array, extra_s: Array) -> Array:
    """The makespan that rank `r` asks for, by the layers before it and its own, by group."""
    num = before.shape[1]
    rank = Rank.of(reach.take(np.zeros(num, dtype=np.intp)), r, num)
    left = np.asarray(reach.repeats, dtype=float)[:, None] - before
    longest = np.full(num, -np.inf)
    for rule in rank.inequalities(lead, left):
        value = rule.constant + np.einsum("gr,gr->r", own, rule.per_layer)
        longest = np.maximum(longest, value + rule.per_extra * extra_s)
    if rank.has_gap.any():
        each = before[0] / reach.chunks[0]
        gap = rank.gap_s(own[0], left[0], Before(first_most=each, last=each))
        longest = longest + np.where(rank.has_gap, gap, 0.0)
    return longest
