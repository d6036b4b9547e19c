"""Branch and bound over the grid: the fastest plan that fits, the gap, the runners-up.

    minimise    value(x)                       x a row of the grid, its layers as `mixing` chooses
    subject to  peak(x) <= capacity            less what the peak may be wrong by, where fit is yes

`value` is the simulated median step time (objective throughput, and cost: the devices are given, so
that money is time) or the median peak memory (objective memory). The cost model gives lower bounds
of time and peak for all rows at once. Rows whose peak bound exceeds the capacity are dropped; the
others are simulated in the order of their bound, and

    gap = value(best) / smallest bound among rows not simulated - 1

is zero, and the best proven, once no bound left is below the best value. The search also ends when
the gap is within the tolerance, once enough layouts are simulated to choose runners-up from and a
few more that may be better, or when the time limit strikes; the result says which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..cluster import Cluster
from ..costmodel.layer_tensors import check_keep
from ..costmodel.optimizers import refuse
from ..costmodel.options import Options
from ..document import Value, to_raw
from ..errors import InputError
from ..estimate import Estimate
from ..model import Model
from ..workload import Workload
from .candidates import (
    Candidates,
    CostModel,
    OwnCost,
    Ranked,
    Request,
    bound_all,
    fits,
    may_fit,
    nearest_to_fit,
)
from .explain import RuledOut, why_lost
from .infeasible import Infeasible, contradiction, why_nothing_fits
from .pins import Pins, check_pins, check_stages
from .quality import precisions_here, risks
from .space import compute_dtype

TOLERANCE = 0.01
TRIES_PER_PLAN = 2
"""Layouts simulated per plan asked for, before a small gap or a lack of runners-up ends it."""
FURTHER = 8
"""Layouts simulated beyond a small gap, where they may be better."""


class SearchStats(Value, frozen=True, kw_only=True):
    """How the answer came about."""

    bounded: int
    """Candidates whose time and memory were bounded: layouts, times what their layers may keep."""
    solved: int
    """Inner problems given to a solver."""
    simulated: int
    gap: float | None
    """Best value over the smallest bound not simulated, minus one; None without a plan."""
    proven: bool
    limit: Literal["time", "tolerance"] | None
    seconds: float


class SearchResult(Value, frozen=True, kw_only=True):
    """The best plan and its runners-up, or why there is none."""

    plans: tuple[Ranked, ...]
    stats: SearchStats
    infeasible: Infeasible | None = None
    ruled_out: RuledOut | None = None
    """The fastest layout that memory ruled out, when it may beat the best."""

    def document(self) -> dict[str, Any]:
        """The JSON document of `forerun plan`."""
        return {
            "plans": [
                {**to_raw(ranked), "quality": to_raw(risks(ranked.plan))} for ranked in self.plans
            ],
            "search": to_raw(self.stats),
            "infeasible": to_raw(self.infeasible),
        }


def search(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    pins: Pins | None = None,
    *,
    keep: int = 5,
    time_limit_s: float | None = None,
    tolerance: float = TOLERANCE,
    fit: Literal["yes", "marginal"] = "yes",
    fixed: Options | None = None,
    cost: CostModel | None = None,
    clock: Callable[[], float] = perf_counter,
) -> SearchResult:
    """The best plan of the grid that fits, up to `keep` plans in all, and how good that answer is.

    Parameters
    ----------
    pins : axes that the user fixed; the rest is searched.
    keep : plans returned at most; as many are simulated, where they can be found.
    time_limit_s : seconds by `clock` after which the best so far is returned.
    tolerance : gap at which the search may stop; 0 searches until the best is proven.
    fit : whether a plan must be predicted to fit for certain, or may do so by its median alone.
    fixed : techniques of all layers, but for what they keep; None = flash attention, and the dtypes
        of the pins.
    cost : the cost model; None = `forerun.costmodel`.

    Raises
    ------
    InputError : a pin is not a legal value, or no legal layout has all of the pins.
    """
    started = clock()
    pins = Pins() if pins is None else pins
    cost = OwnCost() if cost is None else cost

    def found(pins: Pins) -> SearchResult:
        request = Request(model, cluster, workload, pins, cost, fixed, fit)
        return _search(request, max(keep, 1), tolerance, started, time_limit_s, clock)

    results = [found(pins)]
    if pins.precision is None and pins.activations is None and fixed is None:
        for settings in precisions_here(workload):
            asked = {"precision": settings["compute"], "recipe": settings.get("recipe")}
            try:
                results.append(found(msgspec.structs.replace(pins, **asked)))
            except InputError:  # of its own: shapes that no such layout has
                continue
    return _merged(results, max(keep, 1), workload.objective)


def _merged(results: list[SearchResult], keep: int, objective: str) -> SearchResult:
    """One result of several searches: the best of all plans, the smallest of all bounds."""
    ranked = _rank([plan for result in results for plan in result.plans], objective)[:keep]
    if len(results) == 1 or not ranked:
        return results[0]
    best = ranked[0]
    bounds = [
        _value(result.plans[0].estimate, objective) / (1 + result.stats.gap)
        for result in results
        if result.stats.gap is not None
    ]
    limit: Literal["time", "tolerance"] | None = None
    for result in results:
        limit = limit or result.stats.limit
    stats = SearchStats(
        bounded=sum(result.stats.bounded for result in results),
        solved=sum(result.stats.solved for result in results),
        simulated=sum(result.stats.simulated for result in results),
        gap=_gap(best, min(bounds), objective),
        proven=all(result.stats.proven for result in results),
        limit=limit,
        seconds=results[-1].stats.seconds,
    )
    winner = next(r for r in results if r.plans and r.plans[0].label == best.label)
    losers = (_with_reason(plan, best, objective) for plan in ranked[1:])
    return SearchResult(
        plans=(msgspec.structs.replace(best, lost=""), *losers),
        stats=stats,
        ruled_out=winner.ruled_out,
    )


def _search(
    request: Request,
    keep: int,
    tolerance: float,
    started: float,
    time_limit_s: float | None,
    clock: Callable[[], float],
) -> SearchResult:
    """The search of one grid, `started` by the clock."""
    model, cluster, workload, pins = (
        request.model, request.cluster, request.workload, request.pins,
    )  # fmt: skip
    check_pins(pins, [pool.device for pool in cluster.pools])
    check_stages(pins, model)
    pools = cluster.pools
    check_keep(model, pins.keep or (), compute_dtype(pools, pins), pools[0])
    for pool in pools:
        refused = refuse(workload.optimizer, pool)
        if refused is not None:
            raise refused
    candidates = bound_all(request, keep)
    if not len(candidates):
        raise contradiction(model, cluster, workload, pins)
    deadline = None if time_limit_s is None else started + time_limit_s
    outcome = _best_first(candidates, keep, tolerance, deadline, clock)
    plans = _rank(outcome.fitting, workload.objective)[:keep]
    best = plans[0] if plans else None
    infeasible = _infeasible(candidates, outcome) if best is None else None
    stats = SearchStats(
        bounded=candidates.evaluated,
        solved=outcome.simulated if len(candidates.policies) > 1 else 0,
        simulated=outcome.simulated,
        gap=_gap(best, outcome.next_bound, workload.objective),
        proven=outcome.limit is None,
        limit=outcome.limit,
        seconds=clock() - started,
    )
    if best is None:
        return SearchResult(plans=(), stats=stats, infeasible=infeasible)
    losers = (_with_reason(plan, best, workload.objective) for plan in plans[1:])
    return SearchResult(
        plans=(best, *losers), stats=stats, ruled_out=_ruled_out(candidates, outcome, best)
    )


@dataclass(frozen=True)
class _Outcome:
    fitting: list[Ranked]
    unfit: list[Ranked]
    next_bound: float
    """Smallest bound among candidates not simulated; infinite when all were."""
    limit: Literal["time", "tolerance"] | None

    @property
    def simulated(self) -> int:
        return len(self.fitting) + len(self.unfit)


def _best_first(
    candidates: Candidates,
    keep: int,
    tolerance: float,
    deadline: float | None,
    clock: Callable[[], float],
) -> _Outcome:
    """Simulate in the order of the bound until the best is proven, near enough, or time is up."""
    tried = _Tried(candidates)
    order = candidates.in_order()
    for place, index in enumerate(order):
        following = float(tried.bound[index])
        patient = bool(tried.fitting) and len(tried) >= TRIES_PER_PLAN * keep
        if following >= tried.best and (patient or len(tried.fitting) >= keep):
            return tried.outcome(following, None)
        if patient and tried.best <= following * (1 + tolerance):
            tried.look_further(order[place:], deadline, clock)
            left = tried.bound[order[place:]][~np.isin(order[place:], tried.seen)]
            following = float(left.min(initial=np.inf))
            return tried.outcome(following, None if following >= tried.best else "tolerance")
        if deadline is not None and clock() >= deadline:
            return tried.outcome(following, None if following >= tried.best else "time")
        tried.simulate(int(index))
    return tried.outcome(np.inf, None)


class _Tried:
    """The candidates simulated so far."""

    def __init__(self, candidates: Candidates) -> None:
        self.candidates = candidates
        self.objective = candidates.request.workload.objective
        least = self.objective == "memory"
        self.bound = candidates.memory_bytes if least else candidates.time_s
        self.fitting: list[Ranked] = []
        self.unfit: list[Ranked] = []
        self.seen: list[int] = []
        self.best = np.inf
        self._beyond: dict[int, list[float]] = {}

    def __len__(self) -> int:
        return len(self.seen)

    def simulate(self, index: int) -> None:
        """Simulate a candidate."""
        ranked = self.candidates.simulate(index)
        value = _value(ranked.estimate, self.objective)
        self.seen.append(index)
        if self.candidates.fits(ranked.estimate):
            self.fitting.append(ranked)
            self.best = min(self.best, value)
            self._beyond.setdefault(self._kind(index), []).append(value / self.bound[index])
        else:
            self.unfit.append(ranked)

    def _kind(self, index: int) -> int:
        """Layouts whose bounds are about as close: of one schedule, or without a pipeline."""
        grid = self.candidates.grid
        return int(grid.schedule[index]) if grid.pp[index] > 1 else -1

    def look_further(
        self, rest: NDArray[np.intp], deadline: float | None, clock: Callable[[], float]
    ) -> None:
        """Simulate a few more of those that may be better, the most promising first: bounds of some
        kinds of layouts are closer than those of others."""
        closeness = {kind: float(np.mean(values)) for kind, values in self._beyond.items()}
        for _ in range(FURTHER):
            better = [int(i) for i in rest if self.bound[i] < self.best and i not in self.seen]
            if not better or (deadline is not None and clock() >= deadline):
                return
            hopes = {i: self.bound[i] * closeness.get(self._kind(i), 1.0) for i in better}
            self.simulate(min(better, key=lambda i: (hopes[i], i)))

    def outcome(self, next_bound: float, limit: Literal["time", "tolerance"] | None) -> _Outcome:
        """What is found out."""
        return _Outcome(self.fitting, self.unfit, next_bound, limit)


def _value(estimate: Estimate, objective: str) -> float:
    interval = estimate.peak_memory_bytes if objective == "memory" else estimate.step_s
    return interval.median


def _rank(plans: list[Ranked], objective: str) -> list[Ranked]:
    def key(ranked: Ranked) -> tuple[float, float, str]:
        return _value(ranked.estimate, objective), ranked.estimate.step_s.median, ranked.label

    return sorted(plans, key=key)


def _gap(best: Ranked | None, next_bound: float, objective: str) -> float | None:
    if best is None:
        return None
    return max(0.0, _value(best.estimate, objective) / next_bound - 1)


def _with_reason(plan: Ranked, best: Ranked, objective: str) -> Ranked:
    lost = why_lost(plan.estimate, best.estimate, objective)
    return Ranked(label=plan.label, plan=plan.plan, estimate=plan.estimate, lost=lost)


def _ruled_out(candidates: Candidates, outcome: _Outcome, best: Ranked) -> RuledOut | None:
    """The layout with the smallest time among those without the memory, if it may beat the best."""
    options = [
        RuledOut(
            label=unfit.label,
            step_s=unfit.estimate.step_s.median,
            memory_bytes=unfit.estimate.peak_memory_bytes.median,
        )
        for unfit in outcome.unfit
    ]
    dropped = np.flatnonzero(candidates.memory_bytes > candidates.capacity_bytes)
    if len(dropped):
        index = int(dropped[np.argmin(candidates.time_s[dropped])])
        options.append(
            RuledOut(
                label=next(candidates.plans(index)).label,
                step_s=float(candidates.time_s[index]),
                memory_bytes=float(candidates.memory_bytes[index]),
            )
        )
    fastest = min(options, key=lambda option: (option.step_s, option.label), default=None)
    if fastest is None or fastest.step_s >= best.estimate.step_s.median:
        return None
    return fastest


def _infeasible(candidates: Candidates, outcome: _Outcome) -> Infeasible:
    if outcome.limit == "time":
        return Infeasible(
            reason=f"the time limit struck after {outcome.simulated} simulated layouts, none fits",
            smallest_change="raise --time-limit",
            changes=("raise --time-limit",),
        )
    request = candidates.request
    nearest = nearest_to_fit(candidates, outcome.unfit)

    def fitting_label(model: Model, cluster: Cluster, workload: Workload, pins: Pins) -> str | None:
        changed = bound_all(
            Request(model, cluster, workload, pins, request.cost, request.fixed, request.fit)
        )
        found = nearest_to_fit(changed, []) if may_fit(changed) else None
        return found.label if found is not None and changed.fits(found.estimate) else None

    assert nearest is not None
    if request.fit == "yes" and fits(nearest.estimate, "marginal"):
        chance = f"fits with probability {nearest.estimate.fit_probability:.0%}"
        change = f"--fit marginal ({nearest.label}, {chance})"
        return Infeasible(
            reason=f"{nearest.label} comes nearest and {chance}, not for certain",
            smallest_change=change,
            changes=(change,),
        )
    return why_nothing_fits(
        nearest.label,
        nearest.estimate,
        (request.model, request.cluster, request.workload, request.pins),
        fitting_label,
    )
