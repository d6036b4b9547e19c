"""Costs of sequences on groups of ranks from the cost model: a model on a cluster.

A step with context parallelism of d, N/d replicas and n sequences of l tokens per micro-batch is
priced with one and with two micro-batches. The difference is a pass, T(n, l, d), with whatever of
its host work and of its gathers of parameters is not hidden, and without what a step does once.

    E_d   where the peak memory, linear in l between a few lengths, meets the device's
    a, b, c >= 0 of  c + n (a l^2 + b l)  by least squares of relative differences from T over
          passes that are full and half full, E_d/128 <= l <= E_d
    f_d   T of one short sequence: what the launches of a pass take
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ... import costmodel
from ...cluster import Cluster, Pool
from ...costmodel.options import Options
from ...errors import InputError, NoFeasiblePlan
from ...layout_rules import layout_problems
from ...mesh import Mesh
from ...model import Model
from ...units import format_bytes
from ...workload import Workload
from .costs import Costs, Floats, Ints, check_ranks, powers_of_two

SHORTEST, LONGEST = 256, 2**28
"""Tokens priced at least and at most."""
MEMORY_STEP, TIME_STEP = 8, 4
"""Ratios of the lengths at which memory and time are priced."""
SHORT = 128
"""A group's capacity over the shortest length that is fitted."""
KINDS = ("ring", "ulysses")


def model_costs(
    model: Model, cluster: Cluster, *, zero: int = 3, recompute: str = "none",
    kind: str | None = None, max_degree: int | None = None, tokens_per_rank: int | None = None,
) -> Costs:  # fmt: skip
    """The costs of a decoder's sequences on groups of a cluster of one pool.

    Parameters
    ----------
    zero : how states are sharded over all ranks. Stage 3 gathers parameters in each pass, so that
        all ranks need as many passes; without barriers use 1.
    kind : ring (balanced) or ulysses; None takes the faster one of each degree.
    tokens_per_rank : in place of what the memory holds.

    Raises
    ------
    InputError : ranks that are no power of two, a model whose sequence cannot be divided, a kind
        that no degree allows.
    NoFeasiblePlan : not even a short sequence fits.
    """
    pool, *others = cluster.pools
    if others:
        raise InputError("gpus", cluster.name, "pools of unlike devices are not available",
                         "give one kind of node")  # fmt: skip
    check_ranks(cluster.num_devices)
    if not model.is_decoder:
        raise InputError("model", model.name, "not a decoder of text", "give a decoder")
    most = cluster.num_devices if max_degree is None else min(max_degree, cluster.num_devices)
    options = Options(compute=_compute_dtype(pool), recompute=recompute)
    pricing = _Pricing(model, cluster, options, zero)
    pairs = _pairs(model, most, kind, zero)
    floors, capacities = pricing.floors_and_capacities(pairs)
    if tokens_per_rank is not None:
        capacities = [tokens_per_rank * degree for degree, _ in pairs]
    fits = pricing.fits(pairs, capacities)
    best: dict[int, int] = {}
    for at, ((degree, _), capacity) in enumerate(zip(pairs, capacities, strict=True)):
        if capacity >= SHORTEST:
            rival = best.get(degree)
            if rival is None or _full_s(fits[at], capacity) < _full_s(fits[rival], capacity):
                best[degree] = at
    chosen = [best[degree] for degree in sorted(best)]
    return Costs(
        degrees=tuple(pairs[at][0] for at in chosen),
        kinds=tuple(pairs[at][1] if pairs[at][0] > 1 else "none" for at in chosen),
        quadratic_s=tuple(fits[at].quadratic_s for at in chosen),
        linear_s=tuple(fits[at].linear_s for at in chosen),
        pass_s=tuple(fits[at].pass_s for at in chosen),
        floor_s=tuple(floors[at] for at in chosen),
        capacity_tokens=tuple(capacities[at] for at in chosen),
        fit_error=max(fits[at].error for at in chosen),
    )


Pair = tuple[int, str]
"""A degree and the kind of its division."""


def _pairs(model: Model, most: int, kind: str | None, zero: int) -> list[Pair]:
    """Degrees and kinds that the model allows."""
    if kind is not None and kind not in KINDS:
        raise InputError("kind", kind, "unknown", f"use {' or '.join(KINDS)}")
    pairs: list[Pair] = []
    refused: InputError | None = None
    for degree in powers_of_two(most):
        for own in KINDS[:1] if degree == 1 else KINDS if kind is None else (kind,):
            mesh = Mesh(cp=degree, ulysses=degree if own == "ulysses" else 1)
            problem = next(
                layout_problems(model, mesh, seq_tokens=2 * degree * SHORTEST, zero=zero,
                                sequence_parallel=False, schedule="1f1b", num_microbatches=1),
                None,
            )  # fmt: skip
            if problem is None:
                pairs.append((degree, own))
            refused = refused or problem
    if not pairs:
        assert refused is not None
        raise refused
    return pairs


@dataclass(frozen=True, slots=True)
class _Fit:
    quadratic_s: float
    linear_s: float
    pass_s: float
    error: float
    """Largest relative difference."""


