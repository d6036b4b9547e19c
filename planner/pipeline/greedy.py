"""Orders by list scheduling: whenever a rank is free it takes the possible action of smallest key.

    key F(i, j) = j per + head(i)
    key I(i, j) = j per + sum of all F + tail(i) - early per
    key W(i, j) = key I(i, j) + late per
    per     = busiest rank's work per micro-batch
    head(i) = sum over h < i of F(h) and transfers;  tail(i) = the same over h > i of I(h)

The keys are when the actions would start in a steady pipeline; `early` favours backwards over
forwards, `late` puts off weight gradients until there is nothing else to do. A rank may also wait,
up to `patience` times its shortest action, for an action that it knows to become possible. F is
possible only while its activation fits beside one of each later stage of its rank: what is begun
can be finished, so that folded stages do not lock each other out. All policies of the grid are
tried; the orders with the shortest makespans are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from ...orders import Orders
from .actions import Pipeline
from .play import FLOATS, INTS, durations_s, floats, ints, loop, orders_of

EARLY = (0.0, 0.5, 2.0)
LATE = (1.0, 2.0, 3.5, 5.0, 8.0)
PATIENCE = (0.0, 0.5, 1.0)


def greedy_orders(
    pipeline: Pipeline, limit: float, expired: Callable[[], bool] = lambda: False
) -> tuple[float, Orders] | None:
    """The shortest makespan of the grid of policies under a memory limit, and its orders.

    None when the limit does not hold one micro-batch on all stages of a rank. `expired` says
    whether a time limit has struck; one policy is always tried.
    """
    schedule = loop(
        schedule_rows,
        f"float64({INTS}, {FLOATS}, {FLOATS}, {INTS}, {FLOATS}, {FLOATS}, {FLOATS}, {FLOATS}, "
        f"{FLOATS}, {INTS})",
    )
    p, m, num_stages = pipeline.num_ranks, pipeline.num_micro_batches, pipeline.num_stages
    reserve = [
        sum(pipeline.activation[j] for j in pipeline.stages_of[rank] if j >= i)
        for i, rank in enumerate(pipeline.rank_of)
    ]
    graph = (
        ints((p, num_stages // p, m)),
        floats(durations_s(pipeline)),
        floats(pipeline.transfers_s),
        ints(stage for stages in pipeline.stages_of for stage in stages),
        floats(pipeline.activation),
        floats(reserve),
    )
    per_s = max(map(pipeline.busy_s, range(p)))
    shortest_s = min((*pipeline.forward_s, *pipeline.input_s, *pipeline.weight_s))
    best_s, best = float("inf"), None
    for early, late, patience in product(EARLY, LATE, PATIENCE):
        keys = floats(_first_keys(pipeline, early * per_s, late * per_s))
        rows = ints([-1] * (3 * num_stages * m))
        end = floats([-1.0] * (3 * num_stages * m))
        policy = floats((per_s, patience * shortest_s, limit + 1e-9))
        makespan_s = float(schedule(*graph, keys, policy, end, rows))
        if makespan_s < best_s * (1 - 1e-9):
            best_s, best = makespan_s, rows
        if expired():
            break
    return None if best is None else (best_s, orders_of(pipeline, best))


def _first_keys(pipeline: Pipeline, early_s: float, late_s: float) -> list[float]:
    """The keys of F, I and W of every stage for micro-batch 0."""
    num_stages = pipeline.num_stages
    hops = [pipeline.hop_s(i, i + 1) for i in range(num_stages - 1)]
    head, tail = [0.0], [0.0]
    for i, hop_s in enumerate(hops):
        head.append(head[-1] + pipeline.forward_s[i] + hop_s)
    for i, hop_s in reversed(list(enumerate(hops))):
        tail.append(tail[-1] + pipeline.input_s[i + 1] + hop_s)
    all_s = head[-1] + pipeline.forward_s[-1] - early_s
    inputs = [all_s + tail_s for tail_s in reversed(tail)]
    return [*head, *inputs, *(key + late_s for key in inputs)]


def schedule_rows(
    sizes: Any,
    duration: Any,
    transfer: Any,
    stages: Any,
    activation: Any,
    reserve: Any,
    keys: Any,
    policy: Any,
    end: Any,
    rows: Any,
) -> float:
    """Fill the rows of all ranks by one policy and give the makespan; infinite when stuck.

    `stages` holds the stages of rank 0, then of rank 1, ...; `keys` those of F, I, W per stage for
    micro-batch 0; `policy` the steady period, the patience in time and the memory limit; `end` -1
    per slot.
    """
    p, per_rank, m = sizes[0], sizes[1], sizes[2]
    num_stages = p * per_rank
    per_s, patience_s, limit = policy[0], policy[1], policy[2]
    width = 3 * per_rank * m
    never = float("inf")
    done = [0] * (3 * num_stages)  # micro-batches scheduled, per kind and stage
    filled = [0] * p
    live = [0.0] * p
    wake = [0.0] * p
    free = [0.0] * p
    rank_of = [0] * num_stages
    for index in range(num_stages):
        rank_of[stages[index]] = index // per_rank
    left = p * width
    while left:
        rank = 0
        for other in range(1, p):
            if wake[other] < wake[rank]:
                rank = other
        now = wake[rank]
        if now == never:
            return never
        chosen, chosen_key, chosen_start, later = -1, never, 0.0, never
        for index in range(rank * per_rank, (rank + 1) * per_rank):
            stage = stages[index]
            for kind in range(3):
                row = kind * num_stages + stage
                micro = done[row]
                if micro == m:
                    continue
                ready = 0.0
                if kind == 0:
                    if live[rank] + reserve[stage] > limit:
                        continue
                    if stage > 0:
                        ready = end[(row - 1) * m + micro]
                elif kind == 1:
                    if stage == num_stages - 1:
                        ready = end[stage * m + micro]
                    else:
                        ready = end[(row + 1) * m + micro]
                else:
                    ready = end[(num_stages + stage) * m + micro]
                if ready < 0.0:
                    continue
                start = max(now, ready + transfer[row * m + micro])
                if start - patience_s > now:
                    later = min(later, start - patience_s)
                    continue
                key = keys[row] + micro * per_s
                if key < chosen_key:
                    chosen, chosen_key, chosen_start = row, key, start
        if chosen < 0:
            wake[rank] = later
            continue
        slot = chosen * m + done[chosen]
        finish = chosen_start + duration[slot]
        end[slot] = finish
        rows[rank * width + filled[rank]] = slot
        done[chosen] += 1
        filled[rank] += 1
        left -= 1
        free[rank] = finish
        wake[rank] = finish
        stage = chosen % num_stages
        kind = chosen // num_stages
        after = -1  # the stage that waits for this action
        if kind == 0:
            live[rank] += activation[stage]
            after = stage + 1 if stage < num_stages - 1 else -1
        elif kind == 1:
            after = stage - 1
        else:
            live[rank] -= activation[stage]
        if after >= 0 and rank_of[after] != rank:
            waiting = rank_of[after]
            if wake[waiting] > free[waiting]:
                arrival = finish + transfer[(chosen + after - stage) * m]
                wake[waiting] = min(wake[waiting], max(free[waiting], arrival - patience_s))
    return max(free)
