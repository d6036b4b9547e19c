"""Pipeline schedules: the order of actions on every rank, played to a makespan and a memory curve.

An action is (kind, stage, micro-batch) with kind "F" or "B", or where the backward is split "I"
and "W" (`zero_bubble.py`). Stage i runs on rank `rank_of(schedule, i, p)`. The order on a rank is
fixed by the schedule; an action starts when the rank is free and the action that it waits for is
done: F(i, j) after F(i-1, j), B(i, j) after B(i+1, j) and F(i, j), each plus the transfer where
they are on different ranks; I as B, and W(i, j) after I(i, j). With one resource per rank this is a
longest path; where the processes of a node share its cores, the speed of an action falls with the
number of busy ranks (`play_shared`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..orders import Action, Orders, owners
from ..schedules import SCHEDULES, SPLIT_SCHEDULES, V_SCHEDULES, rank_of
from .graph import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """The outcome of playing orders: seconds."""

    makespan_s: float
    busy_s: tuple[float, ...]
    """Busy time of every rank."""


def orders(schedule: str, p: int, v: int, m: int) -> Orders:
    """The actions of each rank in order.

    gpipe: all forwards, then all backwards. 1f1b: p - rank forwards, then one backward and one
    forward in turn. interleaved: the same over v chunks, micro-batches in rounds of p (Narayanan et
    al. 2021, section 2.2), with 2 (p - rank - 1) + (v - 1) p + 1 forwards before the first
    backward. The others split the backward: `zero_bubble.py`.

    >>> orders("1f1b", 2, 1, 2)[0]
    [('F', 0, 0), ('F', 0, 1), ('B', 0, 0), ('B', 0, 1)]
    """
    return [order_of(schedule, p, v, m, rank) for rank in range(p)]


@functools.lru_cache(maxsize=32)
def _known_orders(schedule: str, p: int, v: int, m: int) -> Orders:
    """`orders`, which plans of one search share; not to be changed."""
    return orders(schedule, p, v, m)


def order_of(schedule: str, p: int, v: int, m: int, rank: int) -> list[Action]:
    """The actions of one rank in order."""
    if schedule in SPLIT_SCHEDULES:
        from .zero_bubble import split_order  # built on the whole schedules of this module

        return split_order(schedule, p, v, m, rank)
    if schedule == "interleaved" and v > 1:
        return _interleaved(rank, p, v, m)
    warm_up = m if schedule == "gpipe" else min(m, p - rank)
    actions: list[Action] = [("F", rank, j) for j in range(warm_up)]
    for j in range(m):
        actions.append(("B", rank, j))
        if warm_up + j < m:
            actions.append(("F", rank, warm_up + j))
    return actions


def _interleaved(rank: int, p: int, v: int, m: int) -> list[Action]:
    steps = _interleaved_steps(p, v, m)
    forward: list[Action] = [("F", chunk * p + rank, micro) for chunk, micro in steps]
    backward: list[Action] = [("B", (v - 1 - chunk) * p + rank, micro) for chunk, micro in steps]
    total, per_round = m * v, m // max(1, m // p)
    warm_up = min((v - 1) * per_round + 2 * (p - 1 - rank), total)
    actions = forward[:warm_up]
    for pair in zip(forward[warm_up:], backward, strict=False):
        actions += pair
    return actions + backward[total - warm_up :]


@functools.lru_cache(maxsize=8)
def _interleaved_steps(p: int, v: int, m: int) -> tuple[tuple[int, int], ...]:
    """(chunk, micro-batch) of a rank's forwards in order; its backwards count chunks from the
    end."""
    rounds = max(1, m // p)
    per_round = m // rounds
    return tuple(
        ((step // per_round) % v, (step // (per_round * v)) * per_round + step % per_round)
        for step in range(m * v)
    )


def _needs(action: Action, last_stage: int) -> list[Action]:
    """What an action waits for; the gradient of a stage's input is called B."""
    kind, stage, micro = action
    if kind == "F":
        return [("F", stage - 1, micro)] if stage else []
    if kind == "W":
        return [("B", stage, micro)]
    own = [("F", stage, micro)]
    return own if stage == last_stage else [*own, ("B", stage + 1, micro)]


Hops = float | Sequence[float]
"""Seconds of a transfer between ranks: one for all, or one from every stage to the next."""


