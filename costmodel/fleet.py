"""The layouts of a grid on all pools of a cluster, in the order in which pipelines use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cluster import Cluster
from ..model import Model
from ..workload import Workload
from .graph import Array
from .grid_rows import Index
from .layout import Layouts
from .options import Options
from .pipeline_pools import OnPool, between_s, drift, fill_hops_s, until_ranks
from .priced_grid import PricedGrid
from .priced_pieces import Known
from .ranks import hop_s, sent_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What layouts cost on every pool."""

    cluster: Cluster
    model: Model
    layouts: Layouts
    policies: tuple[Options, ...]
    grids: tuple[PricedGrid, ...]
    capacities: tuple[float, ...]
    """What a plan may fill of a device of each pool."""
    until: tuple[Array, ...]
    """`until_ranks` of every row."""

    @staticmethod
    def of(
        model: Model,
        cluster: Cluster,
        workload: Workload,
        layouts: Layouts,
        policies: Sequence[Options],
        capacities: Sequence[float],
        busy_ranks: int = 1,
        known: Known | None = None,
    ) -> Fleet:
        """`busy_ranks` and `known` as in `PricedGrid`."""
        return Fleet(
            cluster=cluster,
            model=model,
            layouts=layouts,
            policies=tuple(policies),
            grids=tuple(
                PricedGrid(
                    model,
                    pool,
                    cluster.profile,
                    layouts,
                    workload.seq_tokens,
                    policies,
                    busy_ranks,
                    known,
                )
                for pool in cluster.pools
            ),
            capacities=tuple(capacities),
            until=tuple(until_ranks(cluster.pools, layouts)),
        )

    @property
    def drift(self) -> float:
        """Slow-down of a step by jitter."""
        return drift(self.cluster.pools)

    @property
    def can_overlap(self) -> bool:
        """Whether transfers between stages run beside compute."""
        return all(pool.stack.can_overlap for pool in self.cluster.pools)

    def scale(self, pool: int) -> float:
        """Capacity of the first pool's devices over that of this one's."""
        return self.capacities[0] / self.capacities[pool]

    def here(self, rows: Index) -> list[Array]:
        """Of rows, `until_ranks`."""
        return [end[rows] for end in self.until]

    def at(self, rank: Array, rows: Index) -> NDArray[np.intp]:
        """The pool of a rank."""
        place = np.zeros(len(rank), dtype=np.intp)
        for end in self.here(rows)[:-1]:
            place = place + (rank >= end)
        return place

    def on_pools(self, rows: Index) -> tuple[tuple[OnPool, ...], Array]:
        """Times of rows on each pool, and their transfers of fill and drain where those alone are
        felt."""
        until = self.here(rows)
        pieces = [grid.pieces(0, rows) for grid in self.grids]
        layouts = self.layouts.take(rows)
        hops = [
            hop_s(costs, layouts, grid.alone)
            for costs, grid in zip(pieces, self.grids, strict=True)
        ]
        between: Array | float = np.inf
        if len(self.grids) > 1:
            sent = sent_bytes(pieces[0].layers[0].boundary_bytes, layouts, self.grids[0].prices)
            between = between_s(self.cluster, sent)
        fill_s = fill_hops_s(until, hops, between if len(until) > 1 else 0.0)
        beside = self.can_overlap  # as in the simulator: fill and drain alone
        pools = tuple(
            OnPool(
                seconds=grid.seconds(rows),
                hop_s=0.0 * hop if beside else np.minimum(hop, between),
                action_s=grid.action_s,
                until_rank=end,
            )
            for grid, hop, end in zip(self.grids, hops, until, strict=True)
        )
        return pools, fill_s if beside else 0.0 * fill_s
