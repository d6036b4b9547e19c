"""Dynamic programming over the groups that the prices of the relaxation leave open.

With the prices u of the relaxation, its bound LB = f(u) and the reduced costs
r[g,o] = c[g,o] + u a[g,o] - min over o of the same, a choice x that uses a(x) costs

    c(x) = LB + sum_g r[g,x_g] + sum_k u_k (b_k - a_k(x))

so that with an upper bound UB only choices with sum r < D = UB - LB matter, and the slack that is
left may cost no more than what is left of D. Groups enter in the order of their smallest positive r
(the expanding core of Pisinger 1995); a state is the change of cost and uses against the choice
`base` (r = 0 in every group). With R the sum of r so far, a state is dropped when

    R >= D                                              its bound is no better
    no change of the groups to come that costs D - R in reduced cost can bring it within the limits,
      or bring the price of its slack below D - R
    another state changes cost and every use by no more   (all pairs with one limit, and only a
                                                           sample of them with two)

D starts as a small share of UB - LB and grows (at once to the whole where that adds few groups)
until a solution within it is found, which is then optimal: nearly all of the work goes into the
last round. The effort, counted in states made, is shared out over the groups to come; states beyond
a group's share are cut, those of the smallest R kept, and the smallest R that was cut bounds what
was lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .grid import Floats, Grid, Mask, Whole
from .relaxation import Relaxation, relax

FIRST_SHARE = 1 / 16
"""Of UB - LB: the first D."""
GROWTH = 4.0
UNLIMITED = 2**62
PAIRS = 30_000
"""Of states compared for dominance when there are two limits."""
CLOSE = 1e-9
"""Gap that counts as none: the tolerance of the limits may be worth as much."""
NARROWEST = 256
"""States kept however little effort is left, so that a good choice is still found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """The best choice found (G,), its bound in units of the grid, and what stopped the search."""

    choice: Whole
    cost: int
    bound: float
    limit: str | None


@dataclass(slots=True, kw_only=True)
class _Search:
    """What a round works on and improves."""

    grid: Grid
    relaxation: Relaxation
    choice: Whole
    cost: int
    effort: int
    """States that may still be made."""
    out_of_time: Callable[[], bool]
    limit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """A group of the core: its options that may be taken, against the base; then what follows."""

    group: int
    options: Whole
    cost: Whole
    uses: Whole
    """(K, options)"""
    ahead: int
    """Options of all groups that follow."""
    reach: Floats
    """(K + 1, 2): how far one use (or the priced sum of uses, last) can fall per unit of reduced
    cost, and in all, in the groups that follow; for the last row: how far it can rise."""


def solve_grid(grid: Grid, effort: int, out_of_time: Callable[[], bool]) -> Solved | None:
    """The cheapest choice within the limits, None if there is none.

    With two limits, whether any choice keeps both is settled by a knapsack of its own.
    """
    least = np.where(grid.open, grid.uses, UNLIMITED).min(axis=2)
    if not np.all(grid.open.any(axis=1)) or np.any(least.sum(axis=1) > grid.limits):
        return None
    relaxation = relax(grid)
    if relaxation is None:
        return None
    start = relaxation.incumbent
    if start is None:
        start = _within(grid)
        if start is None:
            return None
    start = _filled(grid, relaxation.prices, start)
    rows = np.arange(len(start))
    search = _Search(
        grid=grid,
        relaxation=relaxation,
        choice=start,
        cost=int(grid.cost[rows, start].sum()),
        effort=effort,
        out_of_time=out_of_time,
    )
    share = FIRST_SHARE
    proven = relaxation.bound
    while search.cost > _closed(proven) and search.limit is None:
        whole = search.cost - relaxation.bound
        most = _core(relaxation, whole)
        width = share * whole if 2 * _core(relaxation, share * whole) < most else whole
        proven = max(proven, _round(search, width))
        share *= GROWTH
    bound = proven if search.cost > _closed(proven) else float(search.cost)
    return Solved(choice=search.choice, cost=search.cost, bound=bound, limit=search.limit)


