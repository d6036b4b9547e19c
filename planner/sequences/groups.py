"""Sequences in micro-batches with unequal groups: all ranks meet after each micro-batch.

Sets        i sequences; m = 1..M micro-batches; in each, groups as in `micro_batch.py`
Variables   M;  m(i) the micro-batch of each sequence;  groups of each micro-batch
Minimise    sum_m Z_m,     Z_m the slowest group of micro-batch m
Subject to  the rows of `micro_batch.py` in each

Sequences, longest first, are cut into contiguous runs (`cuts.py`), so that each micro-batch is
nearly of one length; each run is grouped by `micro_batch.py`.

Source: Wang et al. 2024 (FlexSP), sequence blaster; its micro-batches are solved by other means
here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

from .assignment import Assignment, MicroBatch, Pass
from .bounds import groups_bound, step_bound
from .check import check
from .costs import Costs, Ints, check_lengths, check_ranks
from .cuts import Batch, Solver, best_cut
from .micro_batch import Grouping, group, packed_bound

BOUND_INTEGER_UP_TO = 1000
"""Sequences of a micro-batch up to which its bound counts whole groups."""
BOUND_LINEAR_UP_TO = 2500
"""Sequences up to which it is a linear programme; beyond, the area bound."""


def solve_groups(
    lengths: Sequence[int], costs: Costs, num_ranks: int, *,
    time_limit_s: float | None = None, certify: bool = True,
    clock: Callable[[], float] = perf_counter, solver: Solver = group,
) -> Assignment:  # fmt: skip
    """Micro-batches and their groups with the least sum of times found.

    Parameters
    ----------
    lengths : tokens per sequence.
    costs : their costs; degrees above `num_ranks` are left out.
    num_ranks : a power of two.
    time_limit_s : seconds by `clock` after which the best so far is returned.
    certify : whether each micro-batch gets its own bound by linear programming; else by area.
    solver : what groups one micro-batch.

    Raises
    ------
    InputError : a length that no group holds, or ranks that are no power of two.
    NoFeasiblePlan : no micro-batches were found that hold the sequences.
    """
    started = clock()
    check_ranks(num_ranks)
    costs = costs.up_to(num_ranks)
    tokens = np.asarray(lengths, dtype=np.int64)
    check_lengths(tokens, costs)

    def out_of_time() -> bool:
        return time_limit_s is not None and clock() - started >= time_limit_s

    order = np.argsort(-tokens, kind="stable")
    batches = best_cut(tokens[order], costs, num_ranks, solver, out_of_time)
    cut_bound = _bound(batches, costs, num_ranks, certify and not out_of_time(), out_of_time)
    limit = "time" if out_of_time() else None
    return answer([(order[start + np.arange(len(own))], found) for start, own, found in batches],
                  lengths, costs, num_ranks, cut_bound, limit)  # fmt: skip


def _bound(
    batches: list[Batch], costs: Costs, num_ranks: int, programme: bool,
    out_of_time: Callable[[], bool],
) -> float:  # fmt: skip
    """Sum over the micro-batches of what each takes at least."""
    total = 0.0
    for _, own, found in batches:
        if found.exact:
            total += found.seconds
        elif programme and len(own) <= BOUND_LINEAR_UP_TO:
            whole = len(own) <= BOUND_INTEGER_UP_TO
            total += groups_bound(own, costs, num_ranks, found.seconds, integer=whole,
                                  out_of_time=out_of_time)  # fmt: skip
        else:
            total += packed_bound(own, costs, num_ranks)
    return total


def answer(
    batches: list[tuple[Ints, Grouping]], lengths: Sequence[int], costs: Costs, num_ranks: int,
    cut_bound_s: float, limit: str | None = None,
) -> Assignment:  # fmt: skip
    """The checked assignment of micro-batches: sequences of each, and their groups."""
    micro_batches: list[MicroBatch] = []
    for own, found in batches:
        groups, start = list[Pass](), 0
        for d, members in sorted(found.groups, key=lambda entry: -entry[0]):
            sequences = tuple(int(own[i]) for i in members)
            seconds = costs.pass_seconds([int(lengths[i]) for i in sequences], costs.degrees[d])
            groups.append(Pass(start=start, degree=costs.degrees[d], kind=costs.kinds[d],
                               sequences=sequences, seconds=seconds))  # fmt: skip
            start += costs.degrees[d]
        micro_batches.append(
            MicroBatch(groups=tuple(groups), seconds=max(p.seconds for p in groups))
        )
    makespan_s = sum(batch.seconds for batch in micro_batches)
    bound = step_bound(np.asarray(lengths, dtype=np.int64), costs, num_ranks)
    result = Assignment(
        num_ranks=num_ranks, barriers=True, micro_batches=tuple(micro_batches),
        lower_bound_s=min(bound, makespan_s), cut_bound_s=min(cut_bound_s, makespan_s),
        limit="time" if limit else None,
    )  # fmt: skip
    check(result, lengths, costs)
    return result
