"""Lives of tensors as training makes them: made-up traces for tests and benchmarks.

Four kinds. `equal_layers`: forward and backward of equal transformer layers, a few tensors kept per
layer and many transient ones. `unequal_layers`: the same with layers of different widths.
`pipeline`: one stage of a 1F1B pipeline whose micro-batches differ in length, so that lives of
different sizes interleave. `random_lives`: lives and sizes at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .buffers import Buffers, make_buffers

KEPT = (1.0, 1.0, 3.0, 1.0, 1.0, 4.0, 4.0)
"""Sizes of what a layer keeps for its backward, in units of its input."""
FORWARD = (1.0, 0.0625, 3.0, 1.0, 2.0, 0.0625, 1.0, 4.0, 4.0, 0.125, 1.0, 1.0, 0.5, 2.0, 1.0)
"""Sizes of what lives inside one forward of a layer."""
BACKWARD = (1.0, 4.0, 4.0, 1.0, 0.0625, 3.0, 1.0, 2.0, 1.0, 0.125, 4.0, 1.0, 3.0, 1.0, 0.5, 1.0)
"""Sizes of what lives inside one backward of a layer."""


@dataclass(slots=True)
class Recorder:
    """Lives in the order in which they were opened; every event is one moment."""

    moment: int = 0
    lower: list[int] = field(default_factory=list)
    upper: list[int] = field(default_factory=list)
    size_bytes: list[int] = field(default_factory=list)

    def open(self, size_bytes: float) -> int:
        """A tensor comes into being; gives its row."""
        self.lower.append(self.moment)
        self.upper.append(-1)
        self.size_bytes.append(max(1, int(size_bytes) // 512) * 512)
        self.moment += 1
        return len(self.lower) - 1

    def close(self, row: int) -> None:
        """The tensor is gone."""
        self.upper[row] = self.moment
        self.moment += 1

    def transients(self, sizes: Sequence[float], input_bytes: float, depth: int) -> None:
        """Tensors of which each lives until `depth` further ones were made."""
        waiting: list[int] = []
        for size in sizes:
            waiting.append(self.open(size * input_bytes))
            if len(waiting) > depth:
                self.close(waiting.pop(0))
        for row in waiting:
            self.close(row)

    def forward(self, input_bytes: float) -> list[int]:
        """One layer's forward; gives the rows that it keeps."""
        kept = [self.open(size * input_bytes) for size in KEPT[:3]]
        self.transients(FORWARD[:8], input_bytes, 2)
        kept += [self.open(size * input_bytes) for size in KEPT[3:]]
        self.transients(FORWARD[8:], input_bytes, 1)
        return kept

    def backward(self, input_bytes: float, kept: Sequence[int]) -> None:
        """One layer's backward; what was kept goes as it is used, latest first."""
        gradient = self.open(input_bytes)
        for part, row in enumerate(reversed(kept)):
            self.transients(BACKWARD[2 * part : 2 * part + 3], input_bytes, 1 + part % 2)
            self.close(row)
        self.close(gradient)

    def buffers(self) -> Buffers:
        """The trace, its rows numbered."""
        names = [str(i) for i in range(len(self.lower))]
        return make_buffers(names, self.lower, self.upper, self.size_bytes)


def equal_layers(num_layers: int, micro_batches: int = 1, input_bytes: int = 2**24) -> Buffers:
    """Forward and backward of equal layers, for one micro-batch after the other."""
    return _passes([input_bytes] * num_layers, micro_batches)


def unequal_layers(num_layers: int, micro_batches: int = 1, seed: int = 0) -> Buffers:
    """The same with layers whose sizes differ by up to a factor of 4."""
    widths = np.random.default_rng(seed).uniform(2.0**22, 2.0**24, num_layers)
    return _passes([float(width) for width in widths], micro_batches)


def _passes(sizes: Sequence[float], micro_batches: int) -> Buffers:
    trace = Recorder()
    for _ in range(micro_batches):
        kept = [trace.forward(size) for size in sizes]
        for size, rows in zip(reversed(sizes), reversed(kept), strict=True):
            trace.backward(size, rows)
    return trace.buffers()


def pipeline(num_layers: int, micro_batches: int, in_flight: int = 4, seed: int = 0) -> Buffers:
    """A stage with `num_layers` layers in 1F1B, `in_flight` micro-batches kept at a time."""
    sizes = np.random.default_rng(seed).lognormal(np.log(2.0**22), 0.6, micro_batches)
    trace = Recorder()
    kept: list[list[list[int]]] = []

    def backward(micro: int) -> None:
        for rows in reversed(kept[micro]):
            trace.backward(sizes[micro], rows)

    for micro in range(micro_batches):
        kept.append([trace.forward(sizes[micro]) for _ in range(num_layers)])
        if micro >= in_flight - 1:
            backward(micro - in_flight + 1)
    for micro in range(max(0, micro_batches - in_flight + 1), micro_batches):
        backward(micro)
    return trace.buffers()


def random_lives(num_buffers: int, seed: int = 0, mean_life: float = 40.0) -> Buffers:
    """Lives that start anywhere and last exponentially long; log-normal sizes."""
    random = np.random.default_rng(seed)
    lower = random.integers(0, 4 * num_buffers, num_buffers)
    life = 1 + random.exponential(mean_life, num_buffers).astype(np.int64)
    size = 512 * (1 + random.lognormal(5.0, 1.5, num_buffers).astype(np.int64))
    return make_buffers([str(i) for i in range(num_buffers)], lower, lower + life, size)


TRACES: dict[str, Callable[[int, int], Buffers]] = {
    "llama": lambda count, seed: equal_layers(max(1, count // 70), 1, 2**22 * (1 + seed)),
    "var": lambda count, seed: unequal_layers(max(1, count // 70), 1, seed),
    "pp": lambda count, seed: pipeline(2, max(2, count // 140), 4, seed),
    "rnd": lambda count, seed: random_lives(count, seed, 40.0 * (1 + seed % 3)),
}
"""Traces of about so many tensors, by kind: (count, seed) -> Buffers."""
