"""diff: predicted against measured, joined on names."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from forerun import Estimate, InputError, Measurement, Plan, PlanFile, Profile, document
from forerun.costmodel.diff import diff, plan_digest
from forerun.measurement import REFERENCE_MATMUL, StepTimes

MeasurementOf = Callable[..., Measurement]


def test_a_run_as_predicted_has_no_error(
    plan_file: PlanFile, measurement_of: MeasurementOf
) -> None:
    comparison = diff(plan_file, measurement_of(plan_file))
    for part in ("step", "memory", "process"):
        assert comparison[part]["error"] == 0
    assert all(term["error"] == 0 for term in comparison["terms"])


def test_error_is_predicted_over_measured_minus_one(
    plan_file: PlanFile, measurement_of: MeasurementOf
) -> None:
    slow = measurement_of(
        plan_file, step_s=StepTimes(median=0.125, p10=0.12, p90=0.13), peak_memory_bytes=1000
    )
    comparison = diff(plan_file, slow)
    assert comparison["step"] == {
        "predicted_s": 0.10,
        "measured_s": 0.125,
        "error": pytest.approx(-0.2),
    }
    assert comparison["memory"]["error"] == pytest.approx(-0.1)


def test_memory_leaves_out_what_is_no_tensor(
    plan_file: PlanFile, measurement_of: MeasurementOf
) -> None:
    comparison = diff(plan_file, measurement_of(plan_file))
    assert comparison["memory"]["predicted_bytes"] == 900  # 1000 without fragmentation, context
    assert comparison["process"]["predicted_bytes"] == 1000


def test_every_name_of_either_side_is_a_term(
    plan_file: PlanFile, measurement_of: MeasurementOf
) -> None:
    measured = measurement_of(
        plan_file,
        time_terms_s={"forward": 0.04, "bubble": 0.01},
        bytes_on_wire={"all_reduce@dp": 4096.0, "send@pp": 10.0},
    )
    terms = {t["term"]: t for t in diff(plan_file, measured)["terms"]}
    estimate = plan_file.estimate
    assert terms.keys() == {
        *estimate.time_terms_s,
        *estimate.memory_terms_bytes,
        *estimate.bytes_on_wire,
        "bubble",
        "send@pp",
    }
    assert terms["bubble"] | {"unit": "s"} == terms["bubble"]
    assert terms["send@pp"] == {
        "term": "send@pp",
        "unit": "bytes",
        "predicted": 0.0,
        "measured": 10.0,
        "error": -1.0,
    }
    assert terms["backward"]["error"] is None  # predicted, not measured: no ratio


def test_a_measurement_of_another_plan_is_refused(
    plan_file: PlanFile, measurement_of: MeasurementOf
) -> None:
    workload = msgspec.structs.replace(plan_file.plan.workload, seed=1)
    other = msgspec.structs.replace(
        plan_file, plan=msgspec.structs.replace(plan_file.plan, workload=workload)
    )
    with pytest.raises(InputError, match="another plan"):
        diff(plan_file, measurement_of(other))


def test_the_digest_survives_a_file(plan_file: PlanFile) -> None:
    once = document.from_json(PlanFile, document.to_json(plan_file), "memory")
    twice = document.from_json(PlanFile, document.to_json(once), "memory")
    assert plan_digest(once.plan) == plan_digest(twice.plan)


def test_repredict_prices_the_plan_with_the_profile_given(
    plan_file: PlanFile, measurement_of: MeasurementOf, profile: Profile
) -> None:
    today = msgspec.structs.replace(profile, name="today")
    priced: list[Plan] = []

    def price(plan: Plan) -> Estimate:
        priced.append(plan)
        step_s = msgspec.structs.replace(plan_file.estimate.step_s, median=0.2)
        return msgspec.structs.replace(plan_file.estimate, step_s=step_s)

    comparison = diff(
        plan_file, measurement_of(plan_file), repredict=True, profile=today, price=price
    )
    assert priced[0].cluster.profile == today
    assert comparison["step"]["error"] == pytest.approx(1.0)


def test_pace_takes_the_machines_drift_out_of_the_error(
    plan_file: PlanFile, profile: Profile, measurement_of: MeasurementOf
) -> None:
    """A machine at half its speed doubles the step; at that speed the prediction is right."""
    timed = msgspec.structs.replace(profile, host_s={REFERENCE_MATMUL: 0.001})
    cluster = msgspec.structs.replace(plan_file.plan.cluster, profile=timed)
    plan = msgspec.structs.replace(plan_file.plan, cluster=cluster)
    known = msgspec.structs.replace(plan_file, plan=plan)
    slow = measurement_of(
        known,
        step_s=StepTimes(median=0.2, p10=0.2, p90=0.2),
        environment={REFERENCE_MATMUL: "0.002"},
    )
    comparison = diff(known, slow)
    assert comparison["step"]["error"] == pytest.approx(-0.5)
    assert comparison["pace"] == {"slowdown": 2.0, "error": pytest.approx(0.0)}
    assert diff(plan_file, measurement_of(plan_file))["pace"] is None
