"""Seconds of operators and collectives on one pool: measured curves first, constants otherwise.

A `Prices` is made for one pool, with `busy` processes at work on each node. Where the cluster
carries a profile of the pool's device, its curves are used ("measured"); what they do not hold
comes from the roofline with the stack's constants ("catalog"), or, on a CPU without a profile, from
assumed constants ("assumed").

Names in `Profile.host_s`, seconds beyond the operators themselves: `layer_forward`,
`layer_backward` (Python and autograd glue of one block), `checkpoint` (per recomputed block),
`expert_layer_forward|backward` (glue of a block with routed experts, in the place of the former),
`tp_layer_forward|backward`, `tp_sp_layer_forward|backward` (DTensor dispatch per block),
`ep_layer_forward|backward` (what expert parallelism adds per block),
`ring_block_forward|backward` (per block of keys that comes round), `ulysses_layer_forward|backward`
(per block), `document_forward|backward` (per block and packed document),
`fsdp_unit_forward|backward` (per FSDP unit), `ddp_step`, `pp_action` (per pipeline action),
`micro_batch`, `step`; on a GPU also `launch` (of one operator) and
`compiled_layer_forward|backward` (of one compiled block, launches included). On a CPU they add to
the operators (`Prices.host`), on a GPU the host works beside the device (`Prices.beside`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np

from ..cluster import DTYPE_BYTES, CollectiveCurve, OperatorCurve, Pool, Profile, WaitCurve
from ..errors import InputError
from ..estimate import Evidence
from . import collectives
from .curves import affine_time, interpolate_rate, interpolate_time
from .graph import Array
from .operators import KINDS
from .rates import is_compute, is_matmul, rates

COPIES = {
    ("host", "out"): ("copy_d2h", "fp32"), ("host", "in"): ("copy_h2d", "fp32"),
    ("disk", "out"): ("copy_to_disk", "fp32"), ("disk", "in"): ("copy_from_disk", "fp32"),
}  # fmt: skip
"""The measured operator of a copy by tier and direction."""


class Prices:
    """Times of operators and collectives on one pool with `busy` processes per node."""

    def __init__(self, pool: Pool, profile: Profile | None, busy: int = 1) -> None:
        self.pool = pool
        self.busy = busy
        usable = profile if profile is not None and profile.device == pool.device.name else None
        self.profile = usable
        self._operators: dict[tuple[str, str, str], list[OperatorCurve]] = {}
        self._collectives: dict[str, list[CollectiveCurve]] = {}
        if usable is not None:
            for curve in usable.operators:
                key = (curve.operator, curve.dtype, curve.runtime)
                self._operators.setdefault(key, []).append(curve)
            for entry in usable.collectives:
                self._collectives.setdefault(entry.collective, []).append(entry)

    def has_curve(self, kind: str) -> bool:
        """Whether an operator was measured on this pool's device."""
        return any(name == kind for name, _, _ in self._operators)

    @property
    def evidence(self) -> Evidence:
        """What compute times rest on."""
        if self.profile is not None and not self.profile.shipped:
            return "measured"
        return "assumed" if self.pool.device.kind == "cpu" else "catalog"

    @property
    def link_evidence(self) -> Evidence:
        """What communication times rest on."""
        if self._collectives:
            return "measured"
        return "assumed" if self.pool.device.kind == "cpu" else "catalog"

    def measures(self, kind: str) -> bool:
        """Whether the profile holds a curve of an operator kind."""
        return any(operator == kind for operator, _, _ in self._operators)

    def host(self, name: str) -> float:
        """Host seconds of that name that operators wait for, which run on the same cores.

        Processes beyond the cores share them; zero on a GPU.
        """
        if self.profile is None or self.pool.device.kind == "gpu":
            return 0.0
        cores = self.pool.shared_cores or self.busy
        return self.profile.host_s.get(name, 0.0) * max(1.0, self.busy / cores)

    def beside(self, name: str, otherwise: float = 0.0) -> float:
        """Host seconds of that name that run beside a GPU; `otherwise` where none was measured."""
        if self.pool.device.kind != "gpu":
            return 0.0
        measured = self.profile.host_s if self.profile is not None else {}
        return measured.get(name, otherwise)

    @property
    def launch_s(self) -> float:
        """Host time to launch one operator on a GPU; on a CPU it is part of the operator."""
        return self.beside("launch", self.pool.stack.host_s_per_op)

    @property
    def memory_bytes_per_s(self) -> float:
        """Bandwidth of device memory that operators reach."""
        return self.pool.device.memory_bytes_per_s * self.pool.stack.memory_efficiency

    @property
    def drift(self) -> float:
        """Slow-down of a step by jitter and slow nodes, which grows with the devices."""
        doublings = max(0.0, math.log2(self.pool.num_devices / 8))
        return 1.0 + self.pool.stack.drift_per_doubling * doublings

    def scale(self, term: str) -> float:
        """Correction of a time term that calibration found (1 without one)."""
        return self.profile.scale.get(term, 1.0) if self.profile is not None else 1.0

    def memory(self, name: str, otherwise: float) -> float:
        """A measured memory constant, or the stack's."""
        return self.profile.memory.get(name, otherwise) if self.profile is not None else otherwise

    @property
    def fragmentation(self) -> float:
        """What an allocator wastes of each byte of live tensors."""
        return self.memory("fragmentation", self.pool.stack.fragmentation)

    @property
    def memory_spread(self) -> float:
        """Relative standard deviation of a peak around its prediction."""
        return self.memory("spread", self.pool.stack.memory_spread)

    def operator(
        self, kind: str, sizes: Sequence[Array], dtype: str, runtime: str = "eager"
    ) -> tuple[Array, Array]:
        """Forward and backward seconds of one operator; `sizes` as in `KINDS`.

        Compiled operators without a curve of their own take the eager one, times what the stack
        says that fusing leaves of those bound by memory.
        """
        if runtime == "compiled" and not is_compute(kind):
            curves = self._operators.get((kind, dtype, "compiled"))
            if not curves:
                factor = self.pool.stack.compiled_elementwise
                forward, backward = self.operator(kind, sizes, dtype)
                return forward * factor, backward * factor
        else:
            curves = self._operators.get((kind, dtype, "eager"))
            if not curves and is_compute(kind) and self.pool.device.kind == "gpu":
                return self._at_other_rate(kind, sizes, dtype)
            for other in ("fp32", "bf16"):
                curves = curves or self._operators.get((kind, other, "eager"))
        if not curves:
            return self._roofline(kind, sizes, dtype)
        levels = {curve.busy: curve for curve in curves}
        return (
            self._at_busy({n: self._read(c, sizes, False) for n, c in levels.items()}),
            self._at_busy({n: self._read(c, sizes, True) for n, c in levels.items()}),
        )

    def _at_other_rate(self, kind: str, sizes: Sequence[Array], dtype: str) -> tuple[Array, Array]:
        """A GPU's matmul in a dtype that was not measured: by its constants, or by the measured one
        in bf16 with the constants' ratio of the two dtypes."""
        there, back = self._roofline(kind, sizes, dtype)
        if (kind, "bf16", "eager") not in self._operators:
            return there, back
        known = self.operator(kind, sizes, "bf16")
        wide = self._roofline(kind, sizes, "bf16")
        return tuple(
            measured * own / np.maximum(other, 1e-12)
            for measured, own, other in zip(known, (there, back), wide, strict=True)
        )  # pyright: ignore[reportReturnType]

    def _read(self, curve: OperatorCurve, sizes: Sequence[Array], backward: bool) -> Array:
        """Time of one operator from its curve; zero where the curve has no such direction.

        Over one size it is read between the points; of several sizes what is read is a rate.
        """
        seconds = np.asarray(curve.backward_s if backward else curve.forward_s)
        if not len(seconds):
            return 0.0 * sizes[0]
        entry = KINDS[curve.operator]
        work = entry.backward_work if backward and entry.backward_work else entry.work
        if len(curve.axes) == 1:
            return interpolate_time([row[0] for row in curve.sizes], list(seconds), work(sizes))
        points = np.asarray(curve.sizes, dtype=float)
        columns = [points[:, i] for i in range(points.shape[1])]
        return work(sizes) / interpolate_rate(points, work(columns) / seconds, sizes)

    def _at_busy(self, times: dict[int, Array]) -> Array:
        """Time at this many busy processes, linear between measured levels.

        Above the last level time grows in proportion: the cores are shared.
        """
        levels = sorted(times)
        if self.busy <= levels[0]:
            return times[levels[0]]
        if self.busy >= levels[-1]:
            return times[levels[-1]] * self._beyond(levels[-1])
        high = next(n for n in levels if n >= self.busy)
        low = max(n for n in levels if n <= self.busy)
        share = 0.0 if high == low else (self.busy - low) / (high - low)
        return times[low] * (1 - share) + times[high] * share

    def _beyond(self, level: int) -> float:
        cores = self.pool.shared_cores
        if cores is None:
            return 1.0
        return max(1.0, self.busy / max(level, cores))

    def _roofline(self, kind: str, sizes: Sequence[Array], dtype: str) -> tuple[Array, Array]:
        """Forward and backward seconds from the stack's constants: FLOPs over rate, bytes over
        bandwidth, and the larger of the two, smoothed where they are close."""
        entry = KINDS[kind]
        bandwidth = self.memory_bytes_per_s
        x = DTYPE_BYTES[dtype]
        factor = self._traffic(kind)
        if not is_compute(kind):
            return (
                _smooth_max(0.0, factor * entry.forward_bytes(sizes, x) / bandwidth),
                _smooth_max(0.0, factor * entry.backward_bytes(sizes, x) / bandwidth),
            )
        forward_rate, backward_rate = rates(kind, sizes, dtype, self.pool)
        return (
            _smooth_max(
                entry.forward_flops(sizes) / forward_rate,
                factor * entry.forward_bytes(sizes, x) / bandwidth,
            ),
            _smooth_max(
                entry.backward_flops(sizes) / backward_rate,
                factor * entry.backward_bytes(sizes, x) / bandwidth,
            ),
        )

    def _traffic(self, kind: str) -> float:
        """Bytes that an operator really moves relative to one pass over its tensors."""
        stack = self.pool.stack
        if is_matmul(kind) or kind.startswith("attention"):
            return 1.0
        if kind.startswith("quantize"):
            return stack.cast_multiplier
        if kind.startswith("adamw"):
            return stack.optimizer_multiplier
        return stack.elementwise_multiplier

    def collective(
        self,
        kind: str,
        num_bytes: Array,
        ranks: Array,
        stride: Array,
        groups: Array,
        *,
        within: bool = False,
    ) -> Array:
        """Seconds of a collective over `ranks` ranks, with `groups` such groups at work at once.

        A curve holds for groups on the links that it was measured on; `within` asks for a group as
        if all of it were on one node.
        """
        pool = self.pool
        if within:
            room = int(np.max(ranks) * np.max(stride))
            pool = msgspec.structs.replace(pool, devices_per_node=room)

        def seconds(link: str) -> Array:
            curves = [c for c in self._collectives.get(kind, ()) if c.link == link]
            if curves:
                return self._curve_s(curves, kind, num_bytes, ranks, groups)
            return collectives.group_s(kind, num_bytes, ranks, stride, pool)

        across = collectives.crosses(ranks, stride, pool)
        if not np.any(across):
            return seconds("intra_node")
        if np.all(across):
            return seconds("inter_node")
        return np.where(across, seconds("inter_node"), seconds("intra_node"))

    def _curve_s(
        self,
        curves: Sequence[CollectiveCurve],
        kind: str,
        num_bytes: Array,
        ranks: Array,
        groups: Array,
    ) -> Array:
        """From measured curves, of each group the nearest."""
        time = np.zeros(np.broadcast_shapes(num_bytes.shape, ranks.shape))
        for p in np.unique(ranks):
            if p <= 1:
                continue
            for g in np.unique(groups):
                here = (ranks == p) & (groups == g)
                if np.any(here):
                    seconds = _measured_collective(curves, kind, num_bytes, int(p), int(g))
                    time = np.where(here, seconds, time)
        return time

    def copy_s(self, direction: str, num_bytes: Array, tier: str) -> Array:
        """Seconds of moving bytes `out` of the device to a tier, or `in` from it."""
        curves = self._operators.get((*COPIES[tier, direction], "eager"))
        if curves:
            at = min(curves, key=lambda curve: abs(curve.busy - self.busy))
            elements = [row[0] for row in at.sizes]
            words = num_bytes / DTYPE_BYTES["fp32"]
            return interpolate_time(elements, at.forward_s, words)
        link = self.pool.host if tier == "host" else self.pool.disk
        if link is None:
            raise InputError("offload.tier", tier, f"{self.pool.name} has no {tier} link",
                             f"give the pool one in a cluster TOML: [pools.{tier}]")  # fmt: skip
        return link.latency_s + num_bytes / link.bytes_per_s

    @property
    def copy_hidden_share(self) -> float:
        """Part of compute that copies run beside: all of it with a copy engine of their own; on a
        CPU what the processes leave of its cores."""
        cores = self.pool.shared_cores
        if cores is None:
            return 1.0
        return min(1.0, max(0.0, cores - self.busy) / self.busy)

    def wait(self, compute_s: Array, ranks: Array, groups: Array) -> Array:
        """Seconds lost where `ranks` ranks meet after each computed for `compute_s`.

        Zero without a profile of this pool: devices of a kind are taken as equally fast.
        """
        curves = self.profile.waits if self.profile is not None else ()
        time = np.zeros(np.broadcast_shapes(compute_s.shape, ranks.shape, groups.shape))
        if not curves:
            return time
        for p in np.unique(ranks):
            if p <= 1:
                continue
            for g in np.unique(groups):
                here = (ranks == p) & (groups == g)
                curve = _nearest(curves, int(p), int(g))
                lost = affine_time(curve.compute_s, curve.seconds, compute_s)
                time = np.where(here, lost, time)
        return time


Curve = TypeVar("Curve", CollectiveCurve, WaitCurve)


def _nearest(curves: Sequence[Curve], ranks: int, groups: int) -> Curve:
    """The curve of the nearest group size, then of the nearest number of groups."""
    return min(
        curves, key=lambda c: (abs(c.group - ranks), c.group, abs(c.groups - groups), c.groups)
    )


def _smooth_max(x: Array | float, y: Array) -> Array:
    """(x^4 + y^4)^(1/4): near max(x, y), above it where both bind."""
    return (x**4 + y**4) ** 0.25


def _measured_collective(
    curves: Sequence[CollectiveCurve], kind: str, num_bytes: Array, ranks: int, groups: int
) -> Array:
    """From the measured curve of the nearest group; other group sizes by the steps of a ring."""
    curve = _nearest(curves, ranks, groups)
    seconds = interpolate_time(curve.message_bytes, curve.seconds, num_bytes)
    if kind != "p2p" and curve.group != ranks:
        seconds = seconds * ((ranks - 1) / ranks) / ((curve.group - 1) / curve.group)
    return seconds
