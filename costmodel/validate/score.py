"""Predictions against a table: one line per row, and a summary that a biased model cannot flatter.

Errors are relative and on step time, or on bytes for memory. Means are taken inside a source first,
then over sources, because tables differ a hundredfold in their number of rows. Rows of memory, and
rows with cells that had to be searched, are reported apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import InputError
from ...estimate import Interval
from .baseline import baseline_errors
from .build import build_cases
from .conventions import from_seconds, memory_unit_bytes, work
from .predict import Outcome, error_of, outcomes
from .ranking import ranking
from .table import Row, Unread


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One predicted row, in the unit of its metric."""

    outcome: Outcome
    error: float
    predicted: float
    low: float
    high: float

    @property
    def covered(self) -> bool:
        """Whether the measured value lies in the predicted 90 % interval."""
        return self.low <= self.outcome.case.row.value <= self.high

    @property
    def filled(self) -> tuple[str, ...]:
        """`cell=value` of the cells that were searched."""
        return self.outcome.prediction.candidate.filled


def validate(rows: Sequence[Row | Unread]) -> dict[str, Any]:
    """The document that `forerun validate` prints; raises InputError when no row can be read."""
    found = outcomes(build_cases(rows))
    done = [outcome for outcome in found if isinstance(outcome, Outcome)]
    if not done:
        failed = next(outcome for outcome in found if isinstance(outcome, Unread))
        raise InputError("rows", len(found), f"none can be predicted; the first is {failed.id}",
                         failed.reason)  # fmt: skip
    scored = {id(outcome): _scored(outcome) for outcome in done}
    lines = [
        _unread_line(outcome) if isinstance(outcome, Unread) else _line(scored[id(outcome)])
        for outcome in found
    ]
    return {"rows": lines, "summary": _summary(found, list(scored.values()))}


def _scored(outcome: Outcome) -> Scored:
    low, median, high = _in_unit(outcome)
    return Scored(
        outcome=outcome,
        error=error_of(outcome.case, outcome.prediction),
        predicted=median,
        low=min(low, high),
        high=max(low, high),
    )


def _in_unit(outcome: Outcome) -> tuple[float, float, float]:
    """(low, median, high) of the prediction in the unit of the row's metric."""
    row, prediction = outcome.case.row, outcome.prediction
    if not row.is_time:
        return _triple(prediction.peak_memory_bytes, 1.0 / memory_unit_bytes(row))
    plan = prediction.candidate.plan
    device, batch = plan.cluster.pools[0].device, plan.workload.global_batch_seqs
    rate_work = work(row, outcome.case.model, device, batch)
    low, median, high = _triple(prediction.step_s, 1.0)
    return (
        from_seconds(row, low, rate_work),
        from_seconds(row, median, rate_work),
        from_seconds(row, high, rate_work),
    )


def _triple(interval: Interval, factor: float) -> tuple[float, float, float]:
    return interval.low * factor, interval.median * factor, interval.high * factor


def _line(scored: Scored) -> dict[str, Any]:
    row = scored.outcome.case.row
    plan = scored.outcome.prediction.candidate.plan
    changed = scored.outcome.prediction.candidate.changed
    notes = [f"filled: {', '.join(scored.filled)}"] if scored.filled else []
    note = "; ".join([*notes, *changed])
    return {
        "id": row.id, "source": row.source, "metric": row.metric, "measured": row.value,
        "predicted": scored.predicted, "low": scored.low, "high": scored.high,
        "ape": abs(scored.error), "note": note, "error": scored.error,
        "label": plan.label, "stack": plan.cluster.pools[0].stack.name,
        "fits": scored.outcome.prediction.fits,
    }  # fmt: skip


def _unread_line(unread: Unread) -> dict[str, Any]:
    return {
        "id": unread.id, "source": unread.source, "metric": unread.metric,
        "measured": unread.measured, "predicted": None, "low": None, "high": None,
        "ape": None, "note": unread.reason, "error": None, "label": None, "stack": None,
        "fits": None,
    }  # fmt: skip


def _summary(found: Sequence[Outcome | Unread], scored: Sequence[Scored]) -> dict[str, Any]:
    time = [s for s in scored if s.outcome.case.row.is_time]
    memory = [s for s in scored if not s.outcome.case.row.is_time]
    baseline = _by_source(time, baseline_errors([s.outcome for s in time]))
    sources: dict[str, Any] = {}
    for source, errors in _by_source(time, [s.error for s in time]).items():
        members = [s for s in time if s.outcome.case.row.source == source]
        sources[source] = {
            **_errors(errors, [s.covered for s in members]),
            "baseline_mean_ape": _mean_ape(baseline[source]),
        }
    return {
        **_totals(time),
        "rows": len(found),
        "scored": len(scored),
        "by_source": sources,
        "ranking": ranking([s.outcome for s in time]),
        "baseline_macro_mean_ape": _macro(baseline),
        "memory": {**_totals(memory), "by_source": {
            source: _errors(errors, [s.covered for s in memory
                                     if s.outcome.case.row.source == source])
            for source, errors in _by_source(memory, [s.error for s in memory]).items()
        }},
        "filled": _totals([s for s in time if s.filled]),
        "stated": _totals([s for s in time if not s.filled]),
    }  # fmt: skip


def _totals(scored: Sequence[Scored]) -> dict[str, Any]:
    """Error statistics of some rows, with the mean over sources."""
    errors = [s.error for s in scored]
    return {
        **_errors(errors, [s.covered for s in scored]),
        "macro_mean_ape": _macro(_by_source(scored, errors)),
        "p90_ape": _quantile([abs(e) for e in errors], 0.9),
    }


def _errors(errors: Sequence[float], covered: Sequence[bool]) -> dict[str, Any]:
    """Rows, mean and median |error|, signed median error, share inside the interval."""
    sizes = [abs(e) for e in errors]
    return {
        "rows": len(errors),
        "mean_ape": _mean_ape(errors),
        "median_ape": _quantile(sizes, 0.5),
        "bias": _quantile(errors, 0.5),
        "coverage": sum(covered) / len(covered) if covered else None,
    }


def _by_source(scored: Sequence[Scored], errors: Sequence[float]) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {}
    for item, error in zip(scored, errors, strict=True):
        result.setdefault(item.outcome.case.row.source, []).append(error)
    return dict(sorted(result.items()))


def _macro(by_source: dict[str, list[float]]) -> float | None:
    """Mean over sources of the mean inside each."""
    means = [float(np.mean(np.abs(errors))) for errors in by_source.values()]
    return float(np.mean(means)) if means else None


def _mean_ape(errors: Sequence[float]) -> float | None:
    return float(np.mean(np.abs(errors))) if len(errors) else None


def _quantile(values: Sequence[float], fraction: float) -> float | None:
    return float(np.quantile(values, fraction)) if len(values) else None
