"""Lengths: how long documents are, as a distribution, and those packed into each sequence of a job.

They depend on (seed, step, index) alone, never on the layout, so that what is predicted and what is
trained on are the same, on any number of ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from random import Random
from typing import ClassVar

from .document import Document
from .errors import InputError

MOST_QUANTILES = 1001
"""Of a distribution made from a list of lengths."""


class Lengths(Document, frozen=True, kw_only=True):
    """A distribution of sequence lengths by its quantiles."""

    SCHEMA: ClassVar[str] = "forerun.lengths/1"

    schema: str = "forerun.lengths/1"
    name: str
    unit: str = "tokens"
    sequences: int
    mean: float
    quantiles: tuple[float, ...]
    """Fractions of the sequences, increasing, from 0 to 1."""
    lengths: tuple[int, ...]
    """The length at each quantile; between two, lengths are spread evenly."""
    source: str

    def __post_init__(self) -> None:
        rising = list(self.quantiles) == sorted(set(self.quantiles))
        if len(self.quantiles) < 2 or not rising or self.quantiles[0] or self.quantiles[-1] != 1:
            raise InputError("quantiles", f"{len(self.quantiles)} values",
                             "do not rise from 0 to 1", "write 0, ..., 1")  # fmt: skip
        if len(self.lengths) != len(self.quantiles) or list(self.lengths) != sorted(self.lengths):
            raise InputError("lengths", f"{len(self.lengths)} values",
                             f"are not one per quantile ({len(self.quantiles)}), ascending",
                             "give the length at each quantile")  # fmt: skip
        if self.lengths[0] < 1:
            raise InputError("lengths", self.lengths[0], "not positive", "give 1 token or more")

    @staticmethod
    def of(name: str, lengths: Sequence[int], source: str) -> Lengths:
        """The distribution of a list of lengths.

        >>> Lengths.of("three", [4, 2, 9], "typed in").lengths
        (2, 4, 9)
        """
        if not lengths:
            raise InputError("lengths", name, "no lengths", "give one or more")
        ordered = sorted(lengths)
        if len(ordered) == 1:
            ordered *= 2
        last = len(ordered) - 1
        count = min(len(ordered), MOST_QUANTILES)
        at = [round(i * last / (count - 1)) for i in range(count)]
        return Lengths(
            name=name,
            sequences=len(lengths),
            mean=sum(lengths) / len(lengths),
            quantiles=tuple(i / last for i in at),
            lengths=tuple(ordered[i] for i in at),
            source=source,
        )

    def at(self, fraction: float) -> int:
        """The length that a fraction (0 to 1) of the sequences is not longer than.

        >>> Lengths.of("two", [10, 20], "typed in").at(0.5)
        15
        """
        above = min(bisect_right(self.quantiles, fraction), len(self.quantiles) - 1)
        low, high = self.quantiles[above - 1], self.quantiles[above]
        share = (fraction - low) / (high - low)
        return round(
            self.lengths[above - 1] + share * (self.lengths[above] - self.lengths[above - 1])
        )

    def packed(self, seq_tokens: int, seed: int, step: int, index: int) -> tuple[int, ...]:
        """Ends of the documents that fill sequence `index` of a step, the last one cut to fit."""
        random = Random(f"{seed}:{step}:{index}")
        ends: list[int] = []
        total = 0
        while total < seq_tokens:
            total = min(seq_tokens, total + self.at(random.random()))
            ends.append(total)
        return tuple(ends)
