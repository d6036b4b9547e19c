"""The best layout of one degree for the whole batch, which unequal groups are compared with.

    minimise over d with E_d >= max_i l_i of the makespan when every sequence runs on d ranks,
    with N/d replicas side by side

by the same rules as unequal groups have: sequences balanced over the replicas, passes packed, and,
with barriers, micro-batches cut and sequences exchanged alike. What is left of the gain is that of
unequal degrees alone; frameworks that pack in the order of arrival are slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from ...errors import NoFeasiblePlan
from .assignment import Assignment
from .costs import Costs
from .groups import solve_groups
from .hybrid import solve_hybrid


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """The best single degree."""

    degree: int
    assignment: Assignment
    """Its bounds hold for this degree alone."""

    @property
    def makespan_s(self) -> float:
        """Seconds of the whole batch."""
        return self.assignment.makespan_s


def best_static(
    lengths: Sequence[int], costs: Costs, num_ranks: int, *, barriers: bool, pack: bool = True
) -> Static | None:
    """The fastest single degree and its time; None where none of them holds the sequences."""
    best: Static | None = None
    longest = max(lengths)
    for degree, capacity in zip(costs.degrees, costs.capacity_tokens, strict=True):
        if degree > num_ranks or capacity < longest:
            continue
        alone = costs.of([degree])
        try:
            if barriers:
                found = solve_groups(lengths, alone, num_ranks, certify=False)
            else:
                found = solve_hybrid(lengths, alone, num_ranks, pack=pack)
        except NoFeasiblePlan:
            continue
        if best is None or found.makespan_s < best.makespan_s:
            best = Static(degree=degree, assignment=found)
    return best


def solve(
    lengths: Sequence[int], costs: Costs, num_ranks: int, *, barriers: bool,
    time_limit_s: float | None = None, clock: Callable[[], float] = perf_counter,
) -> tuple[Assignment, Static | None]:  # fmt: skip
    """Unequal groups, never slower than the best single degree, and that degree.

    Raises what `solve_groups` and `solve_hybrid` raise.
    """
    if barriers:
        found = solve_groups(lengths, costs, num_ranks, time_limit_s=time_limit_s, clock=clock)
    else:
        found = solve_hybrid(lengths, costs, num_ranks)
    static = best_static(lengths, costs, num_ranks, barriers=barriers)
    if static is not None and static.makespan_s < found.makespan_s:
        bound = found.lower_bound_s  # that of the micro-batches found does not hold for others
        found = replace(static.assignment, lower_bound_s=bound, cut_bound_s=bound,
                        limit=found.limit)  # fmt: skip
    return found, static
