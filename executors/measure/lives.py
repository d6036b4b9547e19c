"""The lives of a counted step's tensors, and how much memory different allocators need for them."""

from __future__ import annotations

from collections.abc import Sequence

from ...planner.memory_reuse import Buffers, caching_allocator, make_buffers, max_live_bytes, solve
from .memory import LiveTensors, Record

ROUND_BYTES = 512
SOLVER_S = 20.0


def lives(log: Sequence[tuple[Record, int]]) -> Buffers | None:
    """The storages that a log of a step saw come and go, in units of 512 bytes; None without any.

    Times count the log's entries. What was there before the step, or outlives it, is no part: it
    lies beside the others whatever the allocator.
    """
    born: dict[int, tuple[int, int]] = {}
    sizes: dict[int, int] = {}
    rows: list[tuple[int, int, int]] = []
    for moment, (record, change) in enumerate(log):
        if record.found and record.lasting:
            continue
        if id(record) in born:
            start, size = born.pop(id(record))
            rows.append((start, moment, size))
        sizes[id(record)] = sizes.get(id(record), 0) + change
        whole = -(-sizes[id(record)] // ROUND_BYTES) * ROUND_BYTES
        if whole > 0:
            born[id(record)] = (moment, whole)
    if not rows:
        return None
    lower, upper, size = zip(*rows, strict=True)
    names = [str(index) for index in range(len(rows))]
    return make_buffers(names, lower, upper, size, [ROUND_BYTES] * len(rows))


def needs(live: LiveTensors) -> dict[str, float]:
    """Bytes that allocators need for one step's lives.

    `max_live`: all that lives at once; `static_plan`: the arena of solved offsets; `caching`: what
    a model of the caching allocator reserves.
    """
    buffers = lives(live.log)
    if buffers is None:
        return {}
    plan = solve(buffers, time_limit_s=SOLVER_S)
    return {
        "max_live_bytes": float(max_live_bytes(buffers)),
        "static_plan_bytes": float(plan.peak_bytes),
        "caching_bytes": float(caching_allocator(buffers).reserved_bytes),
        "tensors": float(len(buffers)),
    }
