"""What the solver of pipeline schedules answers, and its JSON document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ...orders import Orders, order_texts
from .actions import Pipeline
from .fixed import Fixed

EQUAL = 1e-9
"""Relative difference below which two times or amounts of memory are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The best orders found, and how good they are."""

    pipeline: Pipeline
    placement: str
    """one: a stage per rank; looped, v: two chunks per rank."""
    orders: Orders
    makespan_s: float
    peak_activations: tuple[float, ...]
    """Per rank, in units of one full stage."""
    memory_limit: float
    lower_bound_s: float
    """Of any orders on any placement that was allowed."""
    builtin: tuple[Fixed, ...]
    """The schedules known by name on the same durations, whether they fit the limit or not."""
    method: str
    """Where the orders come from."""
    stop: Literal["moves", "time"] | None
    """What ended the search before the bound was met."""
    moves: int
    seconds: float

    @property
    def gap(self) -> float:
        """How far a better makespan could be below, as a fraction of the bound."""
        return max(0.0, self.makespan_s / self.lower_bound_s - 1)

    @property
    def bubble(self) -> float:
        """The idle share of the busiest rank."""
        pipeline = self.pipeline
        busiest_s = max(map(pipeline.busy_s, range(pipeline.num_ranks)))
        return max(0.0, 1 - pipeline.num_micro_batches * busiest_s / self.makespan_s)

    def document(self) -> dict[str, Any]:
        """The JSON document of `forerun solve pipeline`."""
        pipeline = self.pipeline
        stages = zip(
            pipeline.rank_of, pipeline.forward_s, pipeline.input_s, pipeline.weight_s,
            pipeline.activation, strict=True,
        )  # fmt: skip
        names = ("rank", "forward", "backward_input", "backward_weight", "activation")
        return {
            "makespan": self.makespan_s,
            "bubble": self.bubble,
            "peak_activations": list(self.peak_activations),
            "orders": order_texts(self.orders),
            "builtin": {
                known.name: known.makespan_s if self.fits(known) else None for known in self.builtin
            },
            "builtin_without_limit": {
                known.name: {"makespan": known.makespan_s, "peak_activations": known.peak}
                for known in self.builtin
            },
            "lower_bound": self.lower_bound_s,
            "gap": self.gap,
            "method": self.method,
            "limit": self.stop,
            "memory_limit": self.memory_limit,
            "chunks": pipeline.num_stages // pipeline.num_ranks,
            "placement": self.placement,
            "stages": [dict(zip(names, stage, strict=True)) for stage in stages],
            "moves": self.moves,
            "seconds": self.seconds,
        }

    def fits(self, known: Fixed) -> bool:
        """Whether a schedule known by name keeps the memory limit."""
        return known.peak <= self.memory_limit * (1 + EQUAL)
