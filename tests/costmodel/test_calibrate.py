"""calibrate: one damped correction per time term."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import pytest

from forerun import Estimate, InputError, Measurement, Plan, PlanFile, Profile
from forerun.costmodel.calibrate import LIMITS, calibrate
from forerun.measurement import StepTimes

MeasurementOf = Callable[..., Measurement]
Price = Callable[[Plan], Estimate]


@pytest.fixture
def price(plan_file: PlanFile) -> Price:
    """A cost model that multiplies its time terms by the profile's scale."""
    base = plan_file.estimate

    def estimate(plan: Plan) -> Estimate:
        assert plan.cluster.profile is not None
        scale = plan.cluster.profile.scale
        terms_s = {t: s * scale.get(t, 1.0) for t, s in base.time_terms_s.items()}
        step_s = msgspec.structs.replace(base.step_s, median=sum(terms_s.values()))
        return msgspec.structs.replace(base, step_s=step_s, time_terms_s=terms_s)

    return estimate


def slowed(plan_file: PlanFile, measurement_of: MeasurementOf, **factor: float) -> Measurement:
    """A run whose terms took `factor` times what was predicted."""
    base = plan_file.estimate.time_terms_s
    terms_s = {t: s * factor.get(t.replace(".", "_"), 1.0) for t, s in base.items()}
    step_s = sum(terms_s.values())
    return measurement_of(
        plan_file,
        time_terms_s=terms_s,
        step_s=StepTimes(median=step_s, p10=step_s, p90=step_s),
    )


def test_one_run_moves_a_term_half_of_the_way(
    plan_file: PlanFile, measurement_of: MeasurementOf, profile: Profile, price: Price
) -> None:
    run = slowed(plan_file, measurement_of, backward=1.44)
    after = calibrate(profile, [(plan_file, run)], price=price)
    assert after.scale["backward"] == pytest.approx(1.2)
    assert after.scale["forward"] == pytest.approx(1.0)


def test_more_runs_weigh_more(
    plan_file: PlanFile, measurement_of: MeasurementOf, profile: Profile, price: Price
) -> None:
    run = slowed(plan_file, measurement_of, backward=1.5)
    after = calibrate(profile, [(plan_file, run)] * 4, price=price)
    assert after.scale["backward"] == pytest.approx(1.5**0.8)


def test_runs_are_averaged_geometrically(
    plan_file: PlanFile, measurement_of: MeasurementOf, profile: Profile, price: Price
) -> None:
    runs = [(plan_file, slowed(plan_file, measurement_of, forward=factor)) for factor in (2.0, 0.5)]
    assert calibrate(profile, runs, price=price).scale["forward"] == pytest.approx(1.0)


def test_calibrating_again_converges_on_the_truth(
    plan_file: PlanFile, measurement_of: MeasurementOf, profile: Profile, price: Price
) -> None:
    run = slowed(plan_file, measurement_of, forward=1.3, exposed_dp=0.7)
    for _ in range(20):
        profile = calibrate(profile, [(plan_file, run)], price=price)
    assert profile.scale["forward"] == pytest.approx(1.3, rel=1e-4)
    assert profile.scale["exposed.dp"] == pytest.approx(0.7, rel=1e-4)


def test_small_terms_and_the_bubble_are_left_alone(
    plan_file: PlanFile, measurement_of: MeasurementOf, profile: Profile, price: Price
) -> None:
    run = slowed(plan_file, measurement_of, host=50.0)  # 1 % of the predicted step
    assert "host" not in calibrate(profile, [(plan_file, run)], price=price).scale


def test_the_spread_follows_the_residuals(
    plan_file: PlanFile, measurement_of: MeasurementOf, profile: Profile, price: Price
) -> None:
    exact = slowed(plan_file, measurement_of)
    narrowed = calibrate(profile, [(plan_file, exact)] * 3, price=price)
    assert narrowed.spread == pytest.approx(profile.spread / 2)  # sqrt(1 - 3/4)
    erratic = [
        (plan_file, slowed(plan_file, measurement_of, forward=f, backward=f)) for f in (2.0, 0.5)
    ]
    assert calibrate(profile, erratic, price=price).spread > 0.3


def test_corrections_stay_within_limits(
    plan_file: PlanFile, measurement_of: MeasurementOf, profile: Profile, price: Price
) -> None:
    run = slowed(plan_file, measurement_of, forward=1e4)
    after = calibrate(profile, [(plan_file, run)], price=price)
    assert after.scale["forward"] == LIMITS[1]
    assert math.isfinite(after.spread)


def test_runs_of_another_device_or_none_are_refused(
    plan_file: PlanFile, measurement_of: MeasurementOf, profile: Profile, price: Price
) -> None:
    with pytest.raises(InputError, match="nothing to learn"):
        calibrate(profile, [], price=price)
    elsewhere = msgspec.structs.replace(profile, device="H100-SXM-80GB")
    with pytest.raises(InputError, match="H100"):
        calibrate(elsewhere, [(plan_file, measurement_of(plan_file))], price=price)
