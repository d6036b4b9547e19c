"""Every legal layout with its bounds, and the plans that are simulated from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from .space import base_options, enumerate_grid, only_pool, ordinary, plan_at, policies

Floats = NDArray[np.float64]


class LowerBounds(Protocol):
    """Lower bounds of a block of layouts, and the memory that one device has for them."""

    @property
    def time_s(self) -> Floats: ...
    @property
    def memory_bytes(self) -> Floats: ...
    @property
    def capacity_bytes(self) -> float: ...
    @property
    def policies_bounded(self) -> NDArray[np.int64]: ...


class CostModel(Protocol):
    """What the search needs to know about cost."""

    def estimate(self, plan: Plan) -> Estimate:
        """The simulated cost of a plan."""
        ...

    def bound_layouts(
        self, model: Model, cluster: Cluster, workload: Workload, layouts: Layouts,
        options: Sequence[Options], capacity_bytes: float, worth_s: float,
    ) -> LowerBounds:  # fmt: skip
        """Lower bounds of `estimate` for every row, each layer under any of the options; rows that
        take longer than `worth_s` need no bound of memory."""
        ...

    def choose_layers(
        self, model: Model, cluster: Cluster, workload: Workload, layout: Layouts,
        policies: Sequence[Options], capacity_bytes: float,
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


FIT_Z = 1.645
"""Standard deviations of a predicted peak between a plan that fits for certain and the capacity:
what `fits: yes` asks for."""


@dataclass(frozen=True)
class Request:
    """What is searched, and with which cost model."""

    model: Model
    cluster: Cluster
    workload: Workload
    pins: Pins
    cost: CostModel
    fixed: Options | None = None
    """What every layer does besides; None = as the pins say."""
    fit: str = "yes"
    """What a plan must be predicted to do: fit for certain (yes), or by its median (marginal)."""

    @property
    def capacity_bytes(self) -> float:
        """What the median of a plan's peak may reach."""
        pool = only_pool(self.cluster)
        doubt = 1 + FIT_Z * pool.stack.memory_spread if self.fit == "yes" else 1.0
        return pool.device.memory_bytes / doubt


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
    policies_bounded: NDArray[np.int64]
    """For each layout the policies under which time and memory were both bounded."""
    known: Mapping[int, Ranked]
    """Candidates that are simulated already."""

    def __len__(self) -> int:
        return len(self.time_s)

    @property
    def evaluated(self) -> int:
        """Pairs of a layout and a policy whose time and memory were both bounded."""
        return int(self.policies_bounded.sum())

    def plan(self, index: int) -> Plan:
        """A candidate as a plan: its layers keep what fits and takes the least time."""
        r = self.request
        row = self.grid.take(slice(index, index + 1))
        chosen = self.policies
        if len(chosen) > 1:
            chosen = r.cost.choose_layers(
                r.model, r.cluster, r.workload, row, chosen, self.capacity_bytes
            )
        return plan_at(r.model, r.cluster, r.workload, self.grid, index, chosen)

    def simulate(self, index: int) -> Ranked:
        """A candidate with its estimate."""
        if index in self.known:
            return self.known[index]
        plan = self.plan(index)
        return Ranked(
            label=plan.label, plan=plan, estimate=self.request.cost.estimate(plan), lost=""
        )

    def in_order(self) -> NDArray[np.intp]:
        """Those that may fit, by the bound of what is optimised."""
        least = self.request.workload.objective == "memory"
        bound = self.memory_bytes if least else self.time_s
        order = np.flatnonzero(self.memory_bytes <= self.capacity_bytes)
        return order[np.argsort(bound[order], kind="stable")]

    def fits(self, estimate: Estimate) -> bool:
        """Whether a plan may be proposed."""
        return fits(estimate, self.request.fit)


SMALL_GRID = 20_000
"""Layouts that are bounded without a first guess at the best."""
GUESSES = 12
"""Ordinary layouts that are simulated for it at most."""


def bound_all(request: Request, keep: int = 1) -> Candidates:
    """Bounds of the whole grid; empty for an empty grid.

    In a large grid ordinary layouts are tried first: what takes longer than the `keep` best of
    them, even without its updates, needs no further look.
    """
    grid = enumerate_grid(request.model, request.cluster, request.workload, request.pins)
    if len(grid) <= SMALL_GRID or request.workload.objective == "memory":
        return _bounded(request, grid)
    rows = np.flatnonzero(ordinary(grid))
    first = _bounded(request, grid.take(rows))
    known: dict[int, Ranked] = {}
    fitting: list[float] = []
    for index in first.in_order()[:GUESSES]:
        ranked = known[int(rows[index])] = first.simulate(int(index))
        if first.fits(ranked.estimate):
            fitting.append(ranked.estimate.step_s.median)
        if len(fitting) == keep:
            break
    worth_s = max(fitting) if len(fitting) == keep else np.inf
    found = _bounded(request, grid, worth_s, known)
    found.policies_bounded[rows] = np.maximum(found.policies_bounded[rows], first.policies_bounded)
    return found


def _bounded(
    request: Request,
    grid: Layouts,
    worth_s: float = np.inf,
    known: Mapping[int, Ranked] | None = None,
) -> Candidates:
    """Bounds of the rows of a grid."""
    model, cluster, workload, pins = request.model, request.cluster, request.workload, request.pins
    pool = only_pool(cluster)
    kept = policies(pool, request.fixed or base_options(pool, workload, pins), pins)
    if not len(grid):
        none = np.zeros(0)
        count = np.zeros(0, dtype=np.int64)
        return Candidates(request, grid, kept, none, none, request.capacity_bytes, count, {})
    bounds = request.cost.bound_layouts(
        model, cluster, workload, grid, kept, request.capacity_bytes, worth_s
    )
    return Candidates(
        request=request,
        grid=grid,
        policies=kept,
        time_s=bounds.time_s,
        memory_bytes=bounds.memory_bytes,
        capacity_bytes=bounds.capacity_bytes,
        policies_bounded=bounds.policies_bounded,
        known=known or {},
    )


def fits(estimate: Estimate, fit: str = "yes") -> bool:
    """Whether a plan may be proposed: it fits for certain, or at least by its median."""
    if fit == "yes":
        return estimate.fits == "yes"
    return estimate.peak_memory_bytes.median <= estimate.capacity_bytes


def nearest_to_fit(
    candidates: Candidates, simulated: list[Ranked], tries: int = 8
) -> Ranked | None:
    """The plan with the least peak among `simulated` and the `tries` smallest memory bounds; one
    that is known to fit comes first."""
    for ranked in candidates.known.values():
        if candidates.fits(ranked.estimate):
            return ranked
    tried = [*simulated, *candidates.known.values()]
    for index in np.argsort(candidates.memory_bytes, kind="stable")[:tries]:
        ranked = candidates.simulate(int(index))
        tried.append(ranked)
        if candidates.fits(ranked.estimate):
            return ranked
    return min(tried, key=lambda r: (r.estimate.peak_memory_bytes.median, r.label), default=None)


def may_fit(candidates: Candidates) -> bool:
    """Whether the memory bound of any candidate leaves hope."""
    return bool(np.any(candidates.memory_bytes <= candidates.capacity_bytes))
