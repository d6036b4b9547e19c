"""Replicas traded between experts: one less of a light expert, one more of a hot one.

Counts that minimise the largest load per replica need not minimise the largest rank: a replica that
alone fills a rank leaves no room for what must fill its other slots.
"""

from __future__ import annotations

import numpy as np

from .balance import swap
from .problem import Floats, Whole, count_replicas, rank_loads

NEAR = 1e-3
"""Gap from which trades are tried."""
ROUNDS = 12
CANDIDATES = tuple(sorted(((b, a) for b in range(4) for a in range(3)), key=lambda p: (sum(p), p)))
"""Trades of a problem in the order tried: (place by load among the experts of the fullest rank,
place among the experts by the load per replica that they would have with one less)."""


def trade(tokens: Floats, slots: Whole, most: int, enough: Floats) -> Whole:
    """Slots (B, R, S) after trades, each followed by swaps, that lower the fullest rank.

    A problem whose fullest rank is within `NEAR` of `enough` (B,) is left as it is; the others try
    one trade per round and start over with the first candidate after one that helped.
    """
    done = slots.copy()
    attempt = np.zeros(len(slots), dtype=np.int64)
    largest = rank_loads(tokens, done).max(axis=1)
    for _ in range(ROUNDS):
        active = np.flatnonzero((largest > enough * (1 + NEAR)) & (attempt < len(CANDIDATES)))
        if not len(active):
            break
        trial = done[active]
        for index, problem in enumerate(active):
            _apply(tokens[problem], trial[index], most, CANDIDATES[attempt[problem]])
        trial = swap(tokens[active], trial, most, enough[active])
        after = rank_loads(tokens[active], trial).max(axis=1)
        better = after < largest[active] * (1 - 1e-9)
        attempt[active] = np.where(better, 0, attempt[active] + 1)
        done[active[better]] = trial[better]
        largest[active[better]] = after[better]
    return done


def _apply(tokens: Floats, slots: Whole, most: int, candidate: tuple[int, int]) -> None:
    """Replace one replica in `slots` (R, S) as the candidate says, if that is possible."""
    num_ranks = len(slots)
    counts = count_replicas(slots[None], len(tokens))[0]
    load = rank_loads(tokens[None], slots[None])[0]
    share = tokens / counts
    fullest = np.unique(slots[np.argmax(load)])
    hot_order = fullest[np.argsort(-share[fullest], kind="stable")]
    thinned = np.where(counts > 1, tokens / np.maximum(counts - 1, 1), np.inf)
    thinned[hot_order[0]] = np.inf
    cold_order = np.argsort(thinned, kind="stable")
    place, cold_place = candidate
    if place >= len(hot_order) or cold_place >= len(cold_order):
        return
    hot, cold = hot_order[place], cold_order[cold_place]
    if hot == cold or not np.isfinite(thinned[cold]) or counts[hot] >= most * num_ranks:
        return
    fits = np.any(slots == cold, axis=1) & (np.sum(slots == hot, axis=1) < most)
    if np.any(fits):
        rank = int(np.argmin(np.where(fits, load, np.inf)))
        slots[rank, int(np.argmax(slots[rank] == cold))] = hot
