"""The knapsack in whole numbers: sums are then exact, whatever their order.

Costs and uses are divided by a unit and rounded. A column that already is whole (bytes) keeps the
unit 1. The unit of another is so small that rounding moves no sum by more than a quarter of
`TOLERANCE`; the limit is raised by half of it, so that every choice within the true limit stays
possible and none that is taken exceeds the limit by more than `TOLERANCE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .problem import TOLERANCE, Groups, Weights

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
Mask = NDArray[np.bool_]

COST_RANGE = float(2**50)
"""Largest sum of costs in units: products with multipliers stay exact to a few units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Costs (G, O), uses (K, G, O) and limits (K,) in whole units; padding is not `open`."""

    cost: Whole
    uses: Whole
    limits: Whole
    open: Mask
    """(G, O): the option exists and alone exceeds no limit."""


def to_grid(groups: Groups, weights: Weights, resources: Sequence[tuple[str, float]]) -> Grid:
    """The problem in whole units; `resources` are field names of `Option` with their limits."""
    width = max(len(options) for options in groups.values())
    exists = np.zeros((len(groups), width), dtype=np.bool_)
    costs = np.zeros(exists.shape)
    amounts = np.zeros((len(resources), *exists.shape))
    for row, options in enumerate(groups.values()):
        exists[row, : len(options)] = True
        costs[row, : len(options)] = [weights.cost(option) for option in options]
        for k, (field, _) in enumerate(resources):
            amounts[k, row, : len(options)] = [getattr(option, field) for option in options]
    limits = np.array([limit for _, limit in resources], dtype=np.float64)
    is_open = exists & np.all(amounts <= (limits * (1 + TOLERANCE))[:, None, None], axis=0)
    uses = np.zeros(amounts.shape, dtype=np.int64)
    bounds = np.zeros(len(limits), dtype=np.int64)
    for k, limit in enumerate(limits):
        uses[k], bounds[k] = _whole_uses(np.where(is_open, amounts[k], 0.0), float(limit))
    return Grid(
        cost=_whole_costs(np.where(is_open, costs, 0.0)), uses=uses, limits=bounds, open=is_open
    )


def _whole_uses(amounts: Floats, limit: float) -> tuple[Whole, int]:
    if limit == 0 or (limit < COST_RANGE and np.all(amounts == np.rint(amounts))):
        return amounts.astype(np.int64), int(limit)  # whole, or all zero
    units = 4 * len(amounts) / TOLERANCE  # in one limit
    return np.rint(amounts / limit * units).astype(np.int64), round(units * (1 + TOLERANCE / 2))


def _whole_costs(costs: Floats) -> Whole:
    most = float(costs.max(axis=1).sum())
    if most == 0 or (most <= COST_RANGE and np.all(costs == np.rint(costs))):
        return costs.astype(np.int64)
    return np.rint(costs / most * COST_RANGE).astype(np.int64)
