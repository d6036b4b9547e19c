"""The order of F, I and W on every rank of a pipeline, under a memory limit.

sets        ranks r, stages i on ranks, micro-batches j; actions x: F(i, j), I(i, j), W(i, j)
variables   the order of the actions of each rank; it fixes start(x) as early as can be (`play.py`)
objective   minimise the makespan: the latest end(x)
subject to  start(x) >= end(what x waits for) + transfer            (`actions.py`)
            one action at a time on each rank
            activations kept, from F to W, <= limit on each rank at all times

A rank holds one stage, or two chunks: either neighbours in rounds ("looped": stages r and p + r) or
folded ("v": r and 2p - 1 - r). For each such placement whose lower bound (`bound.py`) leaves
something to gain, the better of the schedules known by name (`fixed.py`) and of list scheduling
(`greedy.py`) is annealed (`anneal.py`). The winner is checked apart from all of these (`check.py`).
Durations do not depend on the micro-batch, splitting the backward pass costs nothing, and W alone
frees memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from ...errors import InputError, NoFeasiblePlan
from ...orders import Orders
from .actions import Pipeline, make_pipeline, split
from .anneal import anneal
from .bound import lower_bound_s
from .check import check
from .fixed import fixed_schedules
from .greedy import greedy_orders
from .oracle import LARGEST, certify
from .solution import EQUAL, Solution

MOVES = 8000
"""Moves of the annealing, all placements together."""
EXACT_S = 60.0
"""Time for a proof of optimality where no time limit is given."""
Times = float | Sequence[float]


@dataclass(slots=True, kw_only=True)
class _Found:
    """The best so far on one placement."""

    placement: str
    pipeline: Pipeline
    chunks: int
    bound_s: float
    makespan_s: float = float("inf")
    orders: Orders | None = None
    method: str = ""

    def offer(self, makespan_s: float, orders: Orders, method: str) -> None:
        if makespan_s < self.makespan_s * (1 - EQUAL):
            self.makespan_s, self.orders, self.method = makespan_s, orders, method


def solve_pipeline(
    num_ranks: int,
    num_micro_batches: int,
    forward_s: Times,
    input_s: Times,
    weight_s: Times,
    *,
    comm_s: float = 0.0,
    memory_limit: float | None = None,
    chunks: int | None = None,
    moves: int = MOVES,
    exact: bool = False,
    time_limit_s: float | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Solution:
    """The fastest orders found for a pipeline within a memory limit, and a bound on all orders.

    Parameters
    ----------
    forward_s, input_s, weight_s : times of one micro-batch, in any one unit: one number, the time
        of a rank's share of the model; or one per rank; or one per chunk, 2 p of them in the
        model's order. A number per rank is cut in two equal halves where a rank has two chunks.
    comm_s : transfer between two ranks.
    memory_limit : activations that a rank may keep, in units of one full stage (a chunk of two is
        half a unit); default p, what 1F1B keeps.
    chunks : 1, 2 or None, which tries both.
    moves : of the annealing in all.
    exact : prove the optimum by mixed-integer programming (ranks times micro-batches up to 15).
    time_limit_s : seconds by `clock` after which the best so far is returned; default none, but
        `EXACT_S` for a proof.

    Raises
    ------
    InputError : a number is out of range, or a list has neither p nor 2 p numbers.
    NoFeasiblePlan : the limit does not hold one micro-batch of one rank.
    """
    started = clock()
    pipelines = _pipelines(num_ranks, num_micro_batches, (forward_s, input_s, weight_s), comm_s,
                           chunks)  # fmt: skip
    limit = float(num_ranks) if memory_limit is None else float(memory_limit)
    _check_limit(limit)
    if exact and num_ranks * num_micro_batches > LARGEST:
        raise InputError("exact", num_ranks * num_micro_batches,
                         "ranks times micro-batches beyond what can be proven",
                         f"leave it out, or give at most {LARGEST}")  # fmt: skip
    if time_limit_s is None:
        time_limit_s = EXACT_S if exact else float("inf")
    deadline = started + time_limit_s

    def expired() -> bool:
        return clock() > deadline

    placements = [
        _Found(
            placement=name,
            pipeline=pipeline,
            chunks=pipeline.num_stages // num_ranks,
            bound_s=lower_bound_s(pipeline, limit),
        )
        for name, pipeline in pipelines.items()
    ]
    allowed = [found for found in placements if chunks in (None, found.chunks)]
    builtin = fixed_schedules(
        {(found.chunks, found.placement == "v"): found.pipeline for found in placements}
    )
    for found in allowed:
        for known in builtin:
            if known.pipeline is found.pipeline and known.peak <= limit * (1 + EQUAL):
                found.offer(known.makespan_s, split(known.orders), known.name)
    tried = _search(allowed, limit, moves, expired)
    best = min(allowed, key=lambda found: found.makespan_s)
    if exact:
        _certify(allowed, best.makespan_s, limit, deadline, clock)
        best = min(allowed, key=lambda found: found.makespan_s)
    assert best.orders is not None
    checked = check(best.pipeline, best.orders, limit)
    assert not checked.problems, checked.problems[:3]
    bound_s = min(min(found.bound_s for found in allowed), checked.makespan_s)
    proven = checked.makespan_s <= bound_s * (1 + EQUAL)
    return Solution(
        pipeline=best.pipeline,
        placement=best.placement,
        orders=best.orders,
        makespan_s=checked.makespan_s,
        peak_activations=checked.peak_activations,
        memory_limit=limit,
        lower_bound_s=bound_s,
        builtin=tuple(builtin),
        method=best.method,
        stop=None if proven else "time" if expired() else "moves",
        moves=tried,
        seconds=clock() - started,
    )


def _pipelines(
    p: int, m: int, times: Sequence[Times], comm_s: float, chunks: int | None
) -> dict[str, Pipeline]:
    """The pipeline of every placement on the same durations."""
    if chunks not in (None, 1, 2):
        raise InputError("chunks", chunks, "not 1 or 2", "give 1, 2 or nothing for the better")
    lengths = [len(given) for given in times if isinstance(given, Sequence)]
    if chunks == 1 and 2 * p in lengths and p > 0:
        raise InputError("chunks", 1, f"but {2 * p} times were given for {p} stages",
                         f"give one number or {p}, or --chunks 2")  # fmt: skip
    if chunks == 1:
        return {"one": make_pipeline(p, m, *times, comm_s=comm_s)}
    two = make_pipeline(p, m, *times, chunks=2, comm_s=comm_s)
    looped = make_pipeline(p, m, *times, chunks=2, comm_s=comm_s, folded=False)
    per_rank = [
        [part[2 * i] + part[2 * i + 1] for i in range(p)]
        for part in (two.forward_s, two.input_s, two.weight_s)
    ]
    one = make_pipeline(p, m, *per_rank, comm_s=comm_s)
    return {"one": one, "looped": looped, "v": two}


def _check_limit(limit: float) -> None:
    if not 0 < limit < float("inf"):
        raise InputError("memory-limit", limit, "not a positive number",
                         "give activations in units of one full stage, 1 or more")  # fmt: skip
    if limit < 1 - EQUAL:
        raise NoFeasiblePlan(
            f"memory-limit={limit:g} is below 1, what one micro-batch keeps on a rank",
            "give --memory-limit 1 or more",
        )


def _search(allowed: list[_Found], limit: float, moves: int, expired: Callable[[], bool]) -> int:
    """List scheduling and annealing of every placement that may hold the best; the moves made."""

    def may_win(found: _Found) -> bool:
        best_s = min(other.makespan_s for other in allowed)
        return found.bound_s < best_s * (1 - EQUAL)

    for found in sorted(allowed, key=lambda found: found.bound_s):
        if may_win(found) and not (expired() and found.orders is not None):
            listed = greedy_orders(found.pipeline, limit, expired)
            if listed is not None:
                found.offer(*listed, "list scheduling")
    tried = 0
    left = sorted(
        (found for found in allowed if found.orders and may_win(found)),
        key=lambda found: found.makespan_s,
    )
    for index, found in enumerate(left):
        if not may_win(found) or expired() or found.orders is None:
            continue
        share = (moves - tried) * 2 // (1 + len(left) - index)  # the most for the most promising
        makespan_s, orders, made = anneal(
            found.pipeline,
            found.orders,
            limit,
            moves=min(share, moves - tried),
            target_s=found.bound_s,
            expired=expired,
        )
        found.offer(makespan_s, orders, f"{found.method}, annealed")
        tried += made
    return tried


def _certify(
    allowed: list[_Found],
    known_s: float,
    limit: float,
    deadline: float,
    clock: Callable[[], float],
) -> None:
    """Raise the bound of every placement to its optimum, or as far as the time allows."""
    for found in allowed:
        if found.bound_s >= known_s * (1 - EQUAL):
            continue
        proof = certify(found.pipeline, limit, known_s, time_limit_s=deadline - clock())
        if proof.orders is not None:
            checked = check(found.pipeline, proof.orders, limit)
            if not checked.problems:
                found.offer(checked.makespan_s, proof.orders, "mixed-integer programme")
        if proof.proven:
            found.bound_s = min(known_s, found.makespan_s)
        else:
            found.bound_s = min(known_s, proof.lower_bound_s)
