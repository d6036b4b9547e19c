"""The best groups for a dozen sequences in one micro-batch: every partition, by subsets.

Sets        S subsets of the K sequences; d degrees
Data        time(S, d), tokens(S) as in `costs.py`
Variables   a partition of the sequences into groups S_1, S_2, ... with degrees d_1, d_2, ...
Minimise    Z = max_k time(S_k, d_k)
Subject to  tokens(S_k) <= E_{d_k},  sum_k d_k <= N

For a fixed Z let g(S) be the smallest degree on which S takes Z at most (infinite if none), and

    f({}) = 0,    f(S) = min over T in S that hold the lowest member of S of g(T) + f(S - T)

Z is possible if f(all) <= N: powers of two with sum <= N, a power of two, always fit as aligned
blocks. Z is one of the values time(S, d), found by bisection among them. A step costs 3^(K-1)/2
additions, done as one gather and one segmented minimum per lowest member.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .costs import Costs, Floats, Ints

MOST_SEQUENCES = 13
Masks = NDArray[np.int32]


def solve_exact(
    lengths: Ints, costs: Costs, num_ranks: int, below_s: float, above_s: float
) -> tuple[float, list[tuple[int, list[int]]]] | None:
    """Least time of one micro-batch and its groups (degree, positions), or None.

    None when nothing takes less than `below_s`, the time of a known answer; `above_s` is a lower
    bound. At most `MOST_SEQUENCES` lengths.
    """
    count = len(lengths)
    assert count <= MOST_SEQUENCES
    times = _subset_times(lengths, costs)
    values = np.unique(times[1:])
    values = values[(values < below_s) & (values >= above_s * (1 - 1e-9))]
    low, high, best = 0, len(values), None
    while low < high:
        middle = (low + high) // 2
        fewest, split = _fewest_ranks(times <= values[middle], costs, count)
        if fewest <= num_ranks:
            high, best = middle, (float(values[middle]), split)
        else:
            low = middle + 1
    if best is None:
        return None
    seconds, split = best
    return seconds, _groups(split, times, costs, seconds, count)


def _subset_times(lengths: Ints, costs: Costs) -> Floats:
    """Seconds of a pass of each subset on each degree, (2^K, D); infinite without the room."""
    work = lengths[:, None] * (
        lengths[:, None] * np.array(costs.quadratic_s) + np.array(costs.linear_s)
    )
    sums, tokens = np.zeros((1, len(costs.degrees))), np.zeros(1, dtype=np.int64)
    for row, length in zip(work, lengths, strict=True):
        sums = np.concatenate([sums, sums + row])
        tokens = np.concatenate([tokens, tokens + length])
    times = np.maximum(sums + np.array(costs.pass_s), np.array(costs.floor_s))
    return np.where(tokens[:, None] <= np.array(costs.capacity_tokens), times, np.inf)


@lru_cache(maxsize=MOST_SEQUENCES)
def _pairs(members: int) -> tuple[Masks, Masks, Masks]:
    """(T, S - T) for S of 0 and any of 1..members, T a part of S with 0; and where each S starts.

    Masks count from the lowest member: shift them left for higher ones.
    """
    first, rest = [np.zeros(1, dtype=np.int32)], [np.zeros(1, dtype=np.int32)]
    for bit in range(members):
        one = np.int32(1 << bit)
        without = list(zip(first, rest, strict=True))
        for t, r in without:
            first.append(np.concatenate([t, t | one]))
            rest.append(np.concatenate([r | one, r]))
    starts = np.cumsum([0, *(len(t) for t in first[:-1])], dtype=np.int32)
    return np.concatenate(first) << 1 | 1, np.concatenate(rest) << 1, starts


def _fewest_ranks(fits: NDArray[np.bool_], costs: Costs, count: int) -> tuple[float, list[int]]:
    """Ranks that all sequences need, and the subsets that need them; `fits` is (2^K, D)."""
    degrees = np.array([*costs.degrees, 0.0])
    alone = degrees[np.where(fits.any(axis=1), fits.argmax(axis=1), len(costs.degrees))]
    alone[alone == 0.0] = np.inf
    fewest = np.zeros(1 << count)
    for lowest in range(count - 1, 0, -1):
        first, rest, starts = _pairs(count - 1 - lowest)
        total = alone[first << lowest] + fewest[rest << lowest]
        sets = (np.arange(len(starts)) << 1 | 1) << lowest
        fewest[sets] = np.minimum.reduceat(total, starts)
    subsets = np.arange(1 << count)
    split: list[int] = []
    left = (1 << count) - 1
    needed = np.inf
    while left:
        lowest = left & -left
        parts = subsets[(subsets & lowest != 0) & (subsets & ~left == 0)]
        total = alone[parts] + fewest[left ^ parts]
        at = int(np.argmin(total))
        needed = min(needed, float(total[at])) if not split else needed
        if not np.isfinite(total[at]):
            return np.inf, []
        split.append(int(parts[at]))
        left ^= split[-1]
    return needed, split


def _groups(
    split: list[int], times: Floats, costs: Costs, seconds: float, count: int
) -> list[tuple[int, list[int]]]:
    groups: list[tuple[int, list[int]]] = []
    for subset in split:
        degree = costs.degrees[int(np.argmax(times[subset] <= seconds))]
        groups.append((degree, [i for i in range(count) if subset >> i & 1]))
    return groups
