"""The longest chains of actions through the pipelines of a grid whose stages are given.

The chain through a rank is what leads to its first action, its own work, the gaps in which it must
wait, and what follows its last action (`schedule.chain_s`, `schedule.split_chain_s`). A few ranks
are looked at (`grid_rows.ranks_looked_at`). What stages hold follows from pp, vpp and schedule
alone, so that it is worked out once per shape of a pipeline; times are gathered per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..model import Model
from .graph import Array
from .grid_rows import GPIPE, INTERLEAVED, Index, ranks_looked_at
from .layout import Layouts
from .pipeline_pools import OnPool
from .schedule import chain_s, split_chain_s, split_hops, split_warm_up
from .stages import Load, load_between, rank_load


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoads:
    """What one rank of every shape holds, and what other stages hold around it; loads of stages
    that may lie on several pools are given by pool."""

    rank: Array
    pool: Array
    """Where it lies."""
    own: Load
    before: tuple[Load, ...]
    """The stages before its first."""
    first: Load
    last: Load
    """Its first and its last stage."""
    after: tuple[Load, ...]
    """The stages behind its last."""
    behind: Array
    """Their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The pipelines of a grid by pp, vpp and schedule, and by the ranks that lie on each pool."""

    of_row: Index
    """The shape of each row."""
    whole: tuple[Load, ...]
    """All stages, by pool."""
    ranks: tuple[RankLoads, ...]

    @staticmethod
    def of(
        model: Model,
        layouts: Layouts,
        until: Sequence[Array],
        of_row: Index,
        sizes: Sequence[int] | None,
    ) -> Shapes:
        """The loads of some ranks of `layouts`, one row per shape; `sizes` as in `stage_start`.

        Of pool k the ranks are those below `until[k]` and of no earlier one.
        """
        stages = (layouts.pp * layouts.vpp).astype(float)
        folded = layouts.folded

        def between(first: Array, stop: Array) -> tuple[Load, ...]:
            if len(until) == 1:
                return (load_between(model, layouts, first, stop, sizes),)
            return _by_pool(model, layouts, first, stop, sizes, until)

        found: list[RankLoads] = []
        for rank in ranks_looked_at(model, layouts, sizes, until):
            behind = np.where(folded, rank, layouts.pp - 1 - rank)
            last = stages - 1 - behind
            found.append(
                RankLoads(
                    rank=rank,
                    pool=sum(((rank >= end).astype(np.intp) for end in until[:-1]),
                             np.zeros(len(rank), dtype=np.intp)),
                    own=rank_load(model, layouts, rank, sizes),
                    before=between(0.0 * rank, rank),
                    first=load_between(model, layouts, rank, rank + 1, sizes),
                    last=load_between(model, layouts, last, last + 1, sizes),
                    after=between(stages - behind, stages),
                    behind=behind,
                )
            )  # fmt: skip
        return Shapes(of_row=of_row, whole=between(0.0 * stages, stages), ranks=tuple(found))


def _by_pool(
    model: Model,
    layouts: Layouts,
    first: Array,
    stop: Array,
    sizes: Sequence[int] | None,
    until: Sequence[Array],
) -> tuple[Load, ...]:
    """The load of the stages first .. stop - 1 on each pool."""
    p, stages = layouts.pp.astype(float), (layouts.pp * layouts.vpp).astype(float)
    folded = layouts.folded
    nothing = load_between(model, layouts, 0.0 * p, 0.0 * p, sizes)
    loads = [nothing for _ in until]
    for number in range(int(stages.max(initial=0))):
        stage = np.minimum(float(number), stages - 1)
        there = (number >= first) & (number < stop) & (number < stages)
        rank = np.where(folded, np.minimum(stage, 2 * p - 1 - stage), stage % p)
        load, begin = load_between(model, layouts, stage, stage + 1, sizes), 0.0 * p
        for k, end in enumerate(until):
            here = there & (rank >= begin) & (rank < end)
            loads[k] = loads[k].plus(load.times(here.astype(float)))
            begin = end
    return tuple(loads)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Rows of a grid with what one rank of each holds."""

    layouts: Layouts
    place: Index
    """Their shapes."""
    pools: tuple[OnPool, ...]
    whole: tuple[Load, ...]
    hops_s: Array
    """From a rank to the next, the least of all."""

    def own(self, rank: RankLoads, load: Load, name: str) -> Array:
        """Seconds of a load of the rank, on its pool."""
        found = self.total(load, name, 0)
        for k in range(1, len(self.pools)):
            found = np.where(rank.pool[self.place] == k, self.total(load, name, k), found)
        return found

    def all(self, loads: Sequence[Load], name: str) -> Array:
        """Seconds of loads on all pools."""
        return sum((self.total(load, name, k) for k, load in enumerate(loads)), np.zeros(1))

    def total(self, load: Load, name: str, pool: int) -> Array:
        """Seconds of a load, piece by piece."""
        seconds = getattr(self.pools[pool].seconds, name)
        return np.einsum("pr,pr->r", load.counts[:, self.place], seconds)

    @property
    def action_s(self) -> Array:
        """The least host time of an action."""
        least = min(pool.action_s for pool in self.pools)
        return np.where(self.layouts.pp > 1, least, 0.0)


