"""Sequences on unequal blocks of ranks without barriers: hybrid data parallelism.

Sets        i sequences; d degrees; blocks b of d aligned ranks; passes p, each on one block
Variables   degree and block of every sequence, its pass on that block
Minimise    T = max over ranks r of sum_{p on a block that holds r} time(p)
Subject to  every sequence is in one pass;  sum_{i in p} l_i <= E_d;  time(p) as in `costs.py`

Ranks go through their passes in one order that all share and meet again at the gradient reduction.
For f = 1, 0.9, ..., 0.05 and the area bound Z each sequence gets the degree with the least
rank-seconds among those that take f Z at most. Degrees are dealt with from the largest down, each
sequence (longest first) on the least-loaded block: the ranks of a block then have equal loads, so
that no rank waits and T is the sum exactly. Short sequences of one block share passes, first fit.
Where the gap is left above `CLOSE`, the longest sequences are given every other degree in turn, as
long as that helps.

Source of the problem: Ge et al. 2025 (ByteScale), hybrid data parallelism; the assignment is the
longest-processing-time rule of Graham 1969 on nested blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

import numpy as np

from .assignment import Assignment, MicroBatch, Pass
from .bounds import area_bound
from .check import check
from .costs import Costs, Floats, Ints, check_lengths, check_ranks

FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
"""Parts of the bound that one sequence may take: long ones are spread over more ranks below one."""
USUAL = 0.3
"""The fraction below which others are tried only where the gap is large."""
CLOSE = 0.005
"""Gap at which the longest sequences keep their degrees."""
LONGEST_TRIED = 16
MOST_TRIALS, MOST_PLACED = 100, 200_000
"""Other degrees that are tried, and sequences placed in trying them."""


@dataclass(frozen=True, slots=True)
class _Table:
    """Seconds of a sequence alone in a pass, and with its share of a pass, each (K, D)."""

    lengths: Ints
    work: Floats
    alone: Floats
    share: Floats
    costs: Costs
    num_ranks: int
    pack: bool

    @property
    def area(self) -> Floats:
        """Rank-seconds."""
        return self.share * np.array(self.costs.degrees, dtype=np.float64)


def solve_hybrid(
    lengths: Sequence[int], costs: Costs, num_ranks: int, *, pack: bool = True
) -> Assignment:
    """Every sequence on a block of ranks so that the busiest rank is done early.

    Parameters
    ----------
    lengths : tokens per sequence.
    costs : their costs; degrees above `num_ranks` are left out.
    num_ranks : a power of two.
    pack : whether short sequences of one block share passes; False gives each a pass of its own.

    Raises
    ------
    InputError : a length that no group holds, or ranks that are no power of two.
    """
    table = _table(lengths, costs, num_ranks, pack)
    bound = area_bound(table.alone, table.area, num_ranks)
    best: tuple[float, Levels] | None = None
    chosen, tried = np.empty(0, dtype=np.int64), set[bytes]()
    for fraction in FRACTIONS:
        if best is not None and fraction < USUAL and best[0] <= bound * (1 + CLOSE):
            break
        degree = _degrees(table, fraction * bound)
        if degree.tobytes() in tried:
            continue
        tried.add(degree.tobytes())
        found = _assign(table, degree)
        if best is None or found[0] < best[0]:
            best, chosen = found, degree
    assert best is not None
    if best[0] > bound * (1 + CLOSE):
        best = _other_degrees(table, chosen, best, bound)
    return _answer(table, best[1], bound, lengths)


Levels = list[list[list[int]]]
"""The passes of every degree, from the largest down, as [block, sequence, ...]."""


def _other_degrees(
    table: _Table, degree: Ints, best: tuple[float, Levels], bound: float
) -> tuple[float, Levels]:
    """The longest sequences on other degrees, one at a time, while that is faster."""
    trials = min(MOST_TRIALS, MOST_PLACED // len(degree))
    longest = np.argsort(-table.lengths, kind="stable")[:LONGEST_TRIED]
    improved = True
    while improved:
        improved = False
        for i in longest:
            for at in np.flatnonzero(np.isfinite(table.alone[i])):
                if trials == 0 or best[0] <= bound * (1 + CLOSE):
                    return best
                if at == degree[i]:
                    continue
                trials -= 1
                other = degree.copy()
                other[i] = at
                found = _assign(table, other)
                if found[0] < best[0] * (1 - 1e-9):
                    best, degree, improved = found, other, True
    return best


def hybrid_bound(
    lengths: Sequence[int], costs: Costs, num_ranks: int, *, pack: bool = True
) -> float:
    """No assignment without barriers takes less."""
    table = _table(lengths, costs, num_ranks, pack)
    return area_bound(table.alone, table.area, num_ranks)


def _table(lengths: Sequence[int], costs: Costs, num_ranks: int, pack: bool) -> _Table:
    check_ranks(num_ranks)
    costs = costs.up_to(num_ranks)
    tokens = np.asarray(lengths, dtype=np.int64)
    check_lengths(tokens, costs)
    work, fixed = costs.seconds(tokens), np.array(costs.pass_s)
    alone = np.maximum(work + fixed, np.array(costs.floor_s))
    share = work + fixed * (tokens[:, None] / np.array(costs.capacity_tokens)) if pack else alone
    return _Table(tokens, work, alone, share, costs, num_ranks, pack)


def _degrees(table: _Table, most_s: float) -> Ints:
    """Index of the degree of each sequence: least rank-seconds within `most_s`, else fastest."""
    area = np.where(table.alone <= most_s, table.area, np.inf)
    cheapest, fastest = np.argmin(area, axis=1), np.argmin(table.alone, axis=1)
    return np.where(np.isfinite(np.min(area, axis=1)), cheapest, fastest)


def _assign(table: _Table, degree: Ints) -> tuple[float, Levels]:
    """Makespan and passes."""
    loads, blocks_before = np.zeros(1), 1
    result: Levels = []
    for at in range(len(table.costs.degrees) - 1, -1, -1):
        own = np.flatnonzero(degree == at)
        num_blocks = table.num_ranks // table.costs.degrees[at]
        loads, blocks_before = np.repeat(loads, num_blocks // blocks_before), num_blocks
        result.append([])
        if len(own):
            own = own[np.argsort(-table.share[own, at], kind="stable")]
            chosen = _least_loaded(loads.tolist(), table.share[own, at].tolist())
            loads, result[-1] = _passes(table, at, own.tolist(), chosen, loads)
    return float(loads.max()), result


def _least_loaded(loads: list[float], times: list[float]) -> list[int]:
    """The block of each item, in turn the one with the least load."""
    heap = [(load, block) for block, load in enumerate(loads)]
    heapify(heap)
    chosen: list[int] = []
    for seconds in times:
        load, block = heap[0]
        heapreplace(heap, (load + seconds, block))
        chosen.append(block)
    return chosen


def _passes(
    table: _Table, at: int, own: list[int], chosen: list[int], loads: Floats
) -> tuple[Floats, list[list[int]]]:
    """New loads, and passes as [block, sequence, ...]; first fit where passes are shared."""
    after = loads.tolist()
    if not table.pack:
        for block, seconds in zip(chosen, table.alone[own, at].tolist(), strict=True):
            after[block] += seconds
        return np.array(after), [[block, index] for block, index in zip(chosen, own, strict=True)]
    capacity = table.costs.capacity_tokens[at]
    fixed, floor = table.costs.pass_s[at], table.costs.floor_s[at]
    rooms: list[list[int]] = [[] for _ in after]
    passes: list[list[list[int]]] = [[] for _ in after]
    busy: list[list[float]] = [[] for _ in after]
    tokens, work = table.lengths[own].tolist(), table.work[own, at].tolist()
    for index, block, length, seconds in zip(own, chosen, tokens, work, strict=True):
        room = rooms[block]
        for k, left in enumerate(room):
            if length <= left:
                room[k] -= length
                passes[block][k].append(index)
                busy[block][k] += seconds
                break
        else:
            room.append(capacity - length)
            passes[block].append([block, index])
            busy[block].append(fixed + seconds)
    for block, sums in enumerate(busy):
        after[block] += sum(max(floor, seconds) for seconds in sums)
    return np.array(after), [one for each in passes for one in each]


def _answer(table: _Table, levels: Levels, bound: float, lengths: Sequence[int]) -> Assignment:
    costs, groups = table.costs, list[Pass]()
    for at, level in zip(range(len(costs.degrees) - 1, -1, -1), levels, strict=True):
        degree = costs.degrees[at]
        for block, *sequences in level:
            seconds = costs.pass_seconds([lengths[i] for i in sequences], degree)
            groups.append(Pass(start=block * degree, degree=degree, kind=costs.kinds[at],
                               sequences=tuple(sequences), seconds=seconds))  # fmt: skip
    busy = np.zeros(table.num_ranks)
    for p in groups:
        busy[p.start : p.start + p.degree] += p.seconds
    makespan_s = float(busy.max())
    bound = min(bound, makespan_s)
    batch = MicroBatch(groups=tuple(groups), seconds=makespan_s)
    answer = Assignment(num_ranks=table.num_ranks, barriers=False, micro_batches=(batch,),
                        lower_bound_s=bound, cut_bound_s=bound)  # fmt: skip
    check(answer, lengths, costs)
    return answer
