"""The longest chains through the pipelines of a grid, in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .graph import Array
from .grid_rows import (
    GPIPE,
    INTERLEAVED,
    RANKS,
    SPLIT,
    Index,
    layers_before,
    load_of,
    ranks_looked_at,
)
from .pieces import Pieces
from .ranks import hop_s, stage_times
from .schedule import chain_s
from .split_chains import SplitChains
from .stages import Load, stage_load

if TYPE_CHECKING:
    from .bounds import Grid


class Pipeline:
    """Rows with unlike pipelines, layers under the policy that takes the least time."""

    def __init__(self, grid: Grid, rows: Index) -> None:
        self.grid, self.layouts = grid, grid.layouts.take(rows)
        model, layouts = grid.model, self.layouts
        use_all = layouts.pp == 1
        self.loads = [load_of(model, layouts, rank) for rank in ranks_looked_at(model, layouts)]
        self.m = layouts.num_microbatches.astype(float)
        self.p = layouts.pp.astype(float)
        everything = stage_load(model, np.zeros(1), np.array([model.num_layers - 1.0]))
        befores = [layers_before(model, layouts, rank) for rank in ranks_looked_at(model, layouts)]
        n = len(rows)
        count = len(grid.policies)
        self.forward = np.zeros((count, len(RANKS), n))
        self.backward = np.zeros_like(self.forward)
        self.all_s = np.full(n, np.inf)
        self.before = np.full((len(RANKS), n), np.inf)
        hop = np.zeros(n)
        action_s = np.where(self.p > 1, grid.alone.host("pp_action"), 0.0)
        for k in range(count):
            fast = grid.pieces(k, rows, quick=True)
            full = grid.pieces(k, rows) if grid.quick is not grid.costs else fast

            def seconds(
                load: Load, fast: Pieces = fast, full: Pieces = full
            ) -> tuple[Array, Array]:
                quick_s = stage_times(load, fast, grid.alone)
                if full is fast:
                    return quick_s.forward_s, quick_s.backward_s
                full_s = stage_times(load, full, grid.everyone)
                return (
                    np.where(use_all, full_s.forward_s, quick_s.forward_s),
                    np.where(use_all, full_s.backward_s, quick_s.backward_s),
                )

            for r, load in enumerate(self.loads):
                forward, backward = seconds(load)
                self.forward[k, r] = forward + layouts.vpp * action_s
                self.backward[k, r] = backward + layouts.vpp * action_s
            self.all_s = np.minimum(self.all_s, sum(seconds(everything)) + 2 * self.p * action_s)
            for r, (rank, load) in enumerate(
                zip(ranks_looked_at(model, layouts), befores, strict=True)
            ):
                lead = np.where(rank > 0, sum(seconds(load)), 0.0) + 2 * rank * action_s
                self.before[r] = np.minimum(self.before[r], lead)
            hop = hop_s(fast, layouts, grid.alone)
        self.fill_hops = np.zeros(n)
        if grid.alone.pool.stack.can_overlap:  # as in the simulator: fill and drain alone
            self.fill_hops, hop = 2 * (self.p - 1) * hop, 0.0 * hop
        self.hop = hop
        self.fastest = np.argmin(self.forward + self.backward, axis=0)
        self.split = self._split(rows)

    def _split(self, rows: Index) -> SplitChains | None:
        """The rows whose backward is split; None if there are none."""
        which = np.flatnonzero(np.isin(self.layouts.schedule, SPLIT))
        if not len(which):
            return None
        grid, layouts = self.grid, self.layouts.take(which)
        costs = [grid.pieces(k, rows[which], quick=True) for k in range(len(grid.policies))]
        ranks = ranks_looked_at(grid.model, layouts)
        return SplitChains(grid.model, layouts, ranks, costs, grid.alone, self.hop[which])

    def _least(self, values: Array) -> Array:
        return np.take_along_axis(values, self.fastest[None], axis=0)[0]

    def extra_s(self, r: int) -> Array:
        """Seconds per micro-batch beyond the fastest policy, by policy and row."""
        total = self.forward[:, r] + self.backward[:, r]
        return total - np.min(total, axis=0)

    def chains(self) -> Array:
        """The longest chain of every row, layers under the fastest policy."""
        n = len(self.layouts)
        return self.chains_with(np.zeros((len(RANKS), n)), np.arange(n))

    def chains_with(self, extra: Array, rows: Index) -> Array:
        """The same of `rows`, where every micro-batch of a rank takes `extra` seconds more."""
        layouts, p, m, hop = self.layouts.take(rows), self.p[rows], self.m[rows], self.hop[rows]
        chunked = (layouts.schedule == INTERLEAVED) & (layouts.vpp > 1)
        all_forward, all_backward = self._least(self.forward), self._least(self.backward)
        best = np.zeros(len(rows))
        for r, rank in enumerate(ranks_looked_at(self.grid.model, layouts)):
            forward, own = all_forward[r][rows], all_backward[r][rows]
            backward = own + extra[r]
            before = self.before[r][rows]
            behind = np.maximum(self.all_s[rows] - before - forward - own, 0.0)
            chain = chain_s(
                forward_s=forward,
                backward_s=backward,
                before_s=before + 2 * rank * hop,
                behind_s=behind + 2 * (p - 1 - rank) * hop,
                micro_batches=m,
                warm_up=np.where(layouts.schedule == GPIPE, m, np.minimum(m, p - rank)),
            )
            led = np.where(rank == p - 1, before + 2 * rank * hop, 0.0)
            best = np.maximum(best, np.where(chunked, led + m * (forward + backward), chain))
        split = np.isin(layouts.schedule, SPLIT)
        if self.split is not None and split.any():
            place = np.cumsum(np.isin(self.layouts.schedule, SPLIT)) - 1
            best[split] = self.split.chains(extra[:, split], place[rows[split]])
        return best + self.fill_hops[rows]
