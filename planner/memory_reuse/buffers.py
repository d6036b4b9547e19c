"""Tensors with lifetimes, the arena they share, and checks that need no solver.

A buffer i has size z_i bytes, lives in [l_i, u_i) and starts at a multiple of its alignment g_i.
Offsets o_i are valid when 0 <= o_i, g_i divides o_i, and buffers whose lives meet do not meet in
the arena; the arena is peak = max_i (o_i + z_i).

Lower bound: at every moment the live buffers lie side by side. All offsets are multiples of the
least alignment g, so that every live buffer but the topmost takes its size rounded up to g:

    peak >= max over t of (sum of ceil_g(z_i) - max of (ceil_g(z_i) - z_i))     i live at t

which for g = 1 is max-live, the largest sum of live sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError

Ints = NDArray[np.int64]
LARGEST = 2**62
"""Times and the sum of all sizes stay below it, so that no sum of two overflows 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """Buffers of one arena; every array has shape (n,), n >= 1."""

    ids: tuple[str, ...]
    lower: Ints
    """First moment of life."""
    upper: Ints
    """First moment after it."""
    size_bytes: Ints
    alignment_bytes: Ints
    """Powers of two; 1 where nothing is asked for."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def grain_bytes(self) -> int:
        """The least alignment, which divides every offset."""
        return int(self.alignment_bytes.min())

    @property
    def unit_bytes(self) -> int:
        """A number that divides the peak of every arena whose buffers lie as low as they can."""
        return int(np.gcd.reduce(np.concatenate((self.size_bytes, self.alignment_bytes))))

    @property
    def rounded_bytes(self) -> Ints:
        """Sizes rounded up to the grain."""
        return -(-self.size_bytes // self.grain_bytes) * self.grain_bytes


def make_buffers(
    ids: Sequence[str],
    lower: Sequence[int] | Ints,
    upper: Sequence[int] | Ints,
    size_bytes: Sequence[int] | Ints,
    alignment_bytes: Sequence[int] | Ints | None = None,
    places: Sequence[str] | None = None,
) -> Buffers:
    """Checked buffers; `places` says where each was read, for the messages.

    Raises InputError for no buffers, equal ids, negative or empty lives, sizes below 1, alignments
    that are no powers of two, or sums beyond 64 bits.
    """
    count = len(ids)
    align = [1] * count if alignment_bytes is None else [int(g) for g in alignment_bytes]
    where = list(places) if places is not None else [f"buffer {name}" for name in ids]
    if not count:
        raise InputError("buffers", "(none)", "no buffer to place", "give one row per tensor")
    first: dict[str, str] = {}
    for i, name in enumerate(ids):
        low, up, size = int(lower[i]), int(upper[i]), int(size_bytes[i])
        if name in first:
            raise InputError("id", name, f"{where[i]} has the id of {first[name]}",
                             "give every buffer an id of its own")  # fmt: skip
        first[name] = where[i]
        if low < 0:
            raise InputError("lower", low, f"{where[i]}: a life starts at 0 or later",
                             "shift all times by the same amount")  # fmt: skip
        if up <= low:
            raise InputError("upper", up, f"{where[i]}: not after lower={low}",
                             "a life is [lower, upper): leave out what never lives")  # fmt: skip
        if size < 1:
            raise InputError("size", size, f"{where[i]}: not a positive number of bytes",
                             "leave out tensors without elements")  # fmt: skip
        if align[i] < 1 or align[i] & (align[i] - 1):
            raise InputError("alignment", align[i], f"{where[i]}: not a power of two",
                             "write 1, 2, 4, ... 512")  # fmt: skip
        if up >= LARGEST:
            raise InputError("upper", up, f"{where[i]}: beyond {LARGEST}",
                             "count moments, not ticks of a clock")  # fmt: skip
    total = sum(int(size_bytes[i]) + align[i] for i in range(count))
    if total >= LARGEST:
        raise InputError("size", total, f"all sizes together are beyond {LARGEST}",
                         "give bytes")  # fmt: skip
    return Buffers(
        ids=tuple(ids),
        lower=np.array(lower, dtype=np.int64),
        upper=np.array(upper, dtype=np.int64),
        size_bytes=np.array(size_bytes, dtype=np.int64),
        alignment_bytes=np.array(align, dtype=np.int64),
    )


def live_bytes(lower: Ints, upper: Ints, size_bytes: Ints) -> Ints:
    """Sum of live sizes at each distinct moment where something starts or ends, in their order."""
    moments, place = np.unique(np.concatenate((lower, upper)), return_inverse=True)
    change = np.zeros(len(moments), dtype=np.int64)
    np.add.at(change, place, np.concatenate((size_bytes, -size_bytes)))
    return np.cumsum(change)


def max_live_bytes(buffers: Buffers) -> int:
    """The largest sum of live sizes.

    >>> max_live_bytes(make_buffers(["a", "b", "c"], [0, 1, 2], [2, 3, 4], [10, 20, 5]))
    30
    """
    return int(live_bytes(buffers.lower, buffers.upper, buffers.size_bytes).max())


def peak_bytes(buffers: Buffers, offsets: Ints) -> int:
    """The arena that these offsets need."""
    return int((offsets + buffers.size_bytes).max())


def check_offsets(buffers: Buffers, offsets: Ints) -> str | None:
    """What is wrong with offsets, or None: signs, alignment, and every pair of buffers.

    >>> pair = make_buffers(["a", "b"], [0, 1], [2, 3], [10, 20])
    >>> check_offsets(pair, np.array([0, 9]))
    'a and b share bytes 9 to 10 while both live'
    >>> check_offsets(pair, np.array([0, 10])) is None
    True
    """
    if len(offsets) != len(buffers):
        return f"{len(offsets)} offsets for {len(buffers)} buffers"
    wrong = (offsets < 0) | (offsets % buffers.alignment_bytes != 0)
    if wrong.any():
        i = int(np.argmax(wrong))
        return f"{buffers.ids[i]} at {offsets[i]}: negative or not aligned"
    tops = offsets + buffers.size_bytes
    order = np.argsort(buffers.lower, kind="stable")
    low, up, off, top = (x[order] for x in (buffers.lower, buffers.upper, offsets, tops))
    ends = np.searchsorted(low, up, side="left")  # those after it that start before it ends
    for i in range(len(order)):
        others = slice(i + 1, int(ends[i]))
        clash = (off[others] < top[i]) & (top[others] > off[i])
        if clash.any():
            j = i + 1 + int(np.argmax(clash))
            first, last = max(off[i], off[j]), min(top[i], top[j])
            names = (buffers.ids[order[i]], buffers.ids[order[j]])
            return f"{names[0]} and {names[1]} share bytes {first} to {last} while both live"
    return None


def offsets_by_id(buffers: Buffers, offsets: Ints) -> Mapping[str, int]:
    """Offset of every buffer, in the order of the input."""
    return {name: int(offset) for name, offset in zip(buffers.ids, offsets, strict=True)}
