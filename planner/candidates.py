"""Every legal layout with its bounds, and the plans that are simulated from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .. import costmodel
from ..cluster import Cluster
from ..costmodel.bounds import Stages
from ..costmodel.layout import Layouts
from ..costmodel.options import Options
from ..costmodel.priced_pieces import Known
from ..costmodel.prices import Prices
from ..document import Value
from ..estimate import Estimate
from ..model import Model
from ..plan import Plan
from ..workload import Workload
from .activations.portfolio import Names
from .apart import settled, unsettled
from .choosing import Choice, choices
from .grid_plans import plan_at
from .keeping import policies, policies_under, sets_worth_keeping
from .pins import Pins
from .space import base_options, enumerate_grid, everything, ordinary
from .variants import Way, ways

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
    """What the search needs to know about cost. Pipelines go through the pools of a cluster in
    their order; capacities are what a plan may fill of a device of each."""

    def estimate(self, plan: Plan) -> Estimate:
        """The simulated cost of a plan."""
        ...

    def bound_layouts(
        self, model: Model, cluster: Cluster, workload: Workload, layouts: Layouts,
        options: Sequence[Options], capacity_bytes: Sequence[float], worth_s: float,
        stages: Stages,
    ) -> LowerBounds:  # fmt: skip
        """Lower bounds of `estimate` for every row, each layer under any of the options, whatever
        the cut if stages are free; rows that take longer than `worth_s` need no bound of memory."""
        ...

    def keep_sets(
        self, model: Model, cluster: Cluster, workload: Workload, grid: Layouts, base: Options
    ) -> Sequence[Names]:
        """Sets of a layer's tensors that are worth keeping for backward."""
        ...

    def choices(
        self, model: Model, cluster: Cluster, workload: Workload, layout: Layouts,
        policies: Sequence[Options], capacity_bytes: Sequence[float], stages: Stages,
    ) -> Iterable[Choice]:  # fmt: skip
        """Good cuts of one layout, and what every layer keeps, out of the policies; the most
        promising first."""
        ...


class OwnCost:
    """The cost model of forerun, with the choice of cut and layers of `choosing`; what plans have
    in common is priced once."""

    def __init__(self) -> None:
        self.known: Known = {}

    def estimate(self, plan: Plan) -> Estimate:
        """As `CostModel` says."""
        return costmodel.estimate(plan, self.known)

    def bound_layouts(
        self, model: Model, cluster: Cluster, workload: Workload, layouts: Layouts,
        options: Sequence[Options], capacity_bytes: Sequence[float], worth_s: float,
        stages: Stages,
    ) -> LowerBounds:  # fmt: skip
        """As `CostModel` says."""
        return costmodel.bound_layouts(
            model, cluster, workload, layouts, options, capacity_bytes, worth_s, stages, self.known
        )

    keep_sets = staticmethod(sets_worth_keeping)

    def choices(
        self, model: Model, cluster: Cluster, workload: Workload, layout: Layouts,
        policies: Sequence[Options], capacity_bytes: Sequence[float], stages: Stages,
    ) -> Iterator[Choice]:  # fmt: skip
        """As `CostModel` says."""
        return choices(
            model, cluster, workload, layout, policies, capacity_bytes, stages, self.known
        )


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

    def capacities(self, route: Cluster) -> list[float]:
        """What the median of a plan's peak may reach on each pool."""
        found: list[float] = []
        for pool in route.pools:
            doubt = (
                1 + FIT_Z * Prices(pool, route.profile).memory_spread if self.fit == "yes" else 1.0
            )
            found.append(pool.device.memory_bytes / doubt)
        return found

    @property
    def stages(self) -> Stages:
        """How stages are cut."""
        return "free" if self.pins.stages is None else self.pins.stages


@dataclass(frozen=True)
class Candidates:
    """Every legal layout with its bounds, whatever its cut and what its layers keep for
    backward."""

    request: Request
    ways: tuple[Way, ...]
    """Orders of the pools, compute dtypes and optimisers that are looked at."""
    way: NDArray[np.intp]
    """Which of them each layout takes."""
    grid: Layouts
    policies: tuple[tuple[Options, ...], ...]
    """By way, what a layer may do and keep."""
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
    def handicap(self) -> Floats:
        """By layout, what its time and peak are multiplied by where layouts are compared."""
        return np.array([way.handicap for way in self.ways])[self.way]

    @property
    def evaluated(self) -> int:
        """Pairs of a layout and a policy whose time and memory were both bounded."""
        return int(self.policies_bounded.sum())

    def plans(self, index: int) -> Iterator[Plan]:
        """A candidate with good cuts, its layers keeping what fits and takes the least time; the
        most promising first."""
        r = self.request
        row = self.grid.take(slice(index, index + 1))
        number = int(self.way[index])
        way = self.ways[number]
        kept = policies_under(row, self.policies[number], way.cluster.pools, way.pins)
        kept = tuple(unsettled(options, row) for options in kept)
        capacities = r.capacities(way.cluster)
        chosen = r.cost.choices(r.model, way.cluster, way.workload, row, kept, capacities, r.stages)
        for choice in chosen:
            layers, sizes = choice.layers, choice.sizes
            plan = plan_at(r.model, way.cluster, way.workload, self.grid, index, layers, sizes)
            yield settled(plan, way.pins)

    def simulate(self, index: int) -> Ranked:
        """A candidate with its estimate, under the first of its cuts that fits, or the one with the
        least peak."""
        if index in self.known:
            return self.known[index]
        found: list[Ranked] = []
        for plan in self.plans(index):
            estimate = self.request.cost.estimate(plan)
            found.append(Ranked(label=plan.label, plan=plan, estimate=estimate, lost=""))
            if self.fits(estimate):
                return found[-1]
        return min(found, key=lambda r: r.estimate.peak_memory_bytes.median)

    @property
    def bound(self) -> Floats:
        """Of what is optimised, with the handicap."""
        least = self.request.workload.objective == "memory"
        return (self.memory_bytes if least else self.time_s) * self.handicap

    def in_order(self) -> NDArray[np.intp]:
        """Those that may fit, by the bound of what is optimised."""
        bound = self.bound
        order = np.flatnonzero(self.memory_bytes <= self.capacity_bytes)
        return order[np.argsort(bound[order], kind="stable")]

    def fits(self, estimate: Estimate) -> bool:
        """Whether a plan may be proposed."""
        return fits(estimate, self.request.fit)