def chains(
    shapes: Shapes,
    layouts: Layouts,
    rows: Index,
    pools: Sequence[OnPool],
    extra_s: Sequence[Array] | None,
) -> Array:
    """The longest chain of `rows`, without transfers of fill and drain that hide elsewhere.

    `layouts` and `pools` are those of the rows, in their order; a micro-batch of the i-th rank
    looked at takes `extra_s[i]` seconds more than the least.
    """
    split = layouts.splits
    best = np.zeros(len(rows))
    more = extra_s or [np.zeros(len(rows))] * len(shapes.ranks)
    for which, chain in ((~split, _whole_chain), (split, _split_chain)):
        here = np.flatnonzero(which)
        if not len(here):
            continue
        some = tuple(pool.take(here) for pool in pools)
        of_rows = _Rows(
            layouts=layouts.take(here),
            place=shapes.of_row[rows[here]],
            pools=some,
            whole=shapes.whole,
            hops_s=np.min([pool.hop_s for pool in some], axis=0),
        )
        found = np.zeros(len(here))
        for rank, extra in zip(shapes.ranks, more, strict=True):
            found = np.maximum(found, chain(rank, of_rows, extra[here]))
        best[here] = found
    return best


def _whole_chain(rank: RankLoads, rows: _Rows, extra_s: Array) -> Array:
    """gpipe, 1f1b and interleaved."""
    layouts, r = rows.layouts, rank.rank[rows.place]
    p, m, action_s = layouts.pp.astype(float), layouts.num_microbatches, rows.action_s
    forward = rows.own(rank, rank.own, "forward") + layouts.vpp * action_s
    own = rows.own(rank, rank.own, "backward") + layouts.vpp * action_s
    before = rows.all(rank.before, "both") + 2 * r * action_s
    everything = rows.all(rows.whole, "both") + 2 * p * action_s
    behind = np.maximum(everything - before - forward - own, 0.0)
    backward = own + extra_s
    leads = before + 2 * r * rows.hops_s
    chain = chain_s(
        forward_s=forward,
        backward_s=backward,
        before_s=leads,
        behind_s=behind + 2 * (p - 1 - r) * rows.hops_s,
        micro_batches=m,
        warm_up=np.minimum(m, p - r),
    )
    flat = layouts.schedule == GPIPE
    through = everything + 2 * (p - 1) * rows.hops_s + extra_s
    chain = np.where(flat, through + (m - 1) * (forward + backward), chain)
    chunked = (layouts.schedule == INTERLEAVED) & (layouts.vpp > 1)
    return np.where(chunked, leads + m * (forward + backward), chain)


def _split_chain(rank: RankLoads, rows: _Rows, extra_s: Array) -> Array:
    """Schedules that split the backward."""
    layouts, r, action_s = rows.layouts, rank.rank[rows.place], rows.action_s
    p, v, m = layouts.pp, layouts.vpp, layouts.num_microbatches
    folded = layouts.folded
    forward = rows.own(rank, rank.own, "forward") + v * action_s
    first = rows.own(rank, rank.first, "forward") + action_s
    last = rows.own(rank, rank.last, "forward") + action_s
    before = rows.all(rank.before, "forward") + r * action_s
    back = rows.all(rank.after, "inputs") + rank.behind[rows.place] * action_s
    path = rows.all(rows.whole, "forward") + p * v * action_s - before - first + back
    counts = split_warm_up(layouts.schedule, p, v, m, r)
    return split_chain_s(
        forward_s=forward,
        backward_s=rows.own(rank, rank.own, "backward") + v * action_s + extra_s,
        before_s=before + r * rows.hops_s,
        path_s=path + split_hops(folded, p, v, r) * rows.hops_s,
        warm_up_s=counts[0] * first + counts[1] * forward + counts[2] * last,
        micro_batches=m,
        chunks=v,
        warm_up=counts[0] + 1,
    )
