"""Each sequence, longest first, to the group that finishes first and has room, for many
compositions.

The time of a composition n_d is max_g (c_d(g) + sum of t[i, d(g)]) after the assignment

    g(i) = argmin over g with room >= l_i of load_g + t[i, d(g)]        (ties: lowest degree, group)

An assignment is given up, and its time infinite, once a sequence would finish at the best time so
far times `MARGIN`, or later. Two forms of one rule: heaps in plain Python, and loops over
arrays for numba; both give the same groups.
"""

from __future__ import annotations

from functools import cache
from heapq import heapify, heapreplace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import jit
from .costs import Costs, Floats, Ints

MARGIN = 1.04
"""Times above the best one that are still told apart."""


def times_of(
    compositions: NDArray[np.int64], lengths: Ints, seconds: Floats, costs: Costs,
    best_s: float = np.inf,
) -> Floats:  # fmt: skip
    """Time of each composition (Q,) in turn; infinite where given up or where tokens do not fit.

    `best_s` is the best time known before.
    """
    if jit.has_numba():
        degrees = len(costs.degrees)
        result = np.empty(len(compositions))
        _loops()(
            np.ascontiguousarray(compositions), np.ascontiguousarray(lengths),
            np.ascontiguousarray(seconds),
            np.array(costs.pass_s), np.array(costs.capacity_tokens, dtype=np.int64),
            np.zeros(degrees + 1, dtype=np.int64), MARGIN, best_s, result,
        )  # fmt: skip
        return result
    result, best = list[float](), best_s
    table, tokens = seconds.tolist(), lengths.tolist()
    for counts in compositions.tolist():
        found = assign(counts, tokens, table, costs, best * MARGIN)
        result.append(np.inf if found is None else found[0])
        best = min(best, result[-1])
    return np.array(result)


def assign(
    counts: list[int], lengths: list[int], seconds: list[list[float]], costs: Costs,
    give_up_s: float = np.inf,
) -> tuple[float, list[tuple[int, list[int]]]] | None:  # fmt: skip
    """Time and groups (degree index, positions) of one composition; None when given up."""
    heaps: list[tuple[int, list[tuple[float, int]]]] = []
    room: list[int] = []
    members: list[tuple[int, list[int]]] = []
    for d, count in enumerate(counts):
        if count:
            new = range(len(room), len(room) + count)
            heaps.append((d, [(costs.pass_s[d], g) for g in new]))
            room += [costs.capacity_tokens[d]] * count
            members += [(d, []) for _ in new]
    slowest = 0.0
    for index, (length, times) in enumerate(zip(lengths, seconds, strict=True)):
        best, where, chosen = give_up_s, -1, (0.0, -1)
        for h, (d, heap) in enumerate(heaps):
            top = heap[0]
            if top[0] + times[d] >= best:
                continue
            if room[top[1]] < length:
                roomy = [entry for entry in heap if room[entry[1]] >= length]
                if not roomy:
                    continue
                top = min(roomy)
            finish = top[0] + times[d]
            if finish < best:
                best, where, chosen = finish, h, top
        if where < 0:
            return None
        heap, g = heaps[where][1], chosen[1]
        if heap[0] == chosen:
            heapreplace(heap, (best, g))
        else:
            heap[heap.index(chosen)] = (best, g)
            heapify(heap)
        room[g] -= length
        members[g][1].append(index)
        slowest = max(slowest, best)
    return slowest, members


@cache
def _loops() -> Any:
    return jit.compiled(
        _times_of,
        "void(int64[:,::1], int64[::1], float64[:,::1], float64[::1], int64[::1], int64[::1], "
        "float64, float64, float64[::1])",
    )


def _times_of(
    compositions: Any, lengths: Any, seconds: Any, fixed: Any, capacity: Any, start: Any,
    margin: float, best_of_all: float, result: Any,
) -> None:  # fmt: skip
    """The rule over arrays; `start` is room for the first group of each degree."""
    num_degrees = compositions.shape[1]
    for q in range(compositions.shape[0]):
        total = 0
        for d in range(num_degrees):
            start[d] = total
            total += compositions[q, d]
        start[num_degrees] = total
        load, room = np.empty(total), np.empty(total, dtype=np.int64)
        least = np.empty(num_degrees, dtype=np.int64)
        for d in range(num_degrees):
            least[d] = start[d]
            for g in range(start[d], start[d + 1]):
                load[g] = fixed[d]
                room[g] = capacity[d]
        give_up, slowest = best_of_all * margin, 0.0
        for i in range(len(lengths)):
            length = lengths[i]
            best, where, degree = give_up, -1, -1
            for d in range(num_degrees):
                if start[d] == start[d + 1] or load[least[d]] + seconds[i, d] >= best:
                    continue
                g = least[d]
                if room[g] < length:
                    g = -1
                    for k in range(start[d], start[d + 1]):
                        if room[k] >= length and (g < 0 or load[k] < load[g]):
                            g = k
                    if g < 0:
                        continue
                finish = load[g] + seconds[i, d]
                if finish < best:
                    best, where, degree = finish, g, d
            if where < 0:
                slowest = np.inf
                break
            load[where] = best
            room[where] -= length
            if least[degree] == where:
                for k in range(start[degree], start[degree + 1]):
                    if load[k] < load[least[degree]]:
                        least[degree] = k
                    elif load[k] == load[least[degree]] and k < least[degree]:
                        least[degree] = k
            slowest = max(slowest, best)
        result[q] = slowest
        best_of_all = min(best_of_all, slowest)
