"""The answer of the solvers of this package: which ranks work through which sequences, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Sequences that an aligned block of ranks works through together, packed one after another."""

    start: int
    """First rank of the block, a multiple of `degree`."""
    degree: int
    kind: str
    """How the block cuts a sequence: none, ring, ulysses."""
    sequences: tuple[int, ...]
    """Indices into the lengths."""
    seconds: float

    @property
    def ranks(self) -> range:
        """The ranks of the block."""
        return range(self.start, self.start + self.degree)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Passes between two meetings of all ranks.

    With barriers each rank has one pass at most; without, there is one micro-batch and a rank goes
    through its passes in the order of `groups`, which all ranks share.
    """

    groups: tuple[Pass, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Every sequence on its ranks, checked, with bounds of what is possible."""

    num_ranks: int
    barriers: bool
    micro_batches: tuple[MicroBatch, ...]
    lower_bound_s: float
    """No assignment of these sequences, into any micro-batches, takes less."""
    cut_bound_s: float
    """None takes less with the same sequences in each micro-batch."""
    limit: Literal["time"] | None = None
    """What ended the search before its own end."""

    @property
    def makespan_s(self) -> float:
        """Sum over the micro-batches."""
        return sum(batch.seconds for batch in self.micro_batches)

    @property
    def gap(self) -> float:
        """makespan / lower bound - 1."""
        return _over(self.makespan_s, self.lower_bound_s)

    @property
    def cut_gap(self) -> float:
        """makespan / bound with these micro-batches - 1."""
        return _over(self.makespan_s, self.cut_bound_s)


def _over(value: float, bound: float) -> float:
    return max(0.0, value / bound - 1) if bound > 0 else 0.0