def _core(relaxation: Relaxation, width: float) -> int:
    """How many groups have more than one option of a reduced cost below `width`."""
    return int(np.count_nonzero((relaxation.reduced < width).sum(axis=1) > 1))


def _closed(bound: float) -> float:
    """The cost up to which a choice counts as reaching the bound."""
    return bound + max(0.5, CLOSE * abs(bound))


def _within(grid: Grid) -> Whole | None:
    """A choice within two limits: the least use of the first one within the others."""
    reduced = Grid(cost=grid.uses[0], uses=grid.uses[1:], limits=grid.limits[1:], open=grid.open)
    least = solve_grid(reduced, UNLIMITED, lambda: False)
    return least.choice if least is not None and least.cost <= grid.limits[0] else None


def _filled(grid: Grid, prices: Floats, choice: Whole) -> Whole:
    """`choice` with cheaper options where the slack allows, most saved per priced use first."""
    rows = np.arange(len(choice))
    saved = grid.cost[rows, choice][:, None] - grid.cost
    more = grid.uses - grid.uses[:, rows, choice][:, :, None]
    groups, options = np.nonzero(grid.open & (saved > 0))
    saved, more = saved[groups, options], more[:, groups, options]
    worth = saved - prices @ more
    order = np.lexsort((-saved, -worth))
    slack = grid.limits - grid.uses[:, rows, choice].sum(axis=1)
    filled, moved = choice.copy(), np.zeros(len(choice), dtype=np.bool_)
    for index in order:
        group = groups[index]
        if not moved[group] and np.all(more[:, index] <= slack):
            slack = slack - more[:, index]
            filled[group], moved[group] = options[index], True
    return filled