def play(order: Orders, duration: Callable[[Action], float], p2p_s: Hops) -> Played:
    """Longest path through the actions; every rank is a resource of its own.

    Durations depend on kind and stage alone.

    >>> done = play(orders("1f1b", 4, 1, 8), lambda a: 1.0 if a[0] == "F" else 2.0, 0.0)
    >>> done.makespan_s
    33.0
    """
    p = len(order)
    owner = owners(order)
    last_stage = len(owner) - 1
    num_micro = 1 + max(micro for _, _, micro in order[0])
    # neighbours on one rank, and the ends of the model, wait for no transfer
    each = list(p2p_s)[:last_stage] if isinstance(p2p_s, Sequence) else [p2p_s] * last_stage
    hops = [0.0 if a == b else hop for (a, b), hop in zip(pairwise(owner), each, strict=True)]
    into_forward, into_backward = [0.0, *hops], [*hops, 0.0]
    kinds = {kind for actions in order for kind, _, _ in actions}
    stages = range(last_stage + 1)
    seconds = {kind: [duration((kind, stage, 0)) for stage in stages] for kind in kinds}
    forward = [[-1.0] * num_micro for _ in stages]  # when it ends; -1: not yet
    backward = [[-1.0] * num_micro for _ in stages]
    position, clock, busy = [0] * p, [0.0] * p, [0.0] * p
    sweep = [*range(p), *reversed(range(p - 1))]  # forwards go up the ranks, backwards down
    progress = True
    while progress:
        progress = False
        for rank in sweep:
            actions = order[rank]
            now, spent, first = clock[rank], busy[rank], position[rank]
            at, end = first, len(actions)
            while at < end:
                kind, stage, micro = actions[at]
                length = seconds[kind][stage]
                if kind == "F":
                    if stage:
                        before = forward[stage - 1][micro]
                        if before < 0:
                            break
                        if before + into_forward[stage] > now:
                            now = before + into_forward[stage]
                    now += length
                    forward[stage][micro] = now
                elif kind == "W":
                    before = backward[stage][micro]
                    if before < 0:
                        break
                    now = max(now, before) + length
                else:
                    if forward[stage][micro] < 0:
                        break
                    if stage < last_stage:
                        after = backward[stage + 1][micro]
                        if after < 0:
                            break
                        if after + into_backward[stage] > now:
                            now = after + into_backward[stage]
                    now += length
                    backward[stage][micro] = now
                spent += length
                at += 1
            if at > first:
                clock[rank], busy[rank], position[rank] = now, spent, at
                progress = True
    if any(at < len(actions) for at, actions in zip(position, order, strict=True)):
        raise ValueError("the orders deadlock: an action waits for one behind it")
    return Played(makespan_s=max(clock), busy_s=tuple(busy))


def play_long(
    schedule: str, p: int, v: int, m: int, duration: Callable[[Action], float], p2p_s: Hops
) -> Played:
    """`play` of a schedule with any number of micro-batches, in time that does not grow with it.

    After fill every p further micro-batches add the same time (durations do not depend on the
    micro-batch), so that two short plays tell a long one. Where a stage a little slower than the
    others takes longer to become the bottleneck, its own chain of actions does.
    """
    fill = 2 * p + m % p
    fill += FILL_OF_SPLIT * p if schedule in SPLIT_SCHEDULES else 0
    if m <= fill + p or _must_play(schedule, p, v, m, duration):
        return play(_known_orders(schedule, p, v, m), duration, p2p_s)
    short = play(_known_orders(schedule, p, v, fill), duration, p2p_s)
    longer = play(_known_orders(schedule, p, v, fill + p), duration, p2p_s)
    rounds = (m - fill) // p

    def extend(a: float, b: float) -> float:
        return a + rounds * (b - a)

    makespan_s = extend(short.makespan_s, longer.makespan_s)
    hop_s = min(p2p_s) if isinstance(p2p_s, Sequence) else p2p_s
    return Played(
        makespan_s=max(makespan_s, slowest_chain_s(schedule, p, v, m, duration, hop_s)),
        busy_s=tuple(map(extend, short.busy_s, longer.busy_s)),
    )


FILL_OF_SPLIT = 3
"""Further rounds of p micro-batches until unlike chunks repeat, their backwards split, to 0.6 %."""
LONGEST_PLAY = 400_000
"""Actions of an interleaved schedule of unlike chunks up to which it is played in full."""


def _must_play(schedule: str, p: int, v: int, m: int, duration: Callable[[Action], float]) -> bool:
    """Whether two short plays would miss a long one: interleaved rounds of chunks that differ."""
    if schedule != "interleaved" or v == 1:
        return False
    inner = {(duration(("F", i, 0)), duration(("B", i, 0))) for i in range(1, p * v - 1)}
    return bool(m % p) or (len(inner) > 1 and 2 * p * v * m <= LONGEST_PLAY)


