"""How well predictions rank plans for the same job: Kendall's tau and the regret."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .baseline import measured_seconds
from .predict import Outcome

LEAST_ROWS = 3
"""Rows of a group, of which two plans or more must differ: a pair ranks right by chance."""


def kendall_tau_b(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau with ties (tau-b): (C - D) / sqrt((n - ties in x) (n - ties in y)) over pairs.

    NaN when one side is all ties.

    Source: Kendall 1945, "The treatment of ties in ranking problems".

    >>> kendall_tau_b([1, 2, 3], [1, 3, 2])
    0.3333333333333333
    """
    upper = np.triu_indices(len(x), 1)
    signs = [np.sign(np.subtract.outer(v, v))[upper] for v in (np.asarray(x), np.asarray(y))]
    counted = math.prod(int(np.count_nonzero(s)) for s in signs)
    if counted == 0:
        return math.nan
    return float(np.sum(signs[0] * signs[1])) / math.sqrt(counted)


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Measured time of the plan ranked first over the best measured one, minus one."""
    return measured[int(np.argmin(predicted))] / min(measured) - 1.0


def ranking(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over the groups of (time) rows that differ in their plan alone, and each group."""
    groups: dict[tuple[Any, ...], list[Outcome]] = {}
    for outcome in outcomes:
        row, plan = outcome.case.row, outcome.prediction.candidate.plan
        job = (
            row.source, row.model, row.hardware, row.gpus, plan.workload.global_batch_seqs,
            row.seq_len, row.note("release") or "", row.note("task") or "",
        )  # fmt: skip
        groups.setdefault(job, []).append(outcome)
    found: list[dict[str, Any]] = []
    for job, members in sorted(groups.items(), key=lambda item: item[0]):
        labels = {member.prediction.candidate.plan.label for member in members}
        if len(members) < LEAST_ROWS or len(labels) < 2:
            continue
        predicted = [member.prediction.step_s.median for member in members]
        measured = [measured_seconds(member) for member in members]
        tau = kendall_tau_b(predicted, measured)
        found.append({
            "source": job[0], "model": job[1], "gpus": job[3], "rows": len(members),
            "regret": regret(predicted, measured), "kendall_tau": _or_none(tau),
        })  # fmt: skip
    return {
        "groups": len(found),
        "mean_regret": _mean([group["regret"] for group in found]),
        "kendall_tau": _mean([g["kendall_tau"] for g in found if g["kendall_tau"] is not None]),
        "by_group": found,
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
