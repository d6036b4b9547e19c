"""The cheapest precision of every operator group within an error budget.

    sets        g in G        operator groups (a matmul with its operands, a saved tensor, a layer)
                o in O[g]     dtypes or word lengths that group g may take
    variables   x[g,o] in {0, 1}                          g takes o
    objective   minimise  sum x[g,o] (wt time[g,o] + wm memory[g,o])
    choose      sum over o in O[g] of x[g,o] = 1           for every g
    budget      sum x[g,o] error[g,o] <= E
    capacity    sum x[g,o] memory[g,o] <= M                if there is a limit

a multiple-choice knapsack with one or two limits. That errors add is an assumption: it holds to
first order when groups perturb the loss a little and independently, and mixed-precision methods
that choose by integer programming rest on it (Hubara et al. 2021; HAWQ-V3, Yao et al. 2021).
Measure the error of the chosen whole, not only of its parts.

The relaxation prices the limits (`relaxation`), dynamic programming over the groups that the prices
leave open finds the optimum and proves it (`knapsack`); sums are exact (`grid`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import InputError, NoFeasiblePlan
from .grid import Grid, to_grid
from .knapsack import UNLIMITED, solve_grid
from .problem import Groups, Limits, Option, Totals, Weights, by_group, total, violations

EFFORT = 800_000
"""Partial choices: about half a second of one core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionChoice:
    """The chosen option of every group, and how good the choice is."""

    choice: dict[str, str]
    totals: Totals
    objective: float
    lower_bound: float
    """No choice within the limits has a smaller objective."""
    limit: str | None
    """What stopped the search before the proof: "effort", "time" or None."""

    @property
    def gap(self) -> float | None:
        """Objective over lower bound, minus one; None when only the bound is zero."""
        if self.objective <= self.lower_bound:
            return 0.0
        return self.objective / self.lower_bound - 1 if self.lower_bound else None

    @property
    def optimal(self) -> bool:
        """Whether the choice is proven the best."""
        return self.gap == 0


def solve_precision(
    options: Sequence[Option],
    limits: Limits,
    weights: Weights | None = None,
    *,
    effort: int = EFFORT,
    out_of_time: Callable[[], bool] = lambda: False,
) -> PrecisionChoice:
    """The cheapest option of every group whose errors and bytes together keep the limits.

    Parameters
    ----------
    limits : error budget, in the unit of the options' errors, and bytes. Sums may exceed a limit by
        a share of 1e-9, what decimal fractions lose in binary.
    weights : of time and memory in the objective; None = time alone.
    effort : partial choices examined, about; beyond it the least promising are cut, and the lower
        bound says what that may cost.
    out_of_time : asked between groups; once true, the best choice so far is returned.

    Raises
    ------
    InputError : no options, one named twice, a number that is negative or not finite.
    NoFeasiblePlan : no choice keeps the limits; names the least error that can be reached.
    """
    weights = Weights() if weights is None else weights
    for field, limit in (("error-budget", limits.error), ("memory-limit", limits.memory_bytes)):
        if limit is not None and not (np.isfinite(limit) and limit >= 0):
            raise InputError(field, limit, "not a number of zero or more", "correct it")
    groups = by_group(options)
    _refuse_what_no_choice_keeps(groups, limits)
    resources = [("error", limits.error)]
    if limits.memory_bytes is not None:
        resources.append(("memory_bytes", limits.memory_bytes))
    solved = solve_grid(to_grid(groups, weights, resources), effort, out_of_time)
    if solved is None:
        raise _jointly_infeasible(groups, limits)
    choice = _named(groups, solved.choice)
    totals = total(groups, choice)
    broken = violations(totals, limits)
    assert not broken, broken
    objective = totals.objective(weights)
    bound = objective * solved.bound / solved.cost if solved.cost else objective
    return PrecisionChoice(
        choice=choice,
        totals=totals,
        objective=objective,
        lower_bound=objective if solved.bound >= solved.cost else max(bound, 0.0),
        limit=solved.limit,
    )


def _named(groups: Groups, chosen: np.ndarray) -> dict[str, str]:
    return {
        group: options[int(index)].name
        for (group, options), index in zip(groups.items(), chosen, strict=True)
    }


def _least(groups: Groups, field: str) -> Totals:
    """The totals when every group takes its option of least error or memory."""
    choice = {
        group: min(options, key=lambda o: (getattr(o, field), o.error, o.memory_bytes)).name
        for group, options in groups.items()
    }
    return total(groups, choice)


def _refuse_what_no_choice_keeps(groups: Groups, limits: Limits) -> None:
    """Raise NoFeasiblePlan when the budget or the memory alone cannot be kept."""
    least = _least(groups, "error")
    if violations(least, Limits(error=limits.error)):
        raise NoFeasiblePlan(
            f"the error budget {limits.error:g} is below {least.error:.9g}, the least error of all "
            "groups together",
            f"raise --error-budget to {_above(least.error)}",
        )
    least = _least(groups, "memory_bytes")
    broken = violations(least, Limits(error=np.inf, memory_bytes=limits.memory_bytes))
    if limits.memory_bytes is not None and broken:
        raise NoFeasiblePlan(
            f"the memory limit {limits.memory_bytes:g} is below {least.memory_bytes:.12g}, the "
            "least bytes of all groups together",
            f"raise --memory-limit to {_above(least.memory_bytes)}",
        )


def _jointly_infeasible(groups: Groups, limits: Limits) -> NoFeasiblePlan:
    """Either limit can be kept, both cannot: says the least error within the memory."""
    assert limits.memory_bytes is not None
    grid = _error_within_memory(groups, limits.memory_bytes)
    solved = solve_grid(grid, UNLIMITED, lambda: False)
    assert solved is not None
    totals = total(groups, _named(groups, solved.choice))
    return NoFeasiblePlan(
        f"within {limits.memory_bytes:g} bytes the least error is {totals.error:.9g}, above the "
        f"budget {limits.error:g}",
        f"raise --error-budget to {_above(totals.error)}, or --memory-limit",
    )


def _error_within_memory(groups: Groups, memory_bytes: float) -> Grid:
    errors = {
        group: tuple(
            Option(
                group=group,
                name=option.name,
                time_s=option.error,
                memory_bytes=option.memory_bytes,
                error=0.0,
            )
            for option in options
        )
        for group, options in groups.items()
    }
    return to_grid(errors, Weights(), [("memory_bytes", memory_bytes)])


def _above(value: float) -> str:
    """A short decimal number that is `value` or little more.

    >>> _above(0.123456789), _above(3.0), _above(12345678.0)
    ('0.12346', '3', '12345678')
    """
    if value == round(value):
        return f"{value:.0f}"
    text = f"{value:.5g}"
    return text if float(text) >= value else f"{value * (1 + 1e-4):.5g}"
