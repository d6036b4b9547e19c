"""Lower bounds: layers that are divided among policies token by token.

If the tokens of a layer may follow different policies - some recomputed, some on the host - the
number of layers per policy need not be whole, and copies of any token hide behind all of the
layer's compute:

    sets       tau layer types with N layers, b in tau their policies
    variables  y_b >= 0 layers with policy b; per type D bytes on the host, A and E seconds added to
               forward and backward
    objective  min sum_tau A_tau + E_tau
    rules      count_tau:   sum_{b in tau} y_b = N_tau
               device:      k (sum_b y_b S_b - sum_tau D_tau) <= M
               host:        k sum_tau D_tau <= H
               stored_tau:  D_tau <= sum_{b in tau} y_b S_b
               forward_tau:  A_tau >= sum_b y_b F_b ,  A_tau >= D_tau / B - N_tau Wf_tau
               backward_tau: E_tau >= sum_b y_b G_b ,  E_tau >= D_tau / B - N_tau Wb_tau

This relaxes the integer programme of `solve.py`: any of its solutions, summed over the layers of a
type, satisfies these rules at no higher cost. With the two policies "all on the host" and "input
and attention output on the host, the rest made again" it is the token-wise choice of MEMO (Zhao et
al. 2024, arXiv 2407.12117, section 4.1): y is alpha and 1 - alpha of the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import InputError
from .copies import Columns
from .policies import Floats, Policies, policies, undominated
from .problem import LayerType, Limits, Problem


@dataclass(frozen=True, slots=True)
class Relaxed:
    """The optimum of the relaxation."""

    seconds: float
    """Lower bound of the seconds added to one micro-batch."""
    layers: Floats
    """Layers per column, fractional."""
    moved_bytes: Floats
    """Bytes on the host per layer type, of one micro-batch."""
    reduced_s: Floats
    """Seconds by which a whole layer with each column would raise the bound, at least."""


def relax(columns: Columns, problem: Problem) -> Relaxed:
    """The token-wise optimum; its problem must be feasible."""
    from scipy.optimize import linprog

    types, limits = problem.layers, problem.limits
    num, kinds = len(columns), len(types)
    size = max(float(np.max(columns.stored_bytes)), 1.0)
    second = max(float(np.max(columns.forward_s + columns.backward_s)), 1e-12)
    live = limits.live_micro_batches
    host = min(limits.host_bytes / live / size, 1e15) if limits.offload else 0.0
    member = (columns.kind == np.arange(kinds)[:, None]).astype(float)
    eye, none = np.eye(kinds), np.zeros((kinds, kinds))
    stored = columns.stored_bytes / size
    counts = np.array([float(layer.count) for layer in types])
    copy = size / limits.copy_bytes_per_s / second if limits.offload else 0.0
    rows = np.block([
        [stored, -np.ones(kinds), np.zeros(2 * kinds)],
        [np.zeros(num), np.ones(kinds), np.zeros(2 * kinds)],
        [-member * stored, eye, none, none],
        [member * columns.forward_s / second, none, -eye, none],
        [np.zeros((kinds, num)), copy * eye, -eye, none],
        [member * columns.backward_s / second, none, none, -eye],
        [np.zeros((kinds, num)), copy * eye, none, -eye],
    ])  # fmt: skip
    zero = np.zeros(kinds)
    windows = [
        counts * np.array([getattr(layer, name) for layer in types]) / second
        for name in ("forward_s", "backward_s")
    ]
    device = min(limits.device_bytes / live / size, 1e15)
    most = np.concatenate(([device, host], zero, zero, windows[0], zero, windows[1]))
    costs = np.concatenate((np.zeros(num + kinds), np.ones(2 * kinds)))
    equal = np.hstack((member, np.zeros((kinds, 3 * kinds))))
    found = linprog(costs, A_ub=rows, b_ub=most, A_eq=equal, b_eq=counts, method="highs")
    assert found.x is not None, found.message
    return Relaxed(
        seconds=max(0.0, float(found.fun)) * second,
        layers=np.maximum(found.x[:num], 0.0),
        moved_bytes=np.maximum(found.x[num : num + kinds], 0.0) * size,
        reduced_s=np.maximum(found.lower.marginals[:num], 0.0) * second,
    )


@dataclass(frozen=True, slots=True)
class Frontier:
    """What one layer and one micro-batch can trade, ascending in bytes; arrays of one length."""

    bytes: Floats
    """On the device between forward and backward."""
    seconds: Floats
    """Added to forward and backward."""
    host_bytes: Floats

    def hull(self) -> Frontier:
        """The corners of the lower convex hull over (bytes, seconds)."""
        corners = lower_hull(self.bytes, self.seconds)
        return Frontier(self.bytes[corners], self.seconds[corners], self.host_bytes[corners])

    def bound_s(self, num_bytes: Floats) -> Floats:
        """Least seconds per layer of any mixture with that many bytes per layer on average.

        Infinite below the least bytes, zero from the most. Admissible for every number of layers.
        """
        corners = self.hull()
        seconds = np.interp(num_bytes, corners.bytes, corners.seconds)
        return np.where(num_bytes < corners.bytes[0], np.inf, seconds)


def lower_hull(x: Floats, y: Floats) -> list[int]:
    """Corners of the lower convex hull of points that ascend in x and descend in y."""
    corners: list[int] = []
    for right in range(len(x)):
        while len(corners) > 1:
            left, middle = corners[-2:]
            turn = (y[middle] - y[left]) * (x[right] - x[left])
            if turn < (y[right] - y[left]) * (x[middle] - x[left]):
                break
            corners.pop()
        corners.append(right)
    return corners


def frontier(layer: LayerType, limits: Limits) -> Frontier:
    """The non-dominated choices of one layer, with what is on the host at the corners of its cost.

    The device limit is not applied; the host's is that of one layer. Between the corners of one
    policy bytes and seconds change linearly, so that the hull of these points is that of all.
    """
    found = policies(layer, limits)
    stored, there, back = found.stored_bytes, found.forward_s, found.backward_s
    moved = [np.zeros(len(found))]
    if limits.offload:
        rate, host = limits.copy_bytes_per_s, limits.host_bytes / limits.live_micro_batches
        most = np.minimum(stored, host)
        corners = (rate * (there + layer.forward_s), rate * (back + layer.backward_s), most)
        moved += [np.minimum(corner, most) for corner in corners]
    points: list[Floats] = []
    for host_bytes in moved:
        copying_s = host_bytes / limits.copy_bytes_per_s if limits.offload else 0.0 * host_bytes
        seconds = np.maximum(there, copying_s - layer.forward_s)
        seconds = seconds + np.maximum(back, copying_s - layer.backward_s)
        points.append(np.stack((stored - host_bytes, seconds, host_bytes), axis=1))
    every = np.concatenate(points)
    best = every[undominated(every[:, :2])]
    best = best[np.argsort(best[:, 0], kind="stable")]
    return Frontier(best[:, 0], best[:, 1], best[:, 2])


def token_fraction(
    always_bytes: float,
    other_bytes: float,
    *,
    window_s: float,
    copy_bytes_per_s: float,
    swapped_layers: int = 1,
    host_bytes: float = float("inf"),
) -> float:
    """The largest fraction of tokens whose other tensors go to the host at no cost.

    The linear programme of MEMO (arXiv 2407.12117, section 4.1) in closed form:

        max alpha   (always + alpha other) / B <= window ,  layers (always + alpha other) <= host

    between 0 and 1; InputError where not even alpha = 0 satisfies it.

    >>> round(token_fraction(2, 14, window_s=1.0, copy_bytes_per_s=9.0), 3)
    0.5
    """
    if other_bytes <= 0:
        raise InputError("other_bytes", other_bytes, "nothing to divide", "give more than 0")
    room = min(copy_bytes_per_s * window_s, host_bytes / swapped_layers)
    if room < always_bytes:
        raise InputError("always_bytes", always_bytes, f"only {room:.0f} bytes can be moved",
                         "use a faster link, a longer sequence or more host memory")  # fmt: skip
    return min(1.0, (room - always_bytes) / other_bytes)


def bound(problem: Problem, found: Sequence[Policies] | None = None) -> float:
    """The token-wise lower bound of a feasible problem, in seconds of one micro-batch."""
    if found is None:
        found = [policies(layer, problem.limits) for layer in problem.layers]
    return relax(Columns.of(found), problem).seconds
