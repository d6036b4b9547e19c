"""Every legal layout with its bounds, and the plans that are simulated from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..cluster import Cluster
from ..costmodel.layout import Layouts
from ..costmodel.options import Options
from ..document import Value
from ..estimate import Estimate
from ..model import Model
from ..plan import Plan
from ..workload import Workload
from .pins import Pins
from .space import compute_dtypes, enumerate_grid, only_pool, plan_at, recompute_modes

BLOCK_ROWS = 4096
Floats = NDArray[np.float64]


class LowerBounds(Protocol):
    """Lower bounds of a block of layouts, and the memory that one device has for them."""

    @property
    def time_s(self) -> Floats: ...
    @property
    def memory_bytes(self) -> Floats: ...
    @property
    def capacity_bytes(self) -> float: ...


class CostModel(Protocol):
    """What the search needs to know about cost."""

    def estimate(self, plan: Plan) -> Estimate:
        """The simulated cost of a plan."""
        ...

    def bound_layouts(
        self, model: Model, cluster: Cluster, workload: Workload, layouts: Layouts,
        options: Options,
    ) -> LowerBounds:  # fmt: skip
        """Lower bounds of `estimate` for every row."""
        ...


class Ranked(Value, frozen=True, kw_only=True):
    """One plan of the answer."""

    label: str
    plan: Plan
    estimate: Estimate
    lost: str
    """Why it is not the best; empty for the best."""


@dataclass(frozen=True)
class Request:
    """What is searched, and with which cost model."""

    model: Model
    cluster: Cluster
    workload: Workload
    pins: Pins
    cost: CostModel


@dataclass(frozen=True)
class Candidates:
    """Every legal layout with its bounds: row `i % len(grid)` under setting `i // len(grid)`."""

    request: Request
    grid: Layouts
    settings: tuple[tuple[str, str], ...]
    time_s: Floats
    memory_bytes: Floats
    capacity_bytes: float

    def __len__(self) -> int:
        return len(self.time_s)

    def plan(self, index: int) -> Plan:
        """A candidate as a plan."""
        setting, row = divmod(index, len(self.grid))
        compute, recompute = self.settings[setting]
        r = self.request
        return plan_at(r.model, r.cluster, r.workload, self.grid, row, compute, recompute)

    def simulate(self, index: int) -> Ranked:
        """A candidate with its estimate."""
        plan = self.plan(index)
        return Ranked(
            label=plan.label, plan=plan, estimate=self.request.cost.estimate(plan), lost=""
        )


def bound_all(request: Request) -> Candidates:
    """Bounds of the whole grid, in blocks of a few thousand rows; empty for an empty grid."""
    model, cluster, workload, pins = request.model, request.cluster, request.workload, request.pins
    grid = enumerate_grid(model, cluster, workload, pins)
    computes = compute_dtypes(only_pool(cluster), pins)
    settings = tuple((c, r) for r in recompute_modes(pins) for c in computes)
    time_s: list[Floats] = []
    memory_bytes: list[Floats] = []
    capacity_bytes = 0.0
    for compute, recompute in settings:
        options = Options(compute=compute, recompute=recompute, optimizer=workload.optimizer)
        for start in range(0, len(grid), BLOCK_ROWS):
            block = grid.take(slice(start, start + BLOCK_ROWS))
            bounds = request.cost.bound_layouts(model, cluster, workload, block, options)
            time_s.append(bounds.time_s)
            memory_bytes.append(bounds.memory_bytes)
            capacity_bytes = bounds.capacity_bytes
    none = [np.zeros(0)]
    return Candidates(
        request=request,
        grid=grid,
        settings=settings,
        time_s=np.concatenate(time_s or none),
        memory_bytes=np.concatenate(memory_bytes or none),
        capacity_bytes=capacity_bytes,
    )


def fits(estimate: Estimate) -> bool:
    """Whether a plan may be proposed: its median peak is within the usable memory."""
    peak_bytes = estimate.peak_memory_bytes.median
    return estimate.fits != "no" and peak_bytes <= estimate.capacity_bytes


def nearest_to_fit(
    candidates: Candidates, simulated: list[Ranked], tries: int = 8
) -> Ranked | None:
    """The plan with the least peak among `simulated` and the `tries` smallest memory bounds."""
    tried = list(simulated)
    for index in np.argsort(candidates.memory_bytes, kind="stable")[:tries]:
        ranked = candidates.simulate(int(index))
        tried.append(ranked)
        if fits(ranked.estimate):
            return ranked
    return min(tried, key=lambda r: (r.estimate.peak_memory_bytes.median, r.label), default=None)


def may_fit(candidates: Candidates) -> bool:
    """Whether the memory bound of any candidate leaves hope."""
    return bool(np.any(candidates.memory_bytes <= candidates.capacity_bytes))
