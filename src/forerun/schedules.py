"""Pipeline schedules by name: which split backwards, and where each places its stages."""

from __future__ import annotations

from typing import Literal

from .errors import InputError
from .orders import Orders, owners, splits

Schedule = Literal[
    "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "interleaved-zb", "zb-v", "dualpipev"
]
SCHEDULES: tuple[str, ...] = (
    "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "interleaved-zb", "zb-v", "dualpipev"
)  # fmt: skip
SPLIT_SCHEDULES: tuple[str, ...] = SCHEDULES[3:]
"""Those that split the backward pass: gradients of inputs first, of weights later."""
V_SCHEDULES: tuple[str, ...] = ("zb-v", "dualpipev")
"""Those of two chunks per rank, placed in a V."""
LOOPED_SCHEDULES: tuple[str, ...] = ("interleaved", "interleaved-zb")
"""Those of two or more chunks per rank, placed in rounds."""


def rank_of(schedule: str, stage: int, pp: int) -> int:
    """The pipeline rank that runs a stage: folded in a V for `V_SCHEDULES`, else stage mod pp.

    >>> [rank_of("zb-v", stage, 3) for stage in range(6)]
    [0, 1, 2, 2, 1, 0]
    """
    return min(stage, 2 * pp - 1 - stage) if schedule in V_SCHEDULES else stage % pp


def schedule_of(orders: Orders) -> Schedule:
    """The schedule known by name that places stages and splits backwards as these orders do.

    Raises InputError for a placement that no schedule has: stages lie on the ranks in rounds, or
    two per rank in a V.

    >>> schedule_of([[("F", 0, 0), ("I", 0, 0), ("W", 0, 0)], [("F", 1, 0), ("B", 1, 0)]])
    'zb-h1'
    """
    homes, pp = owners(orders), len(orders)
    stages = range(len(homes))
    looped = homes == [rank_of("interleaved", stage, pp) for stage in stages]
    folded = homes == [rank_of("zb-v", stage, pp) for stage in stages] and len(homes) == 2 * pp
    if looped and len(homes) % pp == 0:
        if len(homes) == pp:
            return "zb-h1" if splits(orders) else "1f1b"
        return "interleaved-zb" if splits(orders) else "interleaved"
    if folded:
        return "zb-v"
    raise InputError("orders", f"stages on ranks {homes}", "no placement that can be run",
                     "put stage i on rank i mod pp, or stages r and 2pp-1-r on rank r")  # fmt: skip