def slowest_chain_s(
    schedule: str, p: int, v: int, m: int, duration: Callable[[Action], float], p2p_s: float
) -> float:
    """The longest chain through all actions of one rank: what leads to its first one, its work, the
    gaps in which it must wait for its first and for its last backward, what follows its last one.
    """
    if schedule in SPLIT_SCHEDULES:
        return _slowest_split_chain_s(schedule, p, v, m, duration, p2p_s)
    stages = range(p * v)
    forward = np.array([duration(("F", stage, 0)) for stage in stages])
    backward = np.array([duration(("B", stage, 0)) for stage in stages])
    both = forward + backward
    ranks = np.arange(p)
    if schedule == "gpipe":  # the slowest rank of either phase, and the way through the others
        return float(both.sum() + (m - 1) * (forward.max() + backward.max()) + 2 * (p - 1) * p2p_s)
    if schedule == "interleaved" and v > 1:
        before = np.cumsum(both[:p]) - both[:p] + 2 * ranks * p2p_s
        return float(np.max(before + m * both.reshape(v, p).sum(axis=0)))
    chains = chain_s(
        forward_s=forward,
        backward_s=backward,
        before_s=np.cumsum(both) - both + 2 * ranks * p2p_s,
        behind_s=both.sum() - np.cumsum(both) + 2 * (p - 1 - ranks) * p2p_s,
        micro_batches=m,
        warm_up=np.full(p, m) if schedule == "gpipe" else np.minimum(m, p - ranks),
    )
    return float(chains.max())


def _slowest_split_chain_s(
    schedule: str, p: int, v: int, m: int, duration: Callable[[Action], float], p2p_s: float
) -> float:
    """`slowest_chain_s` of a split backward."""
    forward, whole, inputs, weights = (
        np.array([duration((kind, stage, 0)) for stage in range(p * v)]) for kind in "FBIW"
    )
    backward = np.minimum(whole, inputs + weights)
    owner = np.array([rank_of(schedule, stage, p) for stage in range(p * v)])
    ranks = np.arange(p)
    last = np.array([np.flatnonzero(owner == rank)[-1] for rank in ranks])
    counts = split_warm_up(np.full(p, SCHEDULES.index(schedule)), p, v, m, ranks)
    total = np.bincount(owner, weights=forward)
    path = forward.sum() - np.cumsum(forward)[:p] + inputs.sum() - np.cumsum(inputs)[last]
    chains = split_chain_s(
        forward_s=total,
        backward_s=np.bincount(owner, weights=backward),
        before_s=np.cumsum(forward)[:p] - forward[:p] + ranks * p2p_s,
        path_s=path + split_hops(schedule in V_SCHEDULES, p, v, ranks) * p2p_s,
        warm_up_s=counts[0] * forward[:p] + counts[1] * total + counts[2] * forward[last],
        micro_batches=m,
        chunks=v,
        warm_up=counts[0] + 1,
    )
    return float(chains.max())


def split_hops(folded: Array | bool, p: Array | int, v: Array | int, rank: Array) -> Array:
    """Transfers from a rank's first forward to its first backward, both of one micro-batch."""
    there = p * v - 1 - rank
    return np.where(folded, 2 * (p - 1) + 0 * rank, there + p - 1 - rank)


def split_warm_up(
    schedule: Array, p: Array | int, v: Array | int, m: Array | int, rank: Array
) -> tuple[Array, Array, Array]:
    """Forwards of a rank after its first one and before its first backward: of its first chunk, of
    every chunk and of its last chunk besides. `schedule` indexes `SCHEDULES`."""
    zb_h2, dual = (schedule == SCHEDULES.index(name) for name in ("zb-h2", "dualpipev"))
    folded = np.isin(schedule, [SCHEDULES.index(name) for name in V_SCHEDULES])
    looped = ~folded & (np.asarray(v) > 1)
    down = np.minimum(m, 2 * p - 1 - rank + (dual & (rank == p - 1))) - 1
    one = np.minimum(m, np.where(zb_h2, 2, 1) * (p - 1 - rank) + 1) - 1
    return (
        np.where(folded, down, np.where(looped, -1, one)),
        np.where(looped, p, 0),
        np.where(folded, rank + 1, np.where(looped, -rank, 0)),
    )


