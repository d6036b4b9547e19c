"""Which layers every pipeline stage of one layout holds.

    sets         ranks r of the pipeline, ways w of a rank: the layers of earlier ranks, its own
    variables    one way per rank, each beginning where the one before ends
    minimise     the largest chain of actions through a rank     (costmodel/cuts.py)
    subject to   peak_r(w) <= capacity, its layers keeping what takes the least time

Solved by dynamic programming over (ranks, layers). What layers keep is chosen fractionally here and
in whole layers afterwards (`mixing.py`). Chunks of a rank are as even as can be. Where memory is
optimised the largest peak is minimised instead. The cut as even as can be is taken unless the other
one gains enough by the chains of its own stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..costmodel.cuts import Ways, held_by, makespan_s, ways_of
from ..costmodel.fleet import Fleet
from ..plan import even_sizes
from ..schedules import SCHEDULES, rank_of
from .pipeline.cut import least_largest

FURTHER = 2.0
"""Layers of a rank that are looked at first, relative to an even share."""
WORTH = 2e-3
"""Part of the makespan that an uneven cut must gain: below it the even one is taken."""


def best_cuts(fleet: Fleet, *, least_memory: bool = False) -> list[tuple[int, ...] | None]:
    """Layers of every stage of the only layout of a fleet: under the best cut, then, or only, under
    the one as even as can be (None)."""
    layout, model = fleet.layouts, fleet.model
    p, v, total = int(layout.pp[0]), int(layout.vpp[0]), model.num_layers
    largest = total - (p - 1) * v
    share = max(int(np.ceil(FURTHER * total / p)), v + 1)
    for most in dict.fromkeys((min(share, largest), largest)):
        ways = ways_of(fleet, most)
        value = ways.share if least_memory else ways.chain_s
        work = ways.share if least_memory else ways.work_s
        largest_of, total_of = (_tables(ways, x, p, total) for x in (value, work**2))
        firsts = least_largest(list(largest_of), list(total_of))[1]
        if not firsts:
            continue
        held = np.diff([*firsts, total])
        cut = _stage_sizes(held, v, SCHEDULES[int(layout.schedule[0])], _head_layers(fleet))
        even = even_sizes(total, p * v)
        if not least_memory:
            extra_s = _tables(ways, ways.extra_s, p, total)
            values = [makespan_s(fleet, x, _of_ranks(extra_s, held_by(fleet, x)))
                      for x in (cut, even)]  # fmt: skip
            if values[1] <= values[0] * (1 + WORTH):
                return [None]
        return [cut, None]
    return [None]


def _of_ranks(table: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The values of ranks with so many layers each."""
    ends = np.cumsum(held)
    return table[np.arange(len(held)), ends - held, ends]


def _tables(ways: Ways, values: np.ndarray, p: int, total: int) -> np.ndarray:
    tables = np.full((p, total + 1, total + 1), np.inf)
    tables[ways.rank, ways.first, ways.stop] = values
    return tables


def _head_layers(fleet: Fleet) -> float:
    """The head's time over that of a layer, on the last pool."""
    both = fleet.grids[-1].seconds(np.zeros(1, dtype=np.intp)).both[:, 0]
    return float(both[-1] / both[-2])


def _stage_sizes(
    held: Sequence[int] | np.ndarray, v: int, schedule: str, head_layers: float
) -> tuple[int, ...]:
    """Layers of every stage, those of a rank shared out evenly, its first chunks larger; the head,
    which is as long as `head_layers`, counts as layers of the last stage.

    >>> _stage_sizes([5, 6], 2, "interleaved", 2.0), _stage_sizes([5, 4], 2, "zb-v", 1.0)
    ((3, 4, 2, 2), (3, 2, 2, 2))
    """
    p = len(held)
    stages: list[list[int]] = [[] for _ in range(p)]
    for stage in range(p * v):
        stages[rank_of(schedule, stage, p)].append(stage)
    sizes = [1] * (p * v)
    for rank, own in enumerate(stages):
        for _ in range(int(held[rank]) - v):
            lengths = [sizes[stage] + head_layers * (stage == p * v - 1) for stage in own]
            sizes[own[int(np.argmin(lengths))]] += 1
    return tuple(sizes)
