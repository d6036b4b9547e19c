"""Every legal layout with its bounds, and the plans that are simulated from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .. import costmodel
from ..cluster import Cluster
from ..costmodel.layout import Layouts
from ..costmodel.options import Options
from ..document import Value
from ..estimate import Estimate
from ..model import Model
from ..plan import Plan
from ..workload import Workload
from .mixing import choose_layers
from .pins import Pins
from .space import compute_dtype, enumerate_grid, only_pool, plan_at, policies

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
        options: Sequence[Options],
    ) -> LowerBounds:  # fmt: skip
        """Lower bounds of `estimate` for every row, each layer under any of the options."""
        ...

    def choose_layers(
        self, model: Model, cluster: Cluster, workload: Workload, layout: Layouts,
        policies: Sequence[Options],
    ) -> tuple[Options, ...]:  # fmt: skip
        """What every layer of one layout keeps (one for all, or one each), out of the policies."""
        ...


class OwnCost:
    """The cost model of forerun, with the choice per layer of `mixing`."""

    estimate = staticmethod(costmodel.estimate)
    bound_layouts = staticmethod(costmodel.bound_layouts)
    choose_layers = staticmethod(choose_layers)


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
    """Every legal layout with its bounds, whatever its layers keep for backward."""

    request: Request
    grid: Layouts
    policies: tuple[Options, ...]
    """What a layer may keep."""
    time_s: Floats
    memory_bytes: Floats
    capacity_bytes: float

    def __len__(self) -> int:
        return len(self.time_s)

    def plan(self, index: int) -> Plan:
        """A candidate as a plan: its layers keep what fits and takes the least time."""
        r = self.request
        row = self.grid.take(slice(index, index + 1))
        chosen = self.policies
        if len(chosen) > 1:
            chosen = r.cost.choose_layers(r.model, r.cluster, r.workload, row, chosen)
        return plan_at(r.model, r.cluster, r.workload, self.grid, index, chosen)

    def simulate(self, index: int) -> Ranked:
        """A candidate with its estimate."""
        plan = self.plan(index)
        return Ranked(
            label=plan.label, plan=plan, estimate=self.request.cost.estimate(plan), lost=""
        )


def bound_all(request: Request) -> Candidates:
    """Bounds of the whole grid; empty for an empty grid."""
    model, cluster, workload, pins = request.model, request.cluster, request.workload, request.pins
    pool = only_pool(cluster)
    grid = enumerate_grid(model, cluster, workload, pins)
    kept = policies(pool, workload, compute_dtype(pool, pins), pins)
    bounds = request.cost.bound_layouts(model, cluster, workload, grid, kept)
    return Candidates(
        request=request,
        grid=grid,
        policies=kept,
        time_s=bounds.time_s,
        memory_bytes=bounds.memory_bytes,
        capacity_bytes=bounds.capacity_bytes,
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
