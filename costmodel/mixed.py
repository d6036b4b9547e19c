"""Memory and time of pipeline ranks whose layers differ in what they keep for backward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..schedules import SCHEDULES, rank_of
from .away import fetch_s
from .copies import returning
from .graph import Array
from .in_flight import in_flight
from .kept import Kept
from .layout import Layouts
from .memory import InFlight
from .moments import RankMoments
from .options import Options
from .pieces import Pieces
from .priced_grid import PricedGrid
from .prices import Prices
from .ranks import rank_bytes, stage_times
from .stages import Load

Counts = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """One layout (arrays of length one) under several policies."""

    layouts: Layouts
    prices: Prices
    policies: tuple[Options, ...]
    kept: Kept
    costs: Pieces
    """With the layer groups of the model once per policy: those of the first, of the second, ..."""

    @staticmethod
    def of(grid: PricedGrid) -> Mixed:
        """The costs of a model's layers under each policy, of a grid of one layout."""
        first = grid.costs[0]
        costs = Pieces(
            embedding=first.embedding,
            layers=tuple(layer for costs in grid.costs for layer in costs.layers),
            head=first.head,
            tied_params=first.tied_params,
        )
        return Mixed(
            layouts=grid.layouts,
            prices=grid.prices,
            policies=tuple(grid.policies),
            kept=Kept.of(costs, grid.layouts, grid.prices.pool.stack),
            costs=costs,
        )

    @property
    def schedule(self) -> str:
        """The pipeline schedule."""
        return SCHEDULES[int(self.layouts.schedule[0])]

    def in_flight(self, load: Load, ranks: NDArray[np.intp]) -> InFlight:
        """Live chunk activations of pipeline ranks that hold `load`."""
        x = self.layouts
        shape = (int(x.pp[0]), int(x.vpp[0]), int(x.num_microbatches[0]))
        rows = x.take(np.zeros(len(ranks), dtype=np.intp))
        return in_flight(self.schedule, shape, ranks, load, self.kept, rows)

    def peaks(self, counts: Counts, ranks: NDArray[np.intp]) -> Array:
        """Peak bytes of ranks that hold `counts` layers: (rows, policies, groups)."""
        rows = self.layouts.take(np.zeros(len(ranks), dtype=np.intp))
        load = self._load(counts, ranks)
        flight = self.in_flight(load, ranks)
        stack = self.prices.pool.stack
        moments = RankMoments.of(load, self.costs, rows, self.policies[0], stack)
        peaks = rank_bytes(moments, self.kept, self.prices, flight)
        return peaks.total + 0.0 * flight.first

    def seconds(self, counts: Counts, ranks: NDArray[np.intp]) -> Array:
        """Seconds of a micro-batch through those ranks, forward and backward."""
        times = stage_times(self._load(counts, ranks), self.costs, self.prices)
        return times.forward_s + times.backward_s

    def fetch_s(self) -> Array:
        """By policy and group, what the backward of a stage waits for first where such a layer is
        its last."""
        each = [fetch_s(piece, self.prices)[0] for piece in self.costs.layers]
        return np.array(each).reshape(len(self.policies), -1)

    @property
    def last_is_there(self) -> bool:
        """Whether the last layer of all never waits so: its backward follows its forward."""
        x = self.layouts
        m = int(x.num_microbatches[0])
        return returning(self.schedule, int(x.pp[0]), int(x.vpp[0]), m) == m

    def _load(self, counts: Counts, ranks: NDArray[np.intp]) -> Load:
        flat = counts.reshape(len(counts), -1)
        pp = int(self.layouts.pp[0])
        last_stage = pp * int(self.layouts.vpp[0]) - 1
        return Load(
            layers=tuple(flat[:, i] for i in range(flat.shape[1])),
            embedding=(ranks == 0).astype(float),
            head=(ranks == rank_of(self.schedule, last_stage, pp)).astype(float),
        )
