"""The optimum of a small pipeline by mixed-integer programming (HiGHS): a certificate.

sets        x, y: actions F, I, W of every stage i and micro-batch j;  rank r holds the actions of
            its stages
variables   end[x]            when x ends
            first[x, y] 0/1   x is before y, for pairs of one rank whose order is not implied
            Z                 makespan
objective   minimise Z
subject to  wait[y]:      end[y] >= end[x] + transfer + duration[y]     y waits for x
            turn[y]:      end[y] >= end[x] + duration[y]                x the same as y, for j - 1
            either[x,y]:  end[y] >= end[x] + duration[y] - H (1 - first[x, y])
                          end[x] >= end[y] + duration[x] - H first[x, y]
            memory[y]:    activation(y) + sum over x before y of gain[x] <= limit     y an F
            last[x]:      Z >= end[x]                                   x a W
            Z >= lower bound

H is a makespan already known: nothing need end later. gain is the activation of the stage for F
and its negative for W. The order is implied within one kind and stage by the micro-batch (they are
alike), and where a chain of waiting leads from x to y. Qi et al. 2023, "Zero Bubble Pipeline
Parallelism", appendix, solves a like programme.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ...errors import InputError
from ...orders import Action, Orders
from .actions import Pipeline
from .bound import lower_bound_s

LARGEST = 15
"""Ranks times micro-batches up to which a certificate is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What the programme found below a known makespan."""

    lower_bound_s: float
    orders: Orders | None
    """Orders of a makespan at most the known one; None when time ran out before any was found."""
    proven: bool


def certify(
    pipeline: Pipeline, limit: float, known_s: float, *, time_limit_s: float
) -> Certificate:
    """The optimum, or the best bound that the time allows, for a makespan already known.

    Raises
    ------
    InputError : ranks times micro-batches exceed `LARGEST`.
    """
    from scipy.optimize import milp

    size = pipeline.num_ranks * pipeline.num_micro_batches
    if size > LARGEST:
        raise InputError("certify", size, f"more than {LARGEST} ranks times micro-batches",
                         "leave it out: the lower bound needs no certificate")  # fmt: skip
    programme = _Programme(pipeline, limit, known_s * (1 + 1e-7))
    options = {"mip_rel_gap": 0.0, "time_limit": max(time_limit_s, 0.01)}
    found = milp(**programme.arguments(), options=options)
    bound_s = getattr(found, "mip_dual_bound", None)
    floor_s = lower_bound_s(pipeline, limit)
    if found.x is None:
        return Certificate(
            lower_bound_s=max(floor_s, bound_s or 0.0), orders=None, proven=found.status == 2
        )
    return Certificate(
        lower_bound_s=max(floor_s, min(bound_s or 0.0, float(found.fun))),
        orders=programme.orders(found.x),
        proven=found.status == 0,
    )


def _implied(pipeline: Pipeline, x: Action, y: Action) -> bool:
    """Whether x is before y in some optimum: the same action for fewer micro-batches, or a chain of
    waiting."""
    (kind, stage, micro), (other, behind, later) = x, y
    if micro > later:
        return False
    if kind == "F":
        return other != "F" or stage <= behind
    if kind == "I":
        return other != "F" and stage >= behind
    return other == "W" and stage == behind


class _Programme:
    """The rows of the programme; columns are `end` per slot, then Z, then `first` per pair."""

    def __init__(self, pipeline: Pipeline, limit: float, horizon_s: float) -> None:
        self.pipeline, self.limit, self.horizon_s = pipeline, limit, horizon_s
        self.actions = [pipeline.action(slot) for slot in range(len(pipeline.waits_for))]
        self.makespan = len(self.actions)
        self.pairs: dict[tuple[Action, Action], int] = {}
        for rank in range(pipeline.num_ranks):
            own = [a for a in self.actions if pipeline.rank_of[a[1]] == rank]
            for x, y in combinations(own, 2):
                if not _implied(pipeline, x, y) and not _implied(pipeline, y, x):
                    self.pairs[x, y] = self.makespan + 1 + len(self.pairs)

    def rows(self) -> Iterator[tuple[dict[int, float], float]]:
        """Every constraint as sum of coefficient times column >= constant."""
        pipeline, slot = self.pipeline, self.pipeline.slot
        for index, y in enumerate(self.actions):
            duration_s = pipeline.duration_s(y)
            before = pipeline.waits_for[index]
            if before >= 0:
                yield {index: 1.0, before: -1.0}, duration_s + pipeline.transfers_s[index]
            kind, stage, micro = y
            if micro:
                yield {index: 1.0, slot((kind, stage, micro - 1)): -1.0}, duration_s
            if kind == "W":
                yield {self.makespan: 1.0, index: -1.0}, 0.0
            if kind == "F":
                yield self._memory(y)
        for (x, y), first in self.pairs.items():
            a, b, h = slot(x), slot(y), self.horizon_s
            yield {b: 1.0, a: -1.0, first: -h}, pipeline.duration_s(y) - h
            yield {a: 1.0, b: -1.0, first: h}, pipeline.duration_s(x)

    def _memory(self, y: Action) -> tuple[dict[int, float], float]:
        pipeline = self.pipeline
        row: dict[int, float] = {}
        known = pipeline.activation[y[1]]
        for x in self.actions:
            if x[0] == "I" or x == y or pipeline.rank_of[x[1]] != pipeline.rank_of[y[1]]:
                continue
            gain = pipeline.activation[x[1]] * (1 if x[0] == "F" else -1)
            if (x, y) in self.pairs:
                row[self.pairs[x, y]] = -gain
            elif (y, x) in self.pairs:  # x is first where y is not
                known += gain
                row[self.pairs[y, x]] = gain
            elif _implied(pipeline, x, y):
                known += gain
        return row, known - self.limit - 1e-9

    def arguments(self) -> dict[str, Any]:
        """What `scipy.optimize.milp` takes."""
        import numpy as np
        from scipy import optimize
        from scipy.sparse import csr_array

        bounds: Any = optimize.Bounds  # its stubs know single numbers only
        constraint: Any = optimize.LinearConstraint
        data, indices, starts, constants = [], [], [0], []
        for row, constant in self.rows():
            data += row.values()
            indices += row.keys()
            starts.append(len(data))
            constants.append(constant)
        width = self.makespan + 1 + len(self.pairs)
        lower, upper = np.zeros(width), np.ones(width)
        lower[: self.makespan] = [self.pipeline.duration_s(action) for action in self.actions]
        lower[self.makespan] = lower_bound_s(self.pipeline, self.limit)
        upper[: self.makespan + 1] = self.horizon_s
        cost, whole = np.zeros(width), np.zeros(width)
        cost[self.makespan] = 1.0
        whole[self.makespan + 1 :] = 1
        matrix = csr_array((data, indices, starts), shape=(len(constants), width))
        return {
            "c": cost,
            "integrality": whole,
            "bounds": bounds(lower, upper),
            "constraints": constraint(matrix, lb=np.array(constants)),
        }

    def orders(self, solution: Any) -> Orders:
        """The actions of each rank by the time at which they end."""
        rows: Orders = [[] for _ in range(self.pipeline.num_ranks)]
        for index in sorted(range(self.makespan), key=lambda index: solution[index]):
            action = self.actions[index]
            rows[self.pipeline.rank_of[action[1]]].append(action)
        return rows
