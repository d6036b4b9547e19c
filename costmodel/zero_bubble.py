"""Orders of the zero-bubble schedules: the backward pass split in two, so that one half can wait.

An action is (kind, stage, micro-batch) as in `schedule.py`, with two more kinds: the backward pass
B is I, the gradient of the stage's input, for which the stage before waits, and W, the gradient of
its weights, for which nobody waits. W fills what would be bubbles; the activations of a micro-batch
stay until its W (or B).

    zb-h1           1f1b with W put off by `rank` micro-batches: as much memory as 1f1b
    zb-h2           twice the warm-up, W put off twice as far: up to 2p - 1 live micro-batches
    interleaved-zb  zb-h1 over v chunks per rank
    zb-v            two chunks per rank in a V: stages r and 2p - 1 - r on rank r
    dualpipev       the V with forwards between backwards, whole ones in the steady state

In the first three stage i is on rank i mod p. Sources: Qi et al. 2023, "Zero Bubble Pipeline
Parallelism", sections 2 (H1, H2) and 6 (V); DeepSeek 2024, DualPipe, the V form. The generators of
torch 2.13 (`ScheduleInterleavedZeroBubble`, `ScheduleZBVZeroBubble`, `ScheduleDualPipeV`) give the
same orders; its pairs of a forward and a backward that overlap are here one after the other.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

from ..orders import Action, Orders
from ..schedules import SPLIT_SCHEDULES, V_SCHEDULES, rank_of
from .schedule import order_of

__all__ = [
    "SPLIT_SCHEDULES",
    "V_SCHEDULES",
    "not_possible",
    "peak_live",
    "rank_of",
    "split_order",
    "split_orders",
]

Step = tuple[str, int | None]
"""Kind and stage of an action not yet numbered; stage None: that of the oldest I without W."""


def split_orders(schedule: str, p: int, v: int, m: int) -> Orders:
    """The actions of each rank in order, of one of `SPLIT_SCHEDULES`.

    Raises
    ------
    ValueError : the schedule does not exist for these numbers: zb-v and dualpipev have v = 2, zb-h1
        and zb-h2 v = 1, dualpipev m >= 2p, interleaved-zb m a multiple of its rounds.

    >>> split_orders("zb-h1", 2, 1, 2)[1]
    [('F', 1, 0), ('I', 1, 0), ('F', 1, 1), ('I', 1, 1), ('W', 1, 0), ('W', 1, 1)]
    """
    reason = not_possible(schedule, p, v, m)
    if reason:
        raise ValueError(f"{schedule}: {reason}")
    return [split_order(schedule, p, v, m, rank) for rank in range(p)]


def split_order(schedule: str, p: int, v: int, m: int, rank: int) -> list[Action]:
    """The actions of one rank in order, where the schedule is possible."""
    if schedule == "zb-v":
        return _zb_v(rank, p, m)
    if schedule == "dualpipev":
        return _dualpipe_v(rank, p, m)
    return _delayed(schedule, rank, p, v, m)


def not_possible(schedule: str, p: int, v: int, m: int) -> str:
    """Why a schedule does not exist for p ranks, v chunks each and m micro-batches, or "".

    >>> not_possible("dualpipev", 4, 2, 6)
    'needs at least 8 micro-batches'
    """
    if schedule not in SPLIT_SCHEDULES:
        return f"unknown schedule (known: {', '.join(SPLIT_SCHEDULES)})"
    if schedule in V_SCHEDULES and v != 2:
        return "has two chunks per rank"
    if schedule in ("zb-h1", "zb-h2") and v != 1:
        return "has one chunk per rank"
    if schedule == "dualpipev" and m < 2 * p:
        return f"needs at least {2 * p} micro-batches"
    if schedule == "interleaved-zb" and m % max(1, m // p):
        return f"needs micro-batches in rounds of equal size (a multiple of {m // p})"
    return ""


def peak_live(actions: Sequence[Action]) -> int:
    """Largest number of chunk activations alive on a rank: from F to W, or to B.

    >>> [peak_live(rank) for rank in split_orders("zb-h1", 4, 1, 8)]
    [4, 4, 4, 4]
    """
    live = peak = 0
    for kind, _, _ in actions:
        live += (kind == "F") - (kind in "WB")
        peak = max(peak, live)
    return peak


def _delayed(schedule: str, rank: int, p: int, v: int, m: int) -> list[Action]:
    """Some forwards, then F and I in turn, each W a fixed number of micro-batches after its I."""
    whole = order_of("interleaved" if v > 1 else "1f1b", p, v, m, rank)
    forwards = [action for action in whole if action[0] == "F"]
    backwards = [(stage, micro) for kind, stage, micro in whole if kind == "B"]
    per_hop = 2 if schedule == "zb-h2" else 1
    warm_up = (v - 1) * (m // max(1, m // p)) + per_hop * (p - 1 - rank)
    delay = per_hop * rank
    actions = forwards[:warm_up]
    for index, (stage, micro) in enumerate(backwards):
        actions += forwards[warm_up + index : warm_up + index + 1]
        actions.append(("I", stage, micro))
        if index >= delay:
            actions.append(("W", *backwards[index - delay]))
    actions += [("W", *which) for which in backwards[max(0, len(backwards) - delay) :]]
    return actions


def _numbered(steps: Iterable[Step]) -> list[Action]:
    """Micro-batches in order for each kind and stage; a W without a stage and without an I falls
    away."""
    count: Counter[tuple[str, int]] = Counter()
    open_inputs: deque[Action] = deque()
    actions: list[Action] = []
    for kind, stage in steps:
        if stage is None:
            if open_inputs:
                actions.append(open_inputs.popleft())
            continue
        micro = count["I" if kind == "B" else kind, stage]
        actions.append((kind, stage, micro))
        if kind == "I":
            open_inputs.append(("W", stage, micro))
        for counted in "IW" if kind == "B" else kind:
            count[counted, stage] += 1
    return actions


def _zb_v(rank: int, p: int, m: int) -> list[Action]:
    """Laid out for at least 2p - 1 micro-batches; those beyond m are left out."""
    laid_out = _numbered(_zb_v_steps(rank, p, max(m, 2 * p - 1)))
    return [action for action in laid_out if action[2] < m]


def _zb_v_steps(rank: int, p: int, m: int) -> Iterator[Step]:
    down, up = rank, 2 * p - 1 - rank  # the two stages of the rank, along the V
    both_up: list[Step] = [("I", up), ("W", up)]
    warm_up = 2 * p - 1 - rank  # forwards of `down` before the steady state
    yield from [("F", down)] * (warm_up - rank)
    yield from [("F", up), ("F", down)] * rank
    yield from [("F", up), *both_up] * (p - rank)
    for index in range(m - p):
        if warm_up + index < m:
            yield ("F", down)
        yield from [("I", down), ("W", down), ("F", up), *both_up]
    yield from [("I", down), ("I", up)] * rank
    yield from [("I", down), ("W", down)] * (p - rank)
    yield from [("W", up)] * rank
    yield from [("W", down)] * rank


def _dualpipe_v(rank: int, p: int, m: int) -> list[Action]:
    return _numbered(_dualpipe_v_steps(rank, p, m))


def _dualpipe_v_steps(rank: int, p: int, m: int) -> Iterator[Step]:
    down, up = rank, 2 * p - 1 - rank
    behind = p - 1 - rank  # ranks between this one and the bottom of the V
    yield from [("F", down)] * (2 * behind)
    yield from [("F", down), ("F", up)] * (rank + 1)
    yield from [("I", up), ("W", None), ("F", up)] * behind
    yield from [("F", down), ("B", up), ("F", up), ("B", down)] * (m - 2 * p + rank + 1)
    yield from [("B", up), ("F", up), ("B", down)] * behind
    whole = (rank + 1) // 2 * 2 if rank % 2 else rank + 1  # backwards before the split ones
    for index in range(2 * (rank + 1)):
        yield ("B" if index < whole else "I", down if index % 2 else up)
    yield from [("W", None), ("I", down)] * behind
    yield from [("W", None)] * (rank + 1)
