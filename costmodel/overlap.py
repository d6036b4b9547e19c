"""Communication beside compute: what of it a step feels, and what it costs the compute.

While a collective runs, its kernels keep a few streaming multiprocessors and a part of the memory
bandwidth. With C seconds of communication that move M seconds' worth of memory traffic, beside W
seconds of compute of which the share s streams through memory,

    felt = C - H + H ((1 - s) k / (S - k) + s M / C),    H = min(C, W)

with k of S multiprocessors kept: matmuls get the others, operators bound by memory the rest of its
bandwidth. Not more than C: at worst they take turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .graph import Array
from .prices import Prices

MEMORY_PASSES = {
    "all_gather": 2.0,
    "reduce_scatter": 3.0,
    "all_reduce": 5.0,
    "all_to_all": 2.0,
}
"""Reads and writes of device memory per byte of the buffer: a step of a ring receives what the next
one sends, and where it reduces, reads its own part as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Communication of one rank."""

    seconds: Array
    memory_s: Array
    """Of device memory's time that it takes."""

    @staticmethod
    def none() -> Moved:
        """No communication."""
        return Moved(seconds=np.zeros(1), memory_s=np.zeros(1))

    def __add__(self, other: Moved) -> Moved:
        return Moved(seconds=self.seconds + other.seconds, memory_s=self.memory_s + other.memory_s)

    def times(self, count: Array | float) -> Moved:
        """As often."""
        return Moved(seconds=self.seconds * count, memory_s=self.memory_s * count)

    def where(self, mask: Array) -> Moved:
        """Only in some rows."""
        return Moved(
            seconds=np.where(mask, self.seconds, 0.0), memory_s=np.where(mask, self.memory_s, 0.0)
        )


def moved(
    kind: str, num_bytes: Array, ranks: Array, stride: Array, groups: Array, prices: Prices
) -> Moved:
    """One collective over `ranks` ranks, `stride` apart, with the stack's latency of an exchange
    per doubling of the ranks; none of an empty buffer."""
    seconds = prices.collective(kind, num_bytes, ranks, stride, groups)
    latency = prices.pool.stack.collective_latency_s * np.log2(np.maximum(ranks, 1.0))
    memory_s = MEMORY_PASSES[kind] * num_bytes / prices.memory_bytes_per_s
    any_moves = (num_bytes > 0) & (ranks > 1)
    return Moved(seconds=seconds + latency, memory_s=memory_s).where(any_moves)


def felt_s(communication: Moved, window_s: Array, streaming: Array, prices: Prices) -> Array:
    """Seconds that a step grows by communication beside `window_s` of compute, of which the share
    `streaming` is bound by memory."""
    total_s = communication.seconds
    if not prices.pool.stack.can_overlap:
        return total_s
    hidden_s = np.minimum(total_s, window_s)
    memory = communication.memory_s / np.maximum(total_s, 1e-30)
    slower = (1.0 - streaming) * kept_share(prices) + streaming * memory
    return total_s - hidden_s * (1.0 - np.minimum(slower, 1.0))


def kept_share(prices: Prices) -> float:
    """By how much matmuls slow down beside a collective, whose kernels keep multiprocessors."""
    sms = prices.pool.device.num_sms
    kept = prices.pool.stack.communication_sms
    return min(1.0, kept / (sms - kept)) if sms is not None and sms > kept else 1.0