def split_chain_s(
    *,
    forward_s: Array,
    backward_s: Array,
    before_s: Array,
    path_s: Array,
    warm_up_s: Array,
    micro_batches: Array | int,
    chunks: Array | int,
    warm_up: Array,
) -> Array:
    """`chain_s` of a rank with a split backward: nothing need follow its last action.

    F and B are the rank's work for a micro-batch in all of its chunks, `path` leads from its first
    forward to its first backward through other stages, and `warm_up` seconds of forwards fill it:

        before + m (F + B) + max(0, path - warm_up)

    With one chunk and w forwards before the first backward the last micro-batch waits as long, and
    w - 1 backwards fill that gap, as in `chain_s`.
    """
    gap = np.maximum(0.0, path_s - warm_up_s)
    last = np.maximum(0.0, path_s - (warm_up - 1) * backward_s)
    last = np.where(np.asarray(chunks) == 1, last, 0.0)
    idle = np.where(micro_batches > warm_up, gap + last, np.maximum(gap, last))
    return before_s + micro_batches * (forward_s + backward_s) + idle


def chain_s(
    *,
    forward_s: Array,
    backward_s: Array,
    before_s: Array,
    behind_s: Array,
    micro_batches: Array | int,
    warm_up: Array,
) -> Array:
    """What lies between the start of a step and the last action of a rank at least.

    With m micro-batches, w forwards before the first backward, F and B the rank's own actions and S
    what leads through the stages behind it and back,

        before + m (F + B) + idle
        idle = max(0, S - (w-1) F) + max(0, S - (w-1) B)      when m > w (two separate gaps)
        idle = max(0, S - (w-1) F, S - (w-1) B)               when m <= w (one gap)

    because the rank's first backward waits for the stages behind it and so does its last. For equal
    stages this is exact.
    """
    gap_forward = np.maximum(0.0, behind_s - (warm_up - 1) * forward_s)
    gap_backward = np.maximum(0.0, behind_s - (warm_up - 1) * backward_s)
    apart = gap_forward + gap_backward
    idle = np.where(micro_batches > warm_up, apart, np.maximum(gap_forward, gap_backward))
    return before_s + micro_batches * (forward_s + backward_s) + idle


def live_chunks(schedule: str, p: int, v: int, m: int, rank: int) -> tuple[int, int]:
    """`in_flight` of one rank of a schedule."""
    if schedule == "gpipe":
        return m * v, m * v - 1
    short = min(m, 2 * p + m % p)
    if schedule == "interleaved" and v > 1 and m % p:
        short = m
    return in_flight(order_of(schedule, p, v, short, rank))


def play_shared(
    order: Orders,
    duration: Callable[[Action], float],
    p2p_s: float,
    speed: Sequence[float],
) -> Played:
    """The same with one shared resource: with n ranks busy at once each runs at speed[n-1].

    `duration` is the time of an action when its rank alone is busy; speed[0] is 1. A waiting rank
    uses nothing.
    """
    owner = owners(order)
    finish: dict[Action, float] = {}
    position = [0] * len(order)
    busy = [0.0] * len(order)
    active: dict[int, float] = {}
    now = 0.0
    remaining = sum(len(actions) for actions in order)
    while remaining:
        wake = float("inf")
        for rank, actions in enumerate(order):
            if rank in active or position[rank] >= len(actions):
                continue
            start = _start(actions[position[rank]], owner, finish, p2p_s)
            if start <= now + 1e-15:
                active[rank] = duration(actions[position[rank]])
            else:
                wake = min(wake, start)
        if not active:
            if wake == float("inf"):
                raise ValueError("the orders deadlock: an action waits for one behind it")
            now = wake
            continue
        rate = speed[min(len(active), len(speed)) - 1]
        step = min(min(active.values()) / rate, wake - now)
        now += step
        for rank in list(active):
            busy[rank] += step
            active[rank] -= step * rate
            if active[rank] <= 1e-12:
                del active[rank]
                kind, stage, micro = order[rank][position[rank]]
                finish["B" if kind == "I" else kind, stage, micro] = now
                position[rank] += 1
                remaining -= 1
    return Played(makespan_s=now, busy_s=tuple(busy))


def _start(
    action: Action, owner: Sequence[int], finish: dict[Action, float], p2p_s: float
) -> float:
    start = 0.0
    for need in _needs(action, len(owner) - 1):
        end = finish.get(need)
        if end is None:
            return float("inf")
        hop = p2p_s if owner[need[1]] != owner[action[1]] else 0.0
        start = max(start, end + hop)
    return start


def in_flight(actions: Sequence[Action]) -> tuple[int, int]:
    """Largest number of live chunk activations at a backward: at the first one, at later ones.

    Before the first backward no gradients exist; from then on they do, so both counts matter.
    """
    live = first = later = 0
    seen = False
    for kind, _, _ in actions:
        if kind == "F":
            live += 1
            continue
        if seen:
            later = max(later, live)
        else:
            first, seen = live, True
        live -= 1
    return first, later