def _round(search: _Search, width: float) -> float:
    """Improve the choice of `search`; returns a bound on every choice that is cheaper than it."""
    grid, relaxation = search.grid, search.relaxation
    stages = _stages(grid, relaxation, width)
    prices, base = relaxation.prices, relaxation.base
    rows = np.arange(len(base))
    base_cost = int(grid.cost[rows, base].sum())
    slack = grid.limits - grid.uses[:, rows, base].sum(axis=1)
    cost = np.zeros(1, dtype=np.int64)
    uses = np.zeros((len(slack), 1), dtype=np.int64)
    steps: list[tuple[Whole, Whole]] = []  # of every stage: parent and option of its states
    proven = relaxation.bound + width
    for number, stage in enumerate(stages):
        if search.out_of_time():
            search.limit = "time"
            return min(proven, relaxation.bound + float(np.min(cost + prices @ uses)))
        count = len(stage.options)
        search.effort -= count * len(cost)
        cost = (cost[:, None] + stage.cost).reshape(-1)
        uses = (uses[:, :, None] + stage.uses[:, None, :]).reshape(len(slack), -1)
        left = slack[:, None] - uses
        within = np.flatnonzero(np.all(left >= 0, axis=0))
        if len(within):
            found = int(within[np.argmin(cost[within])])
            if base_cost + int(cost[found]) < search.cost:
                search.cost = base_cost + int(cost[found])
                search.choice = base.copy()
                _trace(search.choice, stages[: number + 1], steps, *divmod(found, count))
        reduced = cost + prices @ uses
        room = min(width, search.cost - relaxation.bound)
        keep = np.flatnonzero(reduced < room)
        keep = keep[_alive(stage.reach, room - reduced[keep], left[:, keep], prices)]
        keep = keep[_undominated(cost[keep], uses[:, keep], reduced[keep])]
        share = max(NARROWEST, search.effort // max(1, stage.ahead))
        if len(keep) > share:
            search.limit = "effort"
            order = np.argsort(reduced[keep], kind="stable")
            proven = min(proven, relaxation.bound + float(reduced[keep[order[share]]]))
            keep = np.sort(keep[order[:share]])
        if not len(keep):
            break
        steps.append((keep // count, keep % count))
        cost, uses = cost[keep], uses[:, keep]
    return proven


def _trace(
    choice: Whole,
    stages: list[_Stage],
    steps: list[tuple[Whole, Whole]],
    parent: int,
    option: int,
) -> None:
    """Write the options that led to a state into `choice`."""
    choice[stages[-1].group] = stages[-1].options[option]
    for stage, (parents, options) in zip(stages[-2::-1], steps[::-1], strict=True):
        choice[stage.group] = stage.options[options[parent]]
        parent = int(parents[parent])


def _stages(grid: Grid, relaxation: Relaxation, width: float) -> list[_Stage]:
    """The groups with more than one option of a reduced cost below `width`, in their order."""
    within = relaxation.reduced < width
    within[np.arange(len(within)), relaxation.base] = True
    core = np.flatnonzero(within.sum(axis=1) > 1)
    second = np.sort(relaxation.reduced[core], axis=1)[:, 1]
    core = core[np.argsort(second, kind="stable")]
    num_uses = len(grid.limits)
    rate, whole = np.zeros(num_uses + 1), np.zeros(num_uses + 1)
    ahead = 0
    stages: list[_Stage] = []
    for group in core[::-1]:
        options = np.flatnonzero(within[group])
        base = relaxation.base[group]
        uses = grid.uses[:, group, options] - grid.uses[:, group, base][:, None]
        stages.append(
            _Stage(
                group=int(group),
                options=options,
                cost=grid.cost[group, options] - grid.cost[group, base],
                uses=uses,
                ahead=ahead,
                reach=np.stack([rate, whole], axis=1),
            )
        )
        ahead += len(options)
        falls = np.vstack([-uses, relaxation.prices @ uses]).clip(min=0)
        reduced = np.maximum(relaxation.reduced[group, options], 1e-300)
        with np.errstate(over="ignore"):
            rate = np.maximum(rate, (falls / reduced).max(axis=1) * (1 + 1e-12))
        whole = whole + falls.max(axis=1) * (1 + 1e-12)
    return stages[::-1]


def _alive(reach: Floats, spare: Floats, left: Whole, prices: Floats) -> Mask:
    """Which states the groups to come may still bring within the limits at a price below `spare`.

    `spare` (N,) is positive; `left` (K, N) is the slack, negative beyond a limit.
    """
    with np.errstate(over="ignore"):
        fall = np.minimum(reach[:-1, :1] * spare, reach[:-1, 1:])
    alive = np.all(-left <= fall, axis=0)
    price = prices @ left
    rate, whole = reach[-1]
    gain = 0.0
    if rate > 1:
        spent = np.minimum(spare, whole / rate)
        gain = (whole if np.isinf(rate) else rate * spent) - spent
    return alive & (price - gain < spare)


def _undominated(cost: Whole, uses: Whole, reduced: Floats) -> Whole:
    """Indices, ascending, of states that no other state beats in cost and in every use."""
    order = np.lexsort((*uses[::-1], cost))
    if len(uses) == 1:
        least = np.minimum.accumulate(uses[0, order])
        fresh = np.ones(len(order), dtype=np.bool_)
        fresh[1:] = uses[0, order[1:]] < least[:-1]
        return np.sort(order[fresh])
    states = np.vstack([cost, uses])[:, order]
    fresh = np.ones(len(order), dtype=np.bool_)
    fresh[1:] = np.any(states[:, 1:] != states[:, :-1], axis=0)
    order, states = order[fresh], states[:, fresh]
    sample = np.argsort(reduced[order], kind="stable")[: PAIRS // max(1, len(order))]
    beats = states[0, sample, None] <= states[0]
    for amounts in states[1:]:
        beats &= amounts[sample, None] <= amounts
    beats[np.arange(len(sample)), sample] = False
    return np.sort(order[~beats.any(axis=0)])
