"""Replicas and slots of many independent problems at once: greedy choice, packing and swaps.

Arrays have a leading axis B of problems (layers, or layers x nodes), E experts, R ranks, S slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .problem import Floats, Whole, count_replicas

CLOSE = 1e-9
"""Share of the largest load by which a swap must lower it."""


def replicate(tokens: Floats, total: int, most: int) -> Whole:
    """Replicas (B, E), `total` per problem, that minimise the largest load per replica.

    Each expert gets one; each further one goes to the largest load per replica, up to `most` for
    an expert: no other counts have a smaller largest load.
    """
    counts = np.ones(tokens.shape, dtype=np.int64)
    rows = np.arange(len(tokens))
    share = tokens.astype(np.float64) if most > 1 else np.full(tokens.shape, -1.0)
    for _ in range(total - tokens.shape[1]):
        chosen = np.argmax(share, axis=1)
        counts[rows, chosen] += 1
        grown = counts[rows, chosen]
        share[rows, chosen] = np.where(grown < most, tokens[rows, chosen] / grown, -1.0)
    return counts


def pack(tokens: Floats, counts: Whole, num_ranks: int, num_slots: int, most: int) -> Whole:
    """Slots (B, R, S) of all replicas, each given to the least loaded rank that may hold it.

    Largest load first (Graham 1969); a rank may hold it when a slot is free and it holds the expert
    fewer than `most` times. Where no rank may, a replica moves from a full rank to the free slot.
    """
    num_problems, num_experts = tokens.shape
    share = tokens / counts
    order = np.argsort(-share, axis=1, kind="stable")
    repeats = np.take_along_axis(counts, order, axis=1)
    items = np.repeat(order.reshape(-1), repeats.reshape(-1)).reshape(num_problems, -1)
    rows = np.arange(num_problems)
    load = np.zeros((num_problems, num_ranks))
    used = np.zeros((num_problems, num_ranks), dtype=np.int64)
    holds = np.zeros((num_problems, num_experts, num_ranks), dtype=np.int64)
    slots = np.full((num_problems, num_ranks, num_slots), -1, dtype=np.int64)
    for expert in items.T:
        barred = (used == num_slots) | (holds[rows, expert] >= most)
        rank = np.argmin(np.where(barred, np.inf, load), axis=1)
        for problem in np.flatnonzero(barred[rows, rank]):
            own = expert[problem]
            rank[problem] = _make_room(
                share[problem], slots[problem], used[problem], load[problem], holds[problem],
                int(own), most,
            )  # fmt: skip
        slots[rows, rank, used[rows, rank]] = expert
        used[rows, rank] += 1
        load[rows, rank] += share[rows, expert]
        holds[rows, expert, rank] += 1
    return slots


def _make_room(
    share: Floats, slots: Whole, used: Whole, load: Floats, holds: Whole, expert: int, most: int
) -> int:
    """Free a slot for `expert` in one problem, on the rank where it costs least; gives that rank.

    A rank with a free slot has `most` of the expert already; a full rank that may hold it has a
    replica that the other one may hold, since it has more replicas of other experts.
    """
    num_slots = slots.shape[1]
    target = int(np.flatnonzero(used < num_slots)[0])
    found: list[tuple[float, int, int]] = []
    for rank in np.flatnonzero((used == num_slots) & (holds[expert] < most)):
        for slot, other in enumerate(slots[rank]):
            if other != expert and holds[other, target] < most:
                after = load[rank] - share[other] + share[expert]
                found.append((max(after, load[target] + share[other]), int(rank), slot))
    _, rank, slot = min(found)
    other = slots[rank, slot]
    slots[target, used[target]] = other
    used[target] += 1
    load[target] += share[other]
    holds[other, target] += 1
    slots[rank, slot:-1] = slots[rank, slot + 1 :]
    used[rank] -= 1
    load[rank] -= share[other]
    holds[other, rank] -= 1
    return rank


def swap(tokens: Floats, slots: Whole, most: int, enough: Floats) -> Whole:
    """Slots after exchanges between the fullest rank and another, while one lowers its load.

    Of all pairs of replicas the one is taken after which the fuller of the two ranks is lowest. A
    problem ends when no pair lowers its fullest rank, or that rank is at `enough` (B,).
    """
    done = slots.copy()
    num_slots = slots.shape[2]
    active = np.arange(len(slots))
    share = tokens / count_replicas(slots, tokens.shape[1])
    holds = _holdings(slots, tokens.shape[1])
    load = np.take_along_axis(share, slots.reshape(len(slots), -1), axis=1)
    load = load.reshape(slots.shape).sum(axis=2)
    while len(active):
        rows = np.arange(len(active))
        now = done[active]
        own_load = load[active]
        full = np.argmax(own_load, axis=1)
        highest = own_load[rows, full]
        mine = now[rows, full]  # (A, S)
        own = share[active[:, None], mine]
        theirs = share[active[:, None, None], now]  # (A, R, S)
        takes = holds[active[:, None], mine] < most  # (A, S, R): rank may take mine
        gives = holds[active[:, None, None], now, full[:, None, None]] < most  # (A, R, S)
        moved = own[:, :, None, None] - theirs[:, None]  # (A, S, R, S)
        after = np.maximum(highest[:, None, None, None] - moved, own_load[:, None, :, None] + moved)
        after[~(takes[:, :, :, None] & gives[:, None])] = np.inf
        after = after.reshape(len(active), -1)
        best = np.argmin(after, axis=1)
        better = (after[rows, best] < highest * (1 - CLOSE)) & (highest > enough[active])
        if not np.all(better):
            rows, best = rows[better], best[better]
            active, full, mine, now = active[better], full[better], mine[better], now[better]
        i, rest = np.divmod(best, now.shape[1] * num_slots)
        rank, j = np.divmod(rest, num_slots)
        local = np.arange(len(active))
        a, b = mine[local, i], now[local, rank, j]
        done[active, full, i], done[active, rank, j] = b, a
        change = share[active, a] - share[active, b]
        load[active, full] -= change
        load[active, rank] += change
        holds[active, a, full] -= 1
        holds[active, b, full] += 1
        holds[active, a, rank] += 1
        holds[active, b, rank] -= 1
    return done


def _holdings(slots: Whole, num_experts: int) -> NDArray[np.int16]:
    """How often (B, E, R) each rank holds each expert."""
    num_problems, num_ranks, num_slots = slots.shape
    holds = np.zeros((num_problems, num_experts, num_ranks), dtype=np.int16)
    rows = np.repeat(np.arange(num_problems), num_ranks * num_slots)
    ranks = np.tile(np.repeat(np.arange(num_ranks), num_slots), num_problems)
    np.add.at(holds, (rows, slots.reshape(-1), ranks), 1)
    return holds