SMALL_GRID = 500
"""Layouts that are bounded without a first guess at the best."""
GUESSES = 12
"""Ordinary layouts that are simulated for it at most."""


def bound_all(request: Request, keep: int = 1) -> Candidates:
    """Bounds of the whole grid; empty for an empty grid.

    In a large grid ordinary layouts are tried first: what takes longer than the `keep` best of
    them, even without its updates, needs no further look.
    """
    found = ways(
        request.model, request.cluster, request.workload, request.pins, free=request.fixed is None
    )
    grids = [enumerate_grid(request.model, x.cluster, x.workload, x.pins) for x in found]
    grid = Layouts.joined(grids)
    way = np.repeat(np.arange(len(found)), [len(part) for part in grids])
    kept = tuple(_policies(request, *pair) for pair in zip(found, grids, strict=True))
    whole = _Grid(request, found, way, grid, kept)
    if len(grid) <= SMALL_GRID or request.workload.objective == "memory":
        return whole.bounded()
    rows = np.flatnonzero(ordinary(grid))
    evenly = "even" if request.stages == "free" else request.stages
    first = whole.take(rows).bounded(stages=evenly)
    known: dict[int, Ranked] = {}
    fitting: list[float] = []
    for index in first.in_order()[:GUESSES]:
        ranked = known[int(rows[index])] = first.simulate(int(index))
        if first.fits(ranked.estimate):
            fitting.append(ranked.estimate.step_s.median * float(first.handicap[index]))
        if len(fitting) == keep:
            break
    worth_s = max(fitting) if len(fitting) == keep else np.inf
    bounded = whole.bounded(worth_s, known)
    both = np.maximum(bounded.policies_bounded[rows], first.policies_bounded)
    bounded.policies_bounded[rows] = both
    return bounded


def _policies(request: Request, way: Way, grid: Layouts) -> tuple[Options, ...]:
    """What every layer may do under one way of a grid."""
    r, pools = request, way.cluster.pools
    base = r.fixed or base_options(pools, way.workload, way.pins)
    sets: Sequence[Names] = ()
    if r.pins.recompute is None and base.activations is None and everything(pools, r.pins):
        sets = r.cost.keep_sets(r.model, way.cluster, way.workload, grid, base)
    return policies(r.model, pools, way.workload, base, way.pins, sets)


@dataclass(frozen=True)
class _Grid:
    """Layouts not bounded yet."""

    request: Request
    ways: tuple[Way, ...]
    way: NDArray[np.intp]
    grid: Layouts
    policies: tuple[tuple[Options, ...], ...]

    def take(self, rows: NDArray[np.intp]) -> _Grid:
        """Some of the rows."""
        return _Grid(self.request, self.ways, self.way[rows], self.grid.take(rows), self.policies)

    def bounded(
        self,
        worth_s: float = np.inf,
        known: Mapping[int, Ranked] | None = None,
        stages: Stages | None = None,
    ) -> Candidates:
        """The rows with their bounds; `stages` None = as the request has them."""
        r, num = self.request, len(self.grid)
        time_s, memory = np.zeros((2, num))
        bounded = np.zeros(num, dtype=np.int64)
        capacity = min(r.capacities(r.cluster))
        for which, (way, kept) in enumerate(zip(self.ways, self.policies, strict=True)):
            rows = np.flatnonzero(self.way == which)
            if not len(rows):
                continue
            bounds = r.cost.bound_layouts(
                r.model, way.cluster, way.workload, self.grid.take(rows), kept,
                r.capacities(way.cluster), worth_s / way.handicap,
                r.stages if stages is None else stages,
            )  # fmt: skip
            time_s[rows], bounded[rows] = bounds.time_s, bounds.policies_bounded
            memory[rows] = bounds.memory_bytes / bounds.capacity_bytes * capacity
        return Candidates(
            request=r,
            ways=self.ways,
            way=self.way,
            grid=self.grid,
            policies=self.policies,
            time_s=time_s,
            memory_bytes=memory,
            capacity_bytes=capacity,
            policies_bounded=bounded,
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
