"""Where a step's sequences, longest first, are cut into micro-batches.

M runs from the fewest that hold the tokens to four more; for each, the M contiguous runs with the
least largest token sum. A cut whose bounds already exceed the best known step is left out. Where no
grouping is found for some run (tokens too badly fragmented) the next M is tried. The boundaries of
the best cut are then shifted one by one, by 1, 2, 4, ... sequences, while that shortens the step: a
few long sequences more or less decide which degrees their micro-batch needs.

Source: Wang et al. 2024 (FlexSP), sequence blaster, for the runs of equal tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...errors import NoFeasiblePlan
from .bounds import fewest_micro_batches
from .costs import Costs, Ints
from .micro_batch import Grouping, packed_bound

MORE_MICRO_BATCHES = 4
MOST_REGROUPED = 1200
"""Sequences that are grouped again in shifting boundaries, over all trials."""

Solver = Callable[[Ints, Costs, int, Callable[[], bool]], Grouping | None]
"""Groups of one micro-batch: lengths that descend, costs, ranks, and whether time is out."""
Batch = tuple[int, Ints, Grouping]
"""First position, lengths and groups of one micro-batch."""


def best_cut(
    tokens: Ints, costs: Costs, num_ranks: int, solver: Solver, out_of_time: Callable[[], bool]
) -> list[Batch]:
    """The micro-batches with the least sum of times found, for lengths that descend.

    Raises NoFeasiblePlan when no cut was found whose runs all have groups.
    """
    fewest = fewest_micro_batches(tokens, costs, num_ranks)
    best_s, best, tried = np.inf, list[Batch](), 0
    for num_batches in range(fewest, len(tokens) + fewest + 1):
        if best and (tried > MORE_MICRO_BATCHES or out_of_time()):
            break
        tried += 1
        runs = cut(tokens, min(num_batches, len(tokens)))
        made = _solve_cut(tokens, runs, costs, num_ranks, solver, best_s, out_of_time)
        if made is not None and (seconds := sum(found.seconds for *_, found in made)) < best_s:
            best_s, best = seconds, made
        if num_batches > len(tokens) and not best:
            break
    if not best:
        raise NoFeasiblePlan(f"{len(tokens)} sequences fit no groups of {num_ranks} GPUs",
                             "use more GPUs or recompute activations")  # fmt: skip
    return _shifted(tokens, best, costs, num_ranks, solver, out_of_time)


def _solve_cut(
    tokens: Ints, runs: list[slice], costs: Costs, num_ranks: int, solver: Solver,
    below_s: float, out_of_time: Callable[[], bool],
) -> list[Batch] | None:  # fmt: skip
    """Groups of every run, or None once they cannot take less than `below_s`."""
    expected = [packed_bound(tokens[run], costs, num_ranks) for run in runs]
    made: list[Batch] = []
    for at, run in enumerate(runs):
        if sum(expected) >= below_s:
            return None
        found = solver(tokens[run], costs, num_ranks, out_of_time)
        if found is None:
            return None
        expected[at] = found.seconds
        made.append((run.start, tokens[run], found))
    return made


def cut(tokens: Ints, num_runs: int) -> list[slice]:
    """At most `num_runs` contiguous runs of the lengths with the least largest sum.

    >>> cut(np.array([5, 4, 3, 2, 1]), 2)
    [slice(0, 2, None), slice(2, 5, None)]
    """
    sums = np.concatenate([[0], np.cumsum(tokens)])

    def runs(most: int) -> list[slice]:
        found, start = list[slice](), 0
        while start < len(tokens):
            stop = int(np.searchsorted(sums, sums[start] + most, side="right")) - 1
            found.append(slice(start, stop))
            start = stop
        return found

    low, high = max(int(tokens.max()), -(-int(sums[-1]) // num_runs)), int(sums[-1])
    while low < high:
        middle = (low + high) // 2
        if len(runs(middle)) <= num_runs:
            high = middle
        else:
            low = middle + 1
    return runs(low)


def _shifted(
    tokens: Ints, batches: list[Batch], costs: Costs, num_ranks: int, solver: Solver,
    out_of_time: Callable[[], bool],
) -> list[Batch]:  # fmt: skip
    """The batches with boundaries shifted while that makes their sum smaller."""
    left, improved = MOST_REGROUPED, True
    known: set[tuple[int, int, int]] = set()
    while improved:
        improved = False
        for k in range(len(batches) - 1):
            for step in _steps(batches, k):
                first, middle = batches[k][0], batches[k + 1][0] + step
                stop = batches[k + 1][0] + len(batches[k + 1][1])
                if (first, middle, stop) in known:
                    continue
                known.add((first, middle, stop))
                if left < stop - first:
                    break
                if out_of_time():
                    return batches
                before = batches[k][2].seconds + batches[k + 1][2].seconds
                runs = [slice(first, middle), slice(middle, stop)]
                made = _solve_cut(tokens, runs, costs, num_ranks, solver, before, out_of_time)
                left -= stop - first if made is not None else (stop - first) // 2
                if made is not None and sum(one[2].seconds for one in made) < before * (1 - 1e-9):
                    batches, improved = [*batches[:k], *made, *batches[k + 2 :]], True
                    break
    return batches


def _steps(batches: list[Batch], k: int) -> list[int]:
    """Shifts of the boundary behind batch k that leave both sides a sequence, the near ones first.

    The run before a boundary is the shorter one: up to half of it is given away or as many taken.
    """
    most = max(1, len(batches[k][1]) // 2)
    sizes = [1 << power for power in range(most.bit_length())]
    shifts = [sign * size for size in sizes for sign in (-1, 1)]
    return [s for s in shifts if -len(batches[k][1]) < s < len(batches[k + 1][1])]
