"""What a caching allocator reserves for the same lives: the figure that a static plan is held
against.

A model of the policy of PyTorch's CUDA allocator, without devices: sizes are rounded up to 512
bytes; requests of up to 1 MiB share segments of 2 MiB, those below 10 MiB segments of 20 MiB,
larger ones get a segment of their own, rounded up to 2 MiB. A request takes the smallest free block
that is large enough, of its own pool, and splits it where what is left is worth keeping: 512 bytes
in the small pool, more than 1 MiB in the large one. Freed blocks merge with free neighbours of
their segment; segments are never given back. The constants are assumed: written from knowledge of
the allocator, not read from its source.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from .buffers import Buffers, max_live_bytes

ROUND_BYTES = 512
SMALL_BYTES = 2**20
SMALL_SEGMENT_BYTES = 2 * 2**20
LARGE_SEGMENT_BYTES = 20 * 2**20
OWN_SEGMENT_BYTES = 10 * 2**20
OWN_ROUND_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """Peaks of a caching allocator."""

    reserved_bytes: int
    max_live_bytes: int

    @property
    def fragmentation(self) -> float:
        """Part of what is reserved that no tensor needs at the peak: 1 - live / reserved.

        >>> Reserved(reserved_bytes=100, max_live_bytes=80).fragmentation
        0.2
        """
        return round(1.0 - self.max_live_bytes / self.reserved_bytes, 12)


@dataclass(slots=True, eq=False)
class _Block:
    segment: int
    start: int
    size: int
    before: _Block | None = None
    behind: _Block | None = None
    free: bool = False


class _Pool:
    """Free blocks of small or of large requests, by size and place."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.free: list[tuple[int, int, int]] = []
        self.blocks: dict[tuple[int, int], _Block] = {}

    def keep(self, block: _Block) -> None:
        block.free = True
        insort(self.free, (block.size, block.segment, block.start))
        self.blocks[block.segment, block.start] = block

    def drop(self, block: _Block) -> None:
        block.free = False
        del self.free[bisect_left(self.free, (block.size, block.segment, block.start))]
        del self.blocks[block.segment, block.start]

    def best(self, size: int) -> _Block | None:
        at = bisect_left(self.free, (size, -1, -1))
        if at == len(self.free):
            return None
        _, segment, start = self.free[at]
        return self.blocks[segment, start]

    def splits(self, left: int) -> bool:
        return left >= ROUND_BYTES if self.small else left > SMALL_BYTES


def caching_allocator(buffers: Buffers) -> Reserved:
    """What the allocator has reserved in the end, all lives played in their order.

    At one moment deaths come before births.

    >>> from .buffers import make_buffers
    >>> caching_allocator(make_buffers(["a", "b"], [0, 1], [2, 3], [512, 512])).reserved_bytes
    2097152
    """
    pools = {True: _Pool(True), False: _Pool(False)}
    events = sorted(
        [(int(moment), 1, i) for i, moment in enumerate(buffers.lower)]
        + [(int(moment), 0, i) for i, moment in enumerate(buffers.upper)]
    )
    held: dict[int, _Block] = {}
    reserved = segments = 0
    for _, is_birth, index in events:
        size = -(-int(buffers.size_bytes[index]) // ROUND_BYTES) * ROUND_BYTES
        pool = pools[size <= SMALL_BYTES]
        if not is_birth:
            _give_back(pool, held.pop(index))
            continue
        block = pool.best(size)
        if block is None:
            block = _Block(segment=segments, start=0, size=_segment_bytes(size))
            segments, reserved = segments + 1, reserved + block.size
        else:
            pool.drop(block)
        if pool.splits(block.size - size):
            rest = _Block(
                segment=block.segment, start=block.start + size, size=block.size - size,
                before=block, behind=block.behind,
            )  # fmt: skip
            if block.behind is not None:
                block.behind.before = rest
            block.size, block.behind = size, rest
            pool.keep(rest)
        held[index] = block
    return Reserved(reserved_bytes=reserved, max_live_bytes=max_live_bytes(buffers))


def _segment_bytes(size: int) -> int:
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return int(np.ceil(size / OWN_ROUND_BYTES)) * OWN_ROUND_BYTES


def _give_back(pool: _Pool, block: _Block) -> None:
    """Free a block, merged with its free neighbours."""
    for other in (block.before, block.behind):
        if other is None or not other.free:
            continue
        pool.drop(other)
        first, last = (other, block) if other is block.before else (block, other)
        merged = _Block(
            segment=first.segment, start=first.start, size=first.size + last.size,
            before=first.before, behind=last.behind,
        )  # fmt: skip
        if merged.before is not None:
            merged.before.behind = merged
        if merged.behind is not None:
            merged.behind.before = merged
        block = merged
    pool.keep(block)
