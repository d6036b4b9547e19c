"""Whether an assignment is what it says, from the lengths and the costs alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose

import numpy as np

from .assignment import Assignment, MicroBatch, Pass
from .costs import Costs

RELATIVE = 1e-9


class WrongAssignment(AssertionError):
    """An assignment breaks a rule: a defect of a solver, never the user's."""


def check(assignment: Assignment, lengths: Sequence[int], costs: Costs) -> None:
    """Raise WrongAssignment unless every sequence is done once, on ranks that can hold it, in time.

    Blocks are aligned and within the ranks, a pass holds E_d tokens at most and takes what the
    costs say; with barriers no rank has two passes in a micro-batch; a micro-batch takes as long
    as its busiest rank, and no bound exceeds what was reached. Passes in one order that all ranks
    share cannot wait for one another in a circle: without barriers it is the order of the list.
    """
    done = sorted(
        index for batch in assignment.micro_batches for p in batch.groups for index in p.sequences
    )
    if done != list(range(len(lengths))):
        raise WrongAssignment(f"{len(done)} sequences placed, not each of {len(lengths)} once")
    for batch in assignment.micro_batches:
        _check_batch(batch, assignment, lengths, costs)
    for bound in (assignment.lower_bound_s, assignment.cut_bound_s):
        if bound > assignment.makespan_s * (1 + 1e-6):
            raise WrongAssignment(f"bound {bound} above the makespan {assignment.makespan_s}")


def _check_batch(
    batch: MicroBatch, assignment: Assignment, lengths: Sequence[int], costs: Costs
) -> None:
    busy = np.zeros(assignment.num_ranks)
    passes = np.zeros(assignment.num_ranks, dtype=int)
    for p in batch.groups:
        _check_pass(p, assignment.num_ranks, lengths, costs)
        busy[p.start : p.start + p.degree] += p.seconds
        passes[p.start : p.start + p.degree] += 1
    if assignment.barriers and passes.max(initial=0) > 1:
        raise WrongAssignment(f"rank {int(passes.argmax())} has two passes in a micro-batch")
    if not isclose(busy.max(initial=0.0), batch.seconds, rel_tol=RELATIVE):
        raise WrongAssignment(f"busiest rank {busy.max()} s, micro-batch says {batch.seconds} s")


def _check_pass(p: Pass, num_ranks: int, lengths: Sequence[int], costs: Costs) -> None:
    if p.degree not in costs.degrees or p.start % p.degree or p.start + p.degree > num_ranks:
        raise WrongAssignment(f"no aligned block: {p.degree} ranks from {p.start} of {num_ranks}")
    at = costs.degrees.index(p.degree)
    if p.kind != costs.kinds[at]:
        raise WrongAssignment(f"kind {p.kind} on {p.degree} ranks, not {costs.kinds[at]}")
    own = [lengths[index] for index in p.sequences]
    if not own or sum(own) > costs.capacity_tokens[at]:
        raise WrongAssignment(f"{sum(own)} tokens where {costs.capacity_tokens[at]} fit")
    work = sum(l * (l * costs.quadratic_s[at] + costs.linear_s[at]) for l in own)
    seconds = max(costs.floor_s[at], costs.pass_s[at] + work)
    if not isclose(seconds, p.seconds, rel_tol=RELATIVE):
        raise WrongAssignment(f"a pass of {p.seconds} s takes {seconds} s")
