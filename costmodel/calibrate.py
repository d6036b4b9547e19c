"""Fold measured runs back into a machine's profile: one correction per time term."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ..cluster import Profile
from ..errors import InputError
from ..estimate import TIME_TERMS, Estimate
from ..measurement import Measurement
from ..plan import PlanFile
from .diff import Price, _price, check_same_plan, with_profile

SMALLEST_SHARE = 0.02
"""Terms below this share of a step are left alone: their ratio is noise."""
LIMITS = (0.25, 4.0)
"""A correction beyond these says that the model or the run is wrong, not the machine's speed."""
DERIVED = ("bubble",)
"""Terms that follow from the others: correcting them too would count an error twice."""


def calibrate(
    profile: Profile,
    runs: Sequence[tuple[PlanFile, Measurement]],
    *,
    price: Price | None = None,
) -> Profile:
    """The profile with its `scale` and `spread` corrected by n measured runs.

    Each run's plan is priced with this profile (its scale included). For every time term t that
    makes up more than 2 % of the step on both sides, over the runs R_t that have it,

        ratio_t = exp(mean over R_t of log(measured_t / predicted_t))
        scale_t <- clip(scale_t * ratio_t ** (|R_t| / (|R_t| + 1)), 1/4, 4)

    The exponent damps: one run moves a term half of the way (on a log scale), four runs 4/5 of it,
    and giving the same runs again converges instead of compounding. `bubble` follows from the
    other terms and is not scaled. The residual of a run is the log of its measured step over its
    terms with the new scale; with the weight w = n / (n + 1),

        spread <- sqrt((1 - w) spread**2 + w mean(residual**2))

    widens or narrows the intervals of later predictions. Raises InputError when no run is given,
    or when a measurement does not belong to its plan or to the profile's device.
    """
    if not runs:
        raise InputError("runs", "[]", "nothing to learn from", "give a plan and its measurement")
    for plan_file, measurement in runs:
        check_same_plan(plan_file, measurement)
        _check_device(profile, plan_file)
    estimates = [(price or _price)(with_profile(p.plan, profile)) for p, _ in runs]
    measured = [measurement for _, measurement in runs]
    factors = _factors(profile, estimates, measured)
    scale = profile.scale | {t: profile.scale.get(t, 1.0) * f for t, f in factors.items()}
    residuals = [_residual(e, m, factors) for e, m in zip(estimates, measured, strict=True)]
    weight = len(runs) / (len(runs) + 1)
    variance = (1 - weight) * profile.spread**2 + weight * _mean([r * r for r in residuals])
    return msgspec.structs.replace(
        profile, scale=dict(sorted(scale.items())), spread=math.sqrt(variance)
    )


def _check_device(profile: Profile, plan_file: PlanFile) -> None:
    devices = [pool.device.name for pool in plan_file.plan.cluster.pools]
    if profile.device not in devices:
        raise InputError(
            "device",
            profile.device,
            f"{plan_file.label} ran on {', '.join(devices)}",
            "calibrate the profile of that device",
        )


def _factors(
    profile: Profile, estimates: Sequence[Estimate], measured: Sequence[Measurement]
) -> dict[str, float]:
    """What to multiply each term's scale by; terms without a usable run are absent."""
    factors: dict[str, float] = {}
    for term in TIME_TERMS:
        logs = [
            math.log(m.time_terms_s[term] / e.time_terms_s[term])
            for e, m in zip(estimates, measured, strict=True)
            if term not in DERIVED
            and _weighs(term, e.time_terms_s, e.step_s.median)
            and _weighs(term, m.time_terms_s, m.step_s.median)
        ]
        if logs:
            before = profile.scale.get(term, 1.0)
            moved = before * math.exp(_mean(logs) * len(logs) / (len(logs) + 1))
            factors[term] = min(max(moved, LIMITS[0]), LIMITS[1]) / before
    return factors


def _weighs(term: str, terms_s: Mapping[str, float], step_s: float) -> bool:
    return terms_s.get(term, 0.0) > SMALLEST_SHARE * step_s


def _residual(estimate: Estimate, measurement: Measurement, factors: Mapping[str, float]) -> float:
    """Log of the measured step over the step with the new scale."""
    predicted_s = sum(s * factors.get(t, 1.0) for t, s in estimate.time_terms_s.items())
    return math.log(measurement.step_s.median / predicted_s)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
