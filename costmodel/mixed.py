"""Memory and time of pipeline ranks whose layers differ in what they keep for backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cluster import Cluster
from ..model import Model
from ..plan import SCHEDULES
from ..workload import Workload
from .graph import Array
from .layout import Layouts
from .memory import InFlight
from .options import Options
from .pieces import Pieces, pieces
from .prices import Prices
from .ranks import rank_bytes, stage_times
from .schedule import live_chunks
from .stages import Load

Counts = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """One layout (arrays of length one) under several policies."""

    layouts: Layouts
    prices: Prices
    policies: tuple[Options, ...]
    costs: Pieces
    """With the layer groups of the model once per policy: those of the first, of the second, ..."""
    capacity_bytes: float

    @staticmethod
    def of(
        model: Model,
        cluster: Cluster,
        workload: Workload,
        layouts: Layouts,
        policies: Sequence[Options],
    ) -> Mixed:
        """The costs of a model's layers under each policy."""
        pool = cluster.pools[0]
        prices = Prices(pool, cluster.profile, min(cluster.num_devices, pool.devices_per_node))
        each = [pieces(model, layouts, workload.seq_tokens, prices, o) for o in policies]
        first = each[0]
        return Mixed(
            layouts=layouts,
            prices=prices,
            policies=tuple(policies),
            costs=Pieces(
                embedding=first.embedding,
                layers=tuple(layer for costs in each for layer in costs.layers),
                head=first.head,
                tied_params=first.tied_params,
            ),
            capacity_bytes=float(pool.device.memory_bytes),
        )

    def in_flight(self, ranks: NDArray[np.intp]) -> InFlight:
        """Live chunk activations of pipeline ranks."""
        x = self.layouts
        schedule = SCHEDULES[int(x.schedule[0])]
        shape = (schedule, int(x.pp[0]), int(x.vpp[0]), int(x.num_microbatches[0]))
        known = {int(r): live_chunks(*shape, int(r)) for r in np.unique(ranks)}
        first, later = (np.array([float(known[int(r)][i]) for r in ranks]) for i in (0, 1))
        return InFlight(first=first, later=later)

    def peaks(self, counts: Counts, ranks: NDArray[np.intp]) -> Array:
        """Peak bytes of ranks that hold `counts` layers: (rows, policies, groups)."""
        rows = self.layouts.take(np.zeros(len(ranks), dtype=np.intp))
        load = self._load(counts, ranks)
        flight = self.in_flight(ranks)
        base = self.policies[0]
        return rank_bytes(load, self.costs, rows, self.prices, base, flight)[0] + 0.0 * flight.first

    def seconds(self, counts: Counts, ranks: NDArray[np.intp]) -> Array:
        """Seconds of a micro-batch through those ranks, forward and backward."""
        times = stage_times(self._load(counts, ranks), self.costs, self.prices)
        return times.forward_s + times.backward_s

    def _load(self, counts: Counts, ranks: NDArray[np.intp]) -> Load:
        flat = counts.reshape(len(counts), -1)
        return Load(
            layers=tuple(flat[:, i] for i in range(flat.shape[1])),
            embedding=(ranks == 0).astype(float),
            head=(ranks == int(self.layouts.pp[0]) - 1).astype(float),
        )
