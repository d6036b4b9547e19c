"""Sections of time: the largest sets of buffers that live together.

Walking through time, a section is the live set just before an end that follows a start: every other
live set is part of one of these. Buffer i is in the sections [first_i, last_i) and in no other, and
two buffers live together exactly when these ranges meet, so that sections replace time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .buffers import Buffers, Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Sections:
    """Buffers by the sections they live in; sorted by first section, then by the input's order."""

    order: Ints
    """(n,) index in `Buffers` of every row below."""
    first: Ints
    last: Ints
    """(n,) section ranges [first, last), `first` ascending."""
    size_bytes: Ints
    rounded_bytes: Ints
    alignment_bytes: Ints
    """(n,) of the buffers, in this order."""
    total_bytes: Ints
    """(S,) sum of rounded sizes of a section."""
    slack_bytes: Ints
    """(S,) most that the topmost buffer of a section needs less than its rounded size."""
    cuts: Ints
    """(S,) buffers that live in this section and in the next."""
    member_start: Ints
    """(S + 1,) where the members of a section start in `members`."""
    members: Ints
    """Rows of each section, ascending."""

    @property
    def lower_bound_bytes(self) -> int:
        """The bound of the module `buffers`."""
        return int((self.total_bytes - self.slack_bytes).max())


def sections_of(buffers: Buffers) -> Sections:
    """The sections of some buffers; memory grows with the sum over sections of their members."""
    first, last = section_ranges(buffers)
    order = np.argsort(first, kind="stable").astype(np.int64)
    first, last = first[order], last[order]
    size = buffers.size_bytes[order]
    rounded = buffers.rounded_bytes[order]
    count = int(last.max())
    total = np.zeros(count + 1, dtype=np.int64)
    np.add.at(total, first, rounded)
    np.subtract.at(total, last, rounded)
    cuts = np.zeros(count + 1, dtype=np.int64)
    np.add.at(cuts, first, 1)
    np.subtract.at(cuts, last - 1, 1)
    lengths = last - first
    rows = np.repeat(np.arange(len(buffers), dtype=np.int64), lengths)
    starts = np.repeat(first - np.concatenate(([0], np.cumsum(lengths)[:-1])), lengths)
    section = np.arange(len(rows), dtype=np.int64) + starts
    by_section = np.argsort(section, kind="stable")
    member_start = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(section, minlength=count), out=member_start[1:])
    slack = np.zeros(count, dtype=np.int64)
    np.maximum.at(slack, section, (rounded - size)[rows])
    return Sections(
        order=order,
        first=first,
        last=last,
        size_bytes=size,
        rounded_bytes=rounded,
        alignment_bytes=buffers.alignment_bytes[order],
        total_bytes=np.cumsum(total)[:-1],
        slack_bytes=slack,
        cuts=np.cumsum(cuts)[:-1],
        member_start=member_start,
        members=rows[by_section],
    )


def section_ranges(buffers: Buffers) -> tuple[Ints, Ints]:
    """First section of every buffer and the one after its last, shapes (n,).

    >>> from .buffers import make_buffers
    >>> three = make_buffers(["a", "b", "c"], [0, 1, 4], [3, 5, 6], [1, 1, 1])
    >>> [ranges.tolist() for ranges in section_ranges(three)]
    [[0, 0, 1], [1, 2, 2]]
    """
    starts, ends = np.unique(buffers.lower), np.unique(buffers.upper)
    # An end closes a section when a start lies between the end before it and itself.
    started = np.searchsorted(starts, ends, side="left")
    closes = ends[np.diff(started, prepend=0) > 0]
    first = np.searchsorted(closes, buffers.lower, side="right")
    last = np.searchsorted(closes, buffers.upper, side="right")
    return first.astype(np.int64), last.astype(np.int64)


def num_memberships(buffers: Buffers) -> int:
    """Sum over sections of their members: what `sections_of` keeps in memory."""
    first, last = section_ranges(buffers)
    return int((last - first).sum())


def range_maxima(values: Ints, first: Ints, last: Ints) -> Ints:
    """max(values[first:last]) of many non-empty ranges, by doubling.

    >>> range_maxima(np.array([3, 1, 4, 1, 5]), np.array([0, 1, 3]), np.array([2, 4, 5])).tolist()
    [3, 4, 5]
    """
    levels = [values]
    while 2 ** len(levels) <= len(values):
        half = 2 ** (len(levels) - 1)
        levels.append(np.maximum(levels[-1][:-half], levels[-1][half:]))
    level = np.frexp((last - first).astype(np.float64))[1] - 1
    found = np.empty(len(first), dtype=np.int64)
    for index, maxima in enumerate(levels):
        chosen = level == index
        span = 2**index
        found[chosen] = np.maximum(maxima[first[chosen]], maxima[last[chosen] - span])
    return found
