"""Lengths: how long documents are, as a distribution, and those of each step of a job.

Lengths of a step depend on (seed, step, index) alone, never on the layout, so that what is predicted
and what is trained on are the same, on any number of ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from random import Random
from typing import ClassVar

from .document import Document
from .errors import InputError

SAMPLES = 1024
"""Places at which means over a part of the sequences are taken; more than any number of buckets."""
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
        """Ends of the documents that fill sequence `index` of a step; the last one is cut to fit."""
        random = Random(f"{seed}:{step}:{index}")
        ends: list[int] = []
        total = 0
        while total < seq_tokens:
            total = min(seq_tokens, total + self.at(random.random()))
            ends.append(total)
        return tuple(ends)

    def drawn(
        self, longest: int, seed: int, step: int, count: int, buckets: int = 1
    ) -> tuple[int, ...]:
        """Lengths of the sequences of a step, in tokens, none above `longest`.

        Of one bucket `count` sequences. Of several, each a part of equal share of the sequences
        sorted by length, a step draws from one: as many as have the tokens of `count` in the mean,
        and buckets in proportion to 1 / that number, so that each sequence is as likely as others.
        """
        random = Random(f"{seed}:{step}")
        low, high = 0.0, 1.0
        if buckets > 1:
            sizes = self._batch_sizes(longest, count, buckets)
            bucket = random.choices(range(buckets), [1 / size for size in sizes])[0]
            low, high, count = bucket / buckets, (bucket + 1) / buckets, sizes[bucket]
        fractions = (low + (high - low) * random.random() for _ in range(count))
        return tuple(min(longest, self.at(fraction)) for fraction in fractions)

    def _batch_sizes(self, longest: int, count: int, buckets: int) -> list[int]:
        """Sequences of a step of each bucket: equal tokens."""
        places = [(i + 0.5) / SAMPLES for i in range(SAMPLES)]
        lengths = [min(longest, self.at(place)) for place in places]
        tokens = count * sum(lengths) / SAMPLES
        means: list[float] = []
        for bucket in range(buckets):
            own = [n for p, n in zip(places, lengths, strict=True) if int(p * buckets) == bucket]
            means.append(sum(own) / len(own))
        return [max(1, round(tokens / mean)) for mean in means]
