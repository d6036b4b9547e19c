"""From what each rank measured to one Measurement.

Terms of time are means over ranks, those of memory are the fullest rank's; a step takes as long as
its slowest rank. The time terms of a rank come from its profiled steps; a rank that ended before
the slowest one waited for it, which is bubble under a pipeline and host time otherwise. All terms
are scaled so that they sum to the median of the timed steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...costmodel.diff import plan_digest
from ...document import Value
from ...estimate import MEMORY_TERMS, TIME_TERMS
from ...measurement import Measurement, RankMeasurement, StepTimes
from ...plan import Plan
from ..experts.loads import RankLoad, combine


class RankResult(Value, frozen=True, kw_only=True):
    """What one rank hands to the parent; of a plan that was only timed, no more than its steps."""

    rank: int
    coordinates: dict[str, int]
    steps_s: tuple[float, ...]
    loss: tuple[float, ...]
    peak_memory_bytes: int = 0
    process_peak_bytes: int = 0
    context_bytes: int = 0
    """In use before the first tensor of the run."""
    live_bytes: dict[str, int] = {}
    """By category, at the peak of live tensors."""
    profiled_s: dict[str, float] = {}
    """Seconds by time term, mean of the profiled steps, unscaled."""
    bytes_on_wire: dict[str, float] = {}
    experts: tuple[RankLoad, ...] = ()
    bytes_copied: dict[str, float] = {}
    bytes_off_device: dict[str, float] = {}
    allocator: dict[str, float] = {}
    environment: dict[str, str] = {}


def measurement(
    plan: Plan,
    label: str,
    results: Sequence[RankResult],
    environment: Mapping[str, str],
    emulated: bool = False,
) -> Measurement:
    """The Measurement of a run, from all of its ranks."""
    steps_s = slowest(results)
    local = plan.phase.local_sgd
    step_s = step_times(steps_s, local.period if local is not None else 1)
    slowest_s = max(sum(result.profiled_s.values()) for result in results)
    ranks = tuple(
        RankMeasurement(
            rank=result.rank,
            coordinates=result.coordinates,
            peak_memory_bytes=result.peak_memory_bytes,
            process_peak_bytes=result.process_peak_bytes,
            memory_terms_bytes=memory_terms(result),
            time_terms_s=time_terms(plan, result, slowest_s, step_s.median),
            bytes_on_wire=result.bytes_on_wire,
            bytes_copied=result.bytes_copied,
            bytes_off_device=result.bytes_off_device,
        )
        for result in results
    )
    fullest = max(ranks, key=lambda rank: rank.peak_memory_bytes)
    return Measurement(
        label=label,
        plan_digest=plan_digest(plan),
        step_s=step_s,
        tokens_per_s=plan.workload.global_batch_tokens / step_s.median,
        peak_memory_bytes=fullest.peak_memory_bytes,
        process_peak_bytes=max(rank.process_peak_bytes for rank in ranks),
        time_terms_s=_mean([rank.time_terms_s for rank in ranks]),
        memory_terms_bytes=fullest.memory_terms_bytes,
        bytes_on_wire=_mean([rank.bytes_on_wire for rank in ranks]),
        bytes_copied=_mean([rank.bytes_copied for rank in ranks]),
        bytes_off_device={
            tier: max(rank.bytes_off_device.get(tier, 0.0) for rank in ranks)
            for tier in dict.fromkeys(t for rank in ranks for t in rank.bytes_off_device)
        },
        allocator=results[fullest.rank].allocator,
        steps=steps_s,
        loss=results[0].loss,
        ranks=ranks,
        environment={**results[0].environment, **environment},
        experts=combine(plan, [result.experts for result in results]),
        emulated=emulated,
    )


def slowest(results: Sequence[RankResult]) -> tuple[float, ...]:
    """Seconds of every timed step: those of its slowest rank."""
    return tuple(float(s) for s in np.max([result.steps_s for result in results], axis=0))


def step_times(steps_s: Sequence[float], period: int = 1) -> StepTimes:
    """Median and spread of timed steps; with a period, of the means of whole rounds, or the mean of
    all steps where no round is whole.

    >>> step_times([1.0, 3.0, 1.0, 5.0], period=2).median
    2.5
    """
    num = len(steps_s) // period
    rounds = np.reshape(steps_s[: num * period], (num, period)).mean(axis=1)
    each = rounds if num else [float(np.mean(steps_s))]
    return StepTimes(
        median=float(np.median(each)),
        p10=float(np.quantile(each, 0.1)),
        p90=float(np.quantile(each, 0.9)),
    )


def memory_terms(result: RankResult) -> dict[str, float]:
    """Bytes by memory term: live tensors, the context, and what the allocator holds beyond them.

    On CUDA the device counts a little more than tensors (scratch space of operators, rounding):
    that is workspace.
    """
    terms = dict.fromkeys(MEMORY_TERMS, 0.0) | {k: float(v) for k, v in result.live_bytes.items()}
    terms["workspace"] += max(0.0, result.peak_memory_bytes - sum(result.live_bytes.values()))
    beyond_context = result.process_peak_bytes - result.context_bytes
    terms["fragmentation"] = max(0.0, beyond_context - sum(terms.values()))
    terms["context"] = float(result.context_bytes)
    return terms


def time_terms(plan: Plan, result: RankResult, slowest_s: float, step_s: float) -> dict[str, float]:
    """Seconds by time term, scaled to the median step; waiting for the slowest rank included."""
    terms = dict.fromkeys(TIME_TERMS, 0.0) | result.profiled_s
    idle = "bubble" if plan.phase.mesh.pp > 1 else "host"
    terms[idle] += slowest_s - sum(result.profiled_s.values())
    return {name: seconds * step_s / slowest_s for name, seconds in terms.items()}


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names}
