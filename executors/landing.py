"""Where fetched activations land: rounding buffers, laid out by the memory solver.

A layer's tensors are fetched while the backward of the layer behind it runs, and stay until its own
backward is over. So the buffers of two neighbours live at once, those of any others do not. The
arena for all layers of a stage is the smallest that the solver of `planner/memory_reuse` finds for
these lives; within a layer tensors lie side by side, because all of them live at once. Parts of the
arena that no buffer straddles are allocated each when it is first needed, and let go when no layer
that is still to come uses it: for equal layers these are two buffers, used in turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..planner.memory_reuse import make_buffers, solve

ALIGNMENT_BYTES = 512
SOLVER_S = 2.0


@dataclass(slots=True, kw_only=True)
class Segment:
    """A part of the arena that is allocated as a whole."""

    start: int
    num_bytes: int
    users: tuple[int, ...]
    """Layers with buffers in it."""
    memory: Tensor | None = None


@dataclass(slots=True)
class Landing:
    """The buffers of a stage's layers, by the layers' numbers."""

    device: torch.device
    sizes: dict[int, int] = field(default_factory=dict)
    """Bytes of every layer's buffer, as far as they are known."""
    offsets: dict[int, int] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    arena_bytes: int = 0
    lower_bound_bytes: int = 0

    def plan(self) -> None:
        """Lay out the buffers for a backward from the highest number to the lowest."""
        sizes = self.sizes
        order = sorted((index for index, size in sizes.items() if size), reverse=True)
        if not order:
            return
        found = solve(
            make_buffers(
                [str(index) for index in order],
                [max(0, moment - 1) for moment in range(len(order))],
                [moment + 1 for moment in range(len(order))],
                [sizes[index] for index in order],
                [ALIGNMENT_BYTES] * len(order),
            ),
            time_limit_s=SOLVER_S,
        )
        self.arena_bytes, self.lower_bound_bytes = found.peak_bytes, found.lower_bound_bytes
        self.offsets = dict(zip(order, map(int, found.offsets), strict=True))
        self.segments = _segments(self.offsets, sizes)

    def buffer(self, index: int, num_bytes: int) -> Tensor:
        """The bytes of a layer's buffer; its segment is allocated if it is not there."""
        offset = self.offsets[index]
        segment = next(s for s in self.segments if s.start <= offset < s.start + s.num_bytes)
        if segment.memory is None:
            segment.memory = torch.empty(segment.num_bytes, dtype=torch.uint8, device=self.device)
        start = offset - segment.start
        return segment.memory[start : start + num_bytes]

    def release(self, index: int) -> None:
        """Let go of segments that no layer in front of this one uses; buffers in use live on."""
        for segment in self.segments:
            if min(segment.users) >= index:
                segment.memory = None


def _segments(offsets: Mapping[int, int], sizes: Mapping[int, int]) -> list[Segment]:
    """The finest division of the arena that cuts no buffer."""
    segments: list[Segment] = []
    for index in sorted(offsets, key=lambda i: (offsets[i], sizes[i])):
        start, end = offsets[index], offsets[index] + sizes[index]
        last = segments[-1] if segments else None
        if last is None or start >= last.start + last.num_bytes:
            segments.append(Segment(start=start, num_bytes=end - start, users=(index,)))
        else:
            last.num_bytes = max(last.num_bytes, end - last.start)
            last.users = (*last.users, index)
    return segments
