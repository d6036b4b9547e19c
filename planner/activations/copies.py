"""How much of what each policy stores waits on the host, once it is known how many layers use it.

    sets       b policies in use, n_b layers with each
    variables  D_b >= 0: bytes on the host, of one micro-batch and all n_b layers
    objective  min sum_b  max(n_b F_b, D_b / B - n_b Wf_b) + max(n_b G_b, D_b / B - n_b Wb_b)
    rules      k (sum_b n_b S_b - sum_b D_b) <= M      device, with k live micro-batches
               k sum_b D_b <= H                        host
               D_b <= n_b S_b

B is the rate of copies, Wf and Wb what they hide behind in a layer's forward and backward; what a
policy adds (F, G) they hide behind as well. Equal layers share D_b equally, because the cost is
convex. It is piecewise linear with slopes 0, 1/B and 2/B, so that filling the cheapest pieces first
up to the bytes that the device lacks is optimal.

With one policy whose tensors are the layer's input, the attention's output and a fraction alpha of
the others this is the overlap condition of MEMO (Zhao et al. 2024, arXiv 2407.12117, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .policies import Floats, Policies
from .problem import Limits


@dataclass(frozen=True, slots=True)
class Columns:
    """Policies of all layer types in one list; arrays of one length."""

    kind: np.ndarray
    """Index of the layer type."""
    index: np.ndarray
    """Index among that type's policies."""
    stored_bytes: Floats
    forward_s: Floats
    backward_s: Floats
    forward_window_s: Floats
    backward_window_s: Floats

    def __len__(self) -> int:
        return len(self.kind)

    def take(self, index: np.ndarray) -> Columns:
        """Some of the columns."""
        return Columns(
            self.kind[index], self.index[index], self.stored_bytes[index], self.forward_s[index],
            self.backward_s[index], self.forward_window_s[index], self.backward_window_s[index],
        )  # fmt: skip

    @staticmethod
    def of(found: Sequence[Policies]) -> Columns:
        """The columns of some layer types, in their order."""

        def each(values: Sequence[float]) -> Floats:
            return np.repeat(np.asarray(values, dtype=float), [len(p) for p in found])

        return Columns(
            np.repeat(np.arange(len(found)), [len(p) for p in found]),
            np.concatenate([np.arange(len(p)) for p in found]),
            np.concatenate([p.stored_bytes for p in found]),
            np.concatenate([p.forward_s for p in found]),
            np.concatenate([p.backward_s for p in found]),
            each([p.layer.forward_s for p in found]),
            each([p.layer.backward_s for p in found]),
        )


def extra_s(columns: Columns, counts: Floats, moved_bytes: Floats, limits: Limits) -> Floats:
    """Seconds that `counts` layers of each column add to one micro-batch with that much moved."""
    copying_s = moved_bytes / limits.copy_bytes_per_s if limits.offload else 0.0 * moved_bytes
    there = np.maximum(counts * columns.forward_s, copying_s - counts * columns.forward_window_s)
    back = np.maximum(counts * columns.backward_s, copying_s - counts * columns.backward_window_s)
    return there + back


def moved_bytes(columns: Columns, counts: Floats, limits: Limits) -> Floats | None:
    """The best D per column; None where the counts do not fit whatever is moved."""
    live = limits.live_micro_batches
    stored = counts * columns.stored_bytes
    lacking = float(np.sum(stored)) - limits.device_bytes / live
    moved = np.zeros(len(columns))
    if lacking <= 1e-12 * float(np.sum(stored)):
        return moved
    if not limits.offload or lacking > limits.host_bytes / live:
        return None
    rate = limits.copy_bytes_per_s
    free = rate * counts * (columns.forward_s + columns.forward_window_s)
    free_back = rate * counts * (columns.backward_s + columns.backward_window_s)
    ends = (np.minimum(free, free_back), np.maximum(free, free_back), stored)
    for end in ends:
        room = np.maximum(np.minimum(end, stored) - moved, 0.0)
        before = np.concatenate(([0.0], np.cumsum(room)[:-1]))
        filled = np.clip(lacking - before, 0.0, room)
        moved = moved + filled
        lacking -= float(np.sum(filled))
    return moved