@dataclass(frozen=True, slots=True)
class _Pricing:
    model: Model
    cluster: Cluster
    options: Options
    zero: int

    def passes(
        self, length: int, pairs: Sequence[Pair], num_seqs: Sequence[int]
    ) -> tuple[Floats, Floats]:
        """Seconds and peak bytes of a pass of `num_seqs` sequences, one pass per pair (P,)."""
        cp = np.array([d for d, _ in pairs] * 2, dtype=np.int64)
        ulysses = [d if own == "ulysses" else 1 for d, own in pairs] * 2
        one, replicas = np.ones_like(cp), self.cluster.num_devices // cp
        layouts = costmodel.Layouts(
            micro_batch_seqs=np.array([*num_seqs, *num_seqs], dtype=np.int64),
            num_microbatches=np.repeat(np.array([1, 2], dtype=np.int64), len(pairs)),
            dp_replicate=one if self.zero else replicas,
            dp_shard=replicas if self.zero else one,
            tp=one,
            pp=one,
            vpp=one,
            zero=one * self.zero,
            sequence_parallel=one * 0,
            schedule=one,
            cp=cp,
            ulysses=np.array(ulysses, dtype=np.int64),
            ep=one,
        )
        workload = Workload(seq_tokens=length, global_batch_seqs=self.cluster.num_devices)
        bounds = costmodel.bound_layouts(self.model, self.cluster, workload, layouts, self.options)
        once, twice = bounds.time_s.reshape(2, -1)
        return twice - once, bounds.memory_bytes.reshape(2, -1)[1]

    def floors_and_capacities(self, pairs: Sequence[Pair]) -> tuple[list[float], list[int]]:
        """Seconds of a short sequence alone, and tokens that a group holds."""
        memory = float(self.cluster.pools[0].device.memory_bytes)
        lengths, peaks, floors = [SHORTEST], list[Floats](), list[float]()
        while True:
            seconds, peak = self.passes(lengths[-1], pairs, [1] * len(pairs))
            floors = floors or seconds.tolist()
            peaks.append(peak)
            if np.all(peak > memory) or lengths[-1] >= LONGEST:
                break
            lengths.append(lengths[-1] * MEMORY_STEP)
        table = np.array(peaks)
        capacities = [_crossing(lengths, table[:, at], memory) for at in range(len(pairs))]
        if max(capacities) < SHORTEST:
            problem = f"{self.model.name} with ZeRO {self.zero} needs "
            problem += f"{format_bytes(float(table[0].min()))} per GPU for {SHORTEST} tokens"
            raise NoFeasiblePlan(problem, "use more GPUs or recompute activations")
        return floors, capacities

    def fits(self, pairs: Sequence[Pair], capacities: Sequence[int]) -> list[_Fit]:
        """The coefficients of every pair."""
        rows: list[list[tuple[int, int, float]]] = [[] for _ in pairs]
        length, most = SHORTEST, max(capacities)
        while length <= most:
            asked = [
                (at, n)
                for at, capacity in enumerate(capacities)
                if capacity / SHORT <= length <= capacity
                for n in sorted({capacity // length, max(1, capacity // (2 * length))})
            ]
            if asked:
                seconds, _ = self.passes(
                    length, [pairs[at] for at, _ in asked], [n for _, n in asked]
                )
                for (at, n), value in zip(asked, seconds.tolist(), strict=True):
                    rows[at].append((length, n, value))
            length *= TIME_STEP
        return [_fit(own) for own in rows]


def _fit(rows: Sequence[tuple[int, int, float]]) -> _Fit:
    """Non-negative least squares over every set of positive coefficients."""
    if not rows:
        return _Fit(0.0, 0.0, 0.0, 0.0)
    l, n, t = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    columns = np.stack([n * l * l, n * l, np.ones_like(l)], axis=1) / t[:, None]
    scale = columns.max(axis=0)
    best, values = np.inf, np.zeros(3)
    for size in (1, 2, 3):
        for chosen in combinations(range(3), size):
            trial = np.zeros(3)
            part = (columns / scale)[:, chosen]
            trial[list(chosen)] = np.linalg.lstsq(part, np.ones_like(t), rcond=None)[0]
            error = float(np.sum((columns @ (trial / scale) - 1) ** 2))
            if (trial >= 0).all() and error < best:
                best, values = error, trial / scale
    difference = float(np.abs(columns @ values - 1).max())
    return _Fit(float(values[0]), float(values[1]), float(values[2]), difference)


def _crossing(lengths: Sequence[int], peak: Ints | Floats, memory: float) -> int:
    """Tokens at which the peak meets the memory; 0 if the shortest length does not fit."""
    above = np.flatnonzero(peak > memory)
    if len(above) == 0:
        return lengths[-1]
    at = int(above[0])
    if at == 0:
        return 0
    share = (memory - peak[at - 1]) / (peak[at] - peak[at - 1])
    return int(lengths[at - 1] + share * (lengths[at] - lengths[at - 1]))


def _full_s(fit: _Fit, capacity: int) -> float:
    """Seconds per token of a full group with eight sequences."""
    return fit.quadratic_s * capacity / 8 + fit.linear_s + fit.pass_s / capacity


def _compute_dtype(pool: Pool) -> str:
    """bf16 on GPUs that have it, else fp32."""
    has_bf16 = pool.device.kind == "gpu" and "bf16" in pool.device.peak_flops_per_s
    return "bf16" if has_bf16 else "fp32"
