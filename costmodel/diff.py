"""Predicted against measured, joined on the names of the terms."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from .. import document
from ..cluster import Profile
from ..errors import InputError
from ..estimate import MEMORY_TERMS, TIME_TERMS, Estimate
from ..measurement import REFERENCE_MATMUL, Measurement
from ..plan import Plan, PlanFile

Price = Callable[[Plan], Estimate]

NOT_LIVE = ("fragmentation", "context")
"""Memory terms that are no tensors: the process has them, a count of live tensors has not."""


def plan_digest(plan: Plan) -> str:
    """SHA-256 of a plan's JSON: what a Measurement names its plan by."""
    return hashlib.sha256(document.to_json(plan)).hexdigest()


def diff(
    plan_file: PlanFile,
    measurement: Measurement,
    repredict: bool = False,
    *,
    profile: Profile | None = None,
    price: Price | None = None,
) -> dict[str, Any]:
    """The `diff` document: step time, memory and every term, each with its error.

        error = predicted / measured - 1          (None when nothing was measured)

    `step` compares the predicted median with the measured one. `memory` compares live tensors:
    the predicted terms without fragmentation and context, against the fullest rank's peak of
    tensor storage. `process` compares the whole predicted peak with the memory of the process.
    `emulated` says on which device chunks were held to their predicted time, if they were; memory
    is then that of the CPU processes. `pace` tells a drift of the machine apart from the model's
    error: the reference matmul during the run over that of the profile, and the step's error with
    the prediction slowed by it (None where either was not taken). With `repredict` the plan is
    priced again, with `profile` in place
    of its own where given.

    Raises InputError when the measurement belongs to another plan.
    """
    check_same_plan(plan_file, measurement)
    estimate = plan_file.estimate
    if repredict:
        estimate = (price or _price)(with_profile(plan_file.plan, profile))
    step = _pair("s", estimate.step_s.median, measurement.step_s.median)
    live_bytes = sum(n for t, n in estimate.memory_terms_bytes.items() if t not in NOT_LIVE)
    return {
        "label": plan_file.label,
        "emulated": emulated_as(measurement),
        "step": step,
        "pace": _pace(plan_file.plan, measurement, estimate.step_s.median),
        "memory": _pair("bytes", live_bytes, measurement.peak_memory_bytes),
        "process": _pair(
            "bytes", estimate.peak_memory_bytes.median, measurement.process_peak_bytes
        ),
        "terms": [
            *_terms("s", TIME_TERMS, estimate.time_terms_s, measurement.time_terms_s),
            *_terms(
                "bytes", MEMORY_TERMS, estimate.memory_terms_bytes, measurement.memory_terms_bytes
            ),
            *_terms("bytes", (), estimate.bytes_on_wire, measurement.bytes_on_wire),
            *_terms("bytes", (), estimate.bytes_copied, measurement.bytes_copied),
        ],
    }


def emulated_as(measurement: Measurement) -> dict[str, Any] | None:
    """What a paced run emulated: the device, and its seconds on the wall; None for a real run."""
    if not measurement.emulated:
        return None
    known = measurement.environment
    return {
        "device": known.get("emulated_device", ""),
        "scale": float(known.get("pace_scale", 1.0)),
        "late": float(known.get("pace_late", 0.0)),
        "simulated_step_s": float(known.get("simulated_step_s", 0.0)),
    }


def _pace(plan: Plan, measurement: Measurement, predicted_s: float) -> dict[str, float] | None:
    """How much slower than in the profile the machine was, and the error without that."""
    profile = plan.cluster.profile
    before_s = profile.host_s.get(REFERENCE_MATMUL) if profile is not None else None
    during = measurement.environment.get(REFERENCE_MATMUL)
    if before_s is None or during is None:
        return None
    slowdown = float(during) / before_s
    error = relative_error(predicted_s * slowdown, measurement.step_s.median)
    return {"slowdown": slowdown, "error": error if error is not None else 0.0}


def check_same_plan(plan_file: PlanFile, measurement: Measurement) -> None:
    """Raise InputError when a measurement was not taken of this plan."""
    expected = plan_digest(plan_file.plan)
    if measurement.plan_digest != expected:
        raise InputError(
            "plan_digest",
            measurement.plan_digest[:12],
            f"{measurement.label} was measured from another plan than "
            f"{plan_file.label} ({expected[:12]})",
            "give the plan file that was run, or run this one",
        )


def with_profile(plan: Plan, profile: Profile | None) -> Plan:
    """The plan, priced from now on by `profile` (unchanged for None)."""
    if profile is None:
        return plan
    cluster = msgspec.structs.replace(plan.cluster, profile=profile)
    return msgspec.structs.replace(plan, cluster=cluster)


def relative_error(predicted: float, measured: float) -> float | None:
    """predicted / measured - 1, or None when nothing was measured.

    >>> round(relative_error(1.1, 1.0), 6), relative_error(1.0, 0.0)
    (0.1, None)
    """
    return predicted / measured - 1 if measured else None


def _price(plan: Plan) -> Estimate:
    from . import estimate

    return estimate(plan)


def _pair(unit: str, predicted: float, measured: float) -> dict[str, float | None]:
    return {
        f"predicted_{unit}": predicted,
        f"measured_{unit}": measured,
        "error": relative_error(predicted, measured),
    }


def _terms(
    unit: str,
    order: Iterable[str],
    predicted: Mapping[str, float],
    measured: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One entry per name on either side: the known order first, then by name."""
    known = [name for name in order if name in predicted or name in measured]
    others = sorted((predicted.keys() | measured.keys()) - set(known))
    return [
        {
            "term": name,
            "unit": unit,
            "predicted": predicted.get(name, 0.0),
            "measured": measured.get(name, 0.0),
            "error": relative_error(predicted.get(name, 0.0), measured.get(name, 0.0)),
        }
        for name in (*known, *others)
    ]
