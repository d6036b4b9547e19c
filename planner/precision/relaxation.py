"""The linear relaxation of the knapsack, by its dual: a bound, and a price per unit of each limit.

    f(u) = sum_g min_o ( c[g,o] + sum_k u_k a[k,g,o] ) - sum_k u_k b_k      u_k >= 0

is concave, piecewise linear and at most the least cost for every u; its maximum is the bound of the
linear programme, since every group's own polytope has whole corners (Sinha and Zoltners 1979). With
one limit the maximum is found by crossing the line left of it with the line right of it until the
crossing lies on f; with two, the outer price is found in the same way, each value being a maximum
over the inner price.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .grid import Floats, Grid, Whole

STEPS = 200
"""Of a search on one price: it is finite, this guards against rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """Prices (K,), the bound they prove, and the best choice met on the way."""

    bound: float
    prices: Floats
    reduced: Floats
    """(G, O): what an option costs above the cheapest of its group at these prices."""
    base: Whole
    """(G,): the cheapest option of every group at these prices."""
    incumbent: Whole | None
    """(G,): the cheapest choice met that keeps all limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """f at one price: its value, its slopes (K,) or a mixture of them, and all prices (K,)."""

    at: float
    value: float
    slopes: Floats
    prices: Floats


class _Unbounded(Exception):
    """The dual exceeds what any choice can cost: no choice keeps all limits."""


def relax(grid: Grid) -> Relaxation | None:
    """The bound of the linear relaxation with the prices that prove it; None if it is infeasible.

    Every group needs an open option, and the least use of every limit must be within it.
    """
    dual = _Dual(grid)
    prices = np.zeros(len(grid.limits))
    try:
        if len(prices):
            prices = dual.maximum(prices, 0).prices
    except _Unbounded:
        return None
    bound, _, base = dual.evaluate(prices)
    priced = dual.priced(prices)
    return Relaxation(
        bound=bound,
        prices=prices,
        reduced=priced - priced[dual.rows, base][:, None],
        base=base,
        incumbent=dual.incumbent,
    )


class _Dual:
    """f, and the best choice within the limits among those that its evaluations met."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.cost = np.where(grid.open, grid.cost.astype(np.float64), np.inf)
        self.uses = grid.uses.astype(np.float64)
        self.rows = np.arange(len(grid.cost))
        self.most = float(np.where(grid.open, grid.cost, 0).max(axis=1).sum())
        self.incumbent: Whole | None = None
        self.incumbent_cost = 0

    def priced(self, prices: Floats) -> Floats:
        """Cost plus priced uses of every option (G, O); infinite where not open."""
        return self.cost + np.tensordot(prices, self.uses, axes=1)

    def evaluate(self, prices: Floats) -> tuple[float, Floats, Whole]:
        """f, its slopes (K,), and the choice (G,) that attains it."""
        grid = self.grid
        priced = self.priced(prices)
        chosen = np.argmin(priced, axis=1)
        slopes = grid.uses[:, self.rows, chosen].sum(axis=1) - grid.limits
        if np.all(slopes <= 0):
            cost = int(grid.cost[self.rows, chosen].sum())
            if self.incumbent is None or cost < self.incumbent_cost:
                self.incumbent, self.incumbent_cost = chosen, cost
        value = float(priced[self.rows, chosen].sum() - prices @ grid.limits)
        return value, slopes.astype(np.float64), chosen

    def maximum(self, prices: Floats, axis: int) -> _Point:
        """The maximum of f over the prices from `axis` on, those before it as given."""

        def at(price: float) -> _Point:
            moved = prices.copy()
            moved[axis] = price
            if axis + 1 < len(prices):
                inner = self.maximum(moved, axis + 1)
                return _Point(at=price, value=inner.value, slopes=inner.slopes, prices=inner.prices)
            value, slopes, _ = self.evaluate(moved)
            return _Point(at=price, value=value, slopes=slopes, prices=moved)

        guess = max(self.most, 1.0) / max(float(self.grid.limits[axis]), 1.0)
        return _peak(at, axis, guess, self.most)


def _peak(at: Callable[[float], _Point], axis: int, guess: float, most: float) -> _Point:
    """The highest point of a concave, piecewise linear function of a price of zero or more."""
    left = at(0.0)
    if left.slopes[axis] <= 0:
        return left
    right = at(guess)
    while right.slopes[axis] > 0:
        if right.value > most * (1 + 1e-9) + 1:
            raise _Unbounded
        left, right = right, at(4 * right.at)
    peak = left if left.value > right.value else right
    for _ in range(STEPS):
        rise, fall = float(left.slopes[axis]), float(right.slopes[axis])
        if fall == 0:
            return right
        price = (right.value - left.value + rise * left.at - fall * right.at) / (rise - fall)
        if not left.at < price < right.at:
            break
        middle = at(price)
        if middle.value > peak.value:
            peak = middle
        crossing = left.value + rise * (price - left.at)
        if middle.value >= crossing - 1e-13 * abs(crossing):
            break
        if middle.slopes[axis] > 0:
            left = middle
        else:
            right = middle
    rise, fall = float(left.slopes[axis]), float(right.slopes[axis])
    share = rise / (rise - fall)  # of the line to the right, so that the slope on `axis` is zero
    slopes = (1 - share) * left.slopes + share * right.slopes
    return _Point(at=peak.at, value=peak.value, slopes=slopes, prices=peak.prices)
