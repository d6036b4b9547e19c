"""The cut of a model into pipeline stages: contiguous layers, the slowest stage as fast as can be.

sets        layers 0 .. L-1 in order, stages 0 .. S-1
variables   first(q): the first layer of stage q;  first(0) = 0 < first(1) < ... < first(S) = L
objective   minimise max over q of time(q), then the sum over q of time(q)^2
            time(q) = sum of its layers' times, and of the embedding's for q = 0, of the head's for
            q = S - 1
subject to  memory(q) <= limit(q), memory summed in the same way

Exact, by dynamic programming over (stages used, layers used), twice: first for the smallest largest
stage T, then for the most even cut among those with no stage above T,

    best(q, j) = min over i < j of  max(best(q - 1, i), time of layers i .. j-1 as stage q - 1)
    even(q, j) = min over the same i, where that time <= T, of  even(q - 1, i) + time^2

Among equal cuts the one with the later boundaries is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import InputError, NoFeasiblePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Layers of every stage, and what they come to."""

    stages: tuple[tuple[int, int], ...]
    """First and last layer of every stage."""
    stage_s: tuple[float, ...]
    stage_memory: tuple[float, ...]

    @property
    def largest_s(self) -> float:
        """The slowest stage."""
        return max(self.stage_s)


def cut_layers(
    layer_s: Sequence[float],
    num_stages: int,
    *,
    first_s: float = 0.0,
    last_s: float = 0.0,
    layer_memory: Sequence[float] | None = None,
    first_memory: float = 0.0,
    last_memory: float = 0.0,
    memory_limit: float | Sequence[float] = math.inf,
) -> Cut:
    """The cut of layers into `num_stages` contiguous stages whose slowest stage is fastest.

    Parameters
    ----------
    layer_s : time of each layer, forward and backward together, one micro-batch.
    first_s, last_s : what the first and the last stage do besides: embedding; head and loss.
    layer_memory, first_memory, last_memory : likewise in bytes, or any unit; default none.
    memory_limit : the same unit; one number, or one per stage.

    Raises
    ------
    InputError : more stages than layers, a list of another length, a number that is negative.
    NoFeasiblePlan : no cut keeps every stage within its limit.

    >>> cut_layers([1.0] * 6, 3, last_s=1.0).stages
    ((0, 2), (3, 4), (5, 5))
    """
    num_layers = len(layer_s)
    memory = [0.0] * num_layers if layer_memory is None else list(layer_memory)
    limits: list[float] = (
        list(memory_limit)
        if isinstance(memory_limit, Sequence)
        else [float(memory_limit)] * num_stages
    )
    _check(num_stages, layer_s, memory, limits, (first_s, last_s, first_memory, last_memory))
    time_s = _StageSums(layer_s, num_stages, first_s, last_s)
    held = _StageSums(memory, num_stages, first_memory, last_memory)
    times = [
        np.where(held.table(q) <= limits[q], time_s.table(q), np.inf) for q in range(num_stages)
    ]
    largest_s, firsts = least_largest(times, [table**2 for table in times])
    if not math.isfinite(largest_s):
        raise _infeasible(held, limits, num_layers)
    bounds = [*firsts, num_layers]
    stages = tuple((bounds[q], bounds[q + 1] - 1) for q in range(num_stages))
    return Cut(
        stages=stages,
        stage_s=tuple(
            float(time_s.of(q, last + 1)[first]) for q, (first, last) in enumerate(stages)
        ),
        stage_memory=tuple(
            float(held.of(q, last + 1)[first]) for q, (first, last) in enumerate(stages)
        ),
    )


