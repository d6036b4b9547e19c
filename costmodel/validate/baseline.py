"""The trivial model to beat: one efficiency per device and precision, fitted on the table itself.

    step_s = hardware FLOPs / (devices * peak * efficiency)

with the median efficiency of the rows of that device and precision. Hardware FLOPs are those that
the kernels run: causal attention halved where the kernel skips the masked half, layers a third more
under full recomputation, no weight gradients of frozen weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from .conventions import (
    RECOMPUTED,
    head_flops_per_token,
    layer_flops_per_token,
    peak_flops_per_s,
    to_seconds,
    work,
)
from .predict import Outcome

FROZEN = 2 / 3
"""Forward and input gradients, over forward and both gradients."""


def baseline_errors(outcomes: Sequence[Outcome]) -> list[float]:
    """Signed error on step time of the one-constant model for each (time) outcome."""
    seconds = [measured_seconds(outcome) for outcome in outcomes]
    ideal = [ideal_seconds(outcome) for outcome in outcomes]
    groups: dict[tuple[str, str], list[float]] = {}
    for outcome, least, taken in zip(outcomes, ideal, seconds, strict=True):
        groups.setdefault(_group(outcome), []).append(least / taken)
    efficiency = {group: median(values) for group, values in groups.items()}
    return [
        least / efficiency[_group(outcome)] / taken - 1.0
        for outcome, least, taken in zip(outcomes, ideal, seconds, strict=True)
    ]


def measured_seconds(outcome: Outcome) -> float:
    """The step time that a row's metric means."""
    row, plan = outcome.case.row, outcome.prediction.candidate.plan
    device, batch = plan.cluster.pools[0].device, plan.workload.global_batch_seqs
    return to_seconds(row, row.value, work(row, outcome.case.model, device, batch))


def ideal_seconds(outcome: Outcome) -> float:
    """Hardware FLOPs of a step at the devices' peak."""
    row, plan = outcome.case.row, outcome.prediction.candidate.plan
    phase, device = plan.phase, plan.cluster.pools[0].device
    unfused = phase.technique("attention").get("kernel") == "unfused"
    kind = "whole" if unfused else "causal"
    layers = layer_flops_per_token(outcome.case.model, row.seq_len, kind)
    layers *= RECOMPUTED if phase.recompute == "full" else 1.0
    per_token = layers + head_flops_per_token(outcome.case.model)
    per_token *= FROZEN if phase.technique("lora") else 1.0
    flops = per_token * row.seq_len * plan.workload.global_batch_seqs
    return flops / (row.gpus * peak_flops_per_s(row, device))


def _group(outcome: Outcome) -> tuple[str, str]:
    """The device as the table names it, which may tell machines of one type apart."""
    row = outcome.case.row
    return (row.hardware.lower(), row.precision)
