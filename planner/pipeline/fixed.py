"""The schedules that torch's pipelining has built in, and the zero-bubble ones known by name.

Each is a pair of a pipeline (how many chunks per rank and where they lie) and orders on it. From
durations per rank or per chunk all of them can be played against each other: a stage of a schedule
with one chunk per rank is two neighbouring chunks of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...costmodel import schedule, zero_bubble
from ...orders import Orders
from .actions import Pipeline
from .check import peak_activation
from .play import makespan_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A schedule known by name: its chunks per rank, its placement, its name in the cost model."""

    chunks: int
    folded: bool
    orders_of: Callable[[int, int], Orders | None]
    """From ranks and micro-batches; None when it does not exist for them."""


def _whole(name: str, chunks: int) -> Kind:
    def orders_of(p: int, m: int) -> Orders | None:
        if chunks > 1 and m % max(1, m // p):
            return None
        return schedule.orders(name, p, chunks, m)

    return Kind(chunks=chunks, folded=False, orders_of=orders_of)


def _split(name: str, chunks: int) -> Kind:
    def orders_of(p: int, m: int) -> Orders | None:
        if zero_bubble.not_possible(name, p, chunks, m):
            return None
        return zero_bubble.split_orders(name, p, chunks, m)

    return Kind(chunks=chunks, folded=name in zero_bubble.V_SCHEDULES, orders_of=orders_of)


def _breadth_first(p: int, m: int) -> Orders:
    """All forwards of a chunk, then of the next; backwards in the same way from the last."""
    return [
        [("F", stage, micro) for stage in (rank, p + rank) for micro in range(m)]
        + [("B", stage, micro) for stage in (p + rank, rank) for micro in reversed(range(m))]
        for rank in range(p)
    ]


KINDS: dict[str, Kind] = {
    "GPipe": _whole("gpipe", 1),
    "1F1B": _whole("1f1b", 1),
    "ZB-H1": _split("zb-h1", 1),
    "ZB-H2": _split("zb-h2", 1),
    "LoopedBFS": Kind(chunks=2, folded=False, orders_of=_breadth_first),
    "Interleaved1F1B": _whole("interleaved", 2),
    "InterleavedZeroBubble": _split("interleaved-zb", 2),
    "ZBVZeroBubble": _split("zb-v", 2),
    "DualPipeV": _split("dualpipev", 2),
}
"""By torch's name; the two ZB-H are those of the paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """A schedule known by name, played."""

    name: str
    pipeline: Pipeline
    orders: Orders
    makespan_s: float
    peak: float
    """Activations kept by the fullest rank."""


def fixed_schedules(pipelines: dict[tuple[int, bool], Pipeline]) -> list[Fixed]:
    """The schedules that exist for pipelines given by (chunks per rank, folded)."""
    found: list[Fixed] = []
    for name, kind in KINDS.items():
        pipeline = pipelines.get((kind.chunks, kind.folded))
        if pipeline is None:
            continue
        orders = kind.orders_of(pipeline.num_ranks, pipeline.num_micro_batches)
        if orders is None:
            continue
        found.append(
            Fixed(
                name=name,
                pipeline=pipeline,
                orders=orders,
                makespan_s=makespan_s(pipeline, orders),
                peak=max(peak_activation(pipeline, actions) for actions in orders),
            )
        )
    return found