class _StageSums:
    """Sums over the layers of a stage, with what the first and the last stage have besides."""

    def __init__(self, values: Sequence[float], num_stages: int, first: float, last: float) -> None:
        self.until = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
        self.extra = [0.0] * num_stages
        self.extra[0] += first
        self.extra[-1] += last

    def of(self, stage: int, stop: int) -> np.ndarray:
        """Sums of layers i .. stop - 1 as that stage, for i = 0 .. stop - 1."""
        return self.until[stop] - self.until[:stop] + self.extra[stage]

    def table(self, stage: int) -> np.ndarray:
        """Sums of layers i .. j - 1 as that stage; infinite where there are none."""
        num = len(self.until)
        some = np.arange(num)[:, None] < np.arange(num)
        return np.where(some, self.until - self.until[:, None] + self.extra[stage], np.inf)


def least_largest(
    largest: Sequence[np.ndarray], total: Sequence[np.ndarray]
) -> tuple[float, list[int]]:
    """The least largest value of any cut, and the first layers of the cut that has it.

    `largest[q][i, j]` is the value of stage q with the layers i .. j-1, infinite where it cannot
    hold them. Among the cuts with the least largest value the one with the least sum of `total` is
    taken, among equal ones that with the later boundaries; no layers where there is no cut.
    """
    best = _through(largest, np.maximum)[0]
    if not math.isfinite(best):
        return best, []
    allowed = [
        np.where(values <= best * (1 + 1e-12), sums, np.inf)
        for values, sums in zip(largest, total, strict=True)
    ]
    return best, _through(allowed, np.add)[1]


def _through(
    stages: Sequence[np.ndarray], combine: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[float, list[int]]:
    """The value of the best path through all stages and layers, and where its stages begin."""
    num_layers = stages[0].shape[0] - 1
    value = np.full(num_layers + 1, np.inf)
    value[0] = combine(np.zeros(1), np.zeros(1))[0]
    chosen: list[np.ndarray] = []
    for stage in stages:
        options = combine(value[:, None], stage)
        choice = num_layers - np.argmin(options[::-1], axis=0)
        value = options[choice, np.arange(num_layers + 1)]
        chosen.append(choice)
    firsts: list[int] = []
    stop = num_layers
    for choice in reversed(chosen):
        stop = int(choice[stop])
        firsts.append(stop)
    return float(value[num_layers]), firsts[::-1]


def _check(
    num_stages: int,
    layer_s: Sequence[float],
    memory: Sequence[float],
    limits: Sequence[float],
    extra: Sequence[float],
) -> None:
    if not 1 <= num_stages <= len(layer_s):
        raise InputError("stages", num_stages, f"not between 1 and the {len(layer_s)} layers",
                         "give every stage a layer")  # fmt: skip
    if len(memory) != len(layer_s):
        raise InputError("layer-memory", f"{len(memory)} numbers", "not one per layer",
                         f"give {len(layer_s)}")  # fmt: skip
    if len(limits) != num_stages:
        raise InputError("memory-limit", f"{len(limits)} numbers", "not one per stage",
                         f"give one number or {num_stages}")  # fmt: skip
    for field, values in (("layer-seconds", layer_s), ("layer-memory", memory), ("extra", extra)):
        for number in values:
            if not 0 <= number < math.inf:
                raise InputError(field, number, "not zero or a positive number",
                                 "give finite numbers that are not negative")  # fmt: skip


def _infeasible(held: _StageSums, limits: list[float], num_layers: int) -> NoFeasiblePlan:
    """By how much the least demanding cut exceeds the limits: the smallest common addition."""
    num_stages = len(limits)
    excess = np.full(num_layers + 1, np.inf)
    excess[0] = 0.0
    for q in range(num_stages):
        following = np.full(num_layers + 1, np.inf)
        for j in range(q + 1, num_layers + 1):
            following[j] = np.maximum(excess[:j], held.of(q, j) - limits[q]).min()
        excess = following
    more = float(excess[num_layers])
    return NoFeasiblePlan(
        f"every cut into {num_stages} stages exceeds the memory of a stage by {more:g} or more",
        f"raise the limit by {more:g}, use more stages or recompute activations",
    )
