"""Paced ranks: a plan for GPUs on CPU processes, its chunks held to the GPUs' predicted times."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from forerun import InputError, PlanFile, document
from forerun.catalogs import load_cluster
from forerun.cli.layout import fixed_plan
from forerun.cli.report import report_html
from forerun.costmodel import estimate
from forerun.costmodel.chunk_times import chunk_times
from forerun.costmodel.diff import diff
from forerun.executors import emulation, launch
from forerun.measurement import Measurement
from forerun.model import Layer, Model
from forerun.planner import Pins
from forerun.workload import Workload

MODEL = Model(
    name="small",
    hidden=32,
    vocab=256,
    layers=(Layer(repeat=4, heads=2, kv_heads=2, head_dim=16, ffn_hidden=64),),
)


def on(gpus: str, **axes: object) -> PlanFile:
    workload = Workload(seq_tokens=32, global_batch_seqs=4, steps=2, clip_norm=1.0)
    pins = Pins(**axes)  # type: ignore[arg-type]
    plan = fixed_plan(MODEL, load_cluster(gpus), workload, pins)
    return PlanFile(label=plan.label, plan=plan, estimate=estimate(plan))


def test_a_plan_for_gpus_is_emulated(tmp_path: Path) -> None:
    plan_file = on("2xH100", pp=2, vpp=2, schedule="zb-v")
    times = chunk_times(plan_file.plan)
    measured = launch.run(
        plan_file, pace="plan", pace_scale=20.0, warmup_steps=0, output=tmp_path / "measured.json"
    )
    assert document.read(Measurement, tmp_path / "measured.json") == measured
    assert measured.emulated and measured.environment["emulated_device"] == "H100-SXM-80GB"
    assert len(measured.steps) == 2 and len(measured.loss) == 4
    assert measured.loss[-1] < measured.loss[0]
    # no chunk is shorter than predicted, whatever the machine is busy with
    assert measured.step_s.median > 0.98 * times.step_s
    assert sum(measured.time_terms_s.values()) == pytest.approx(measured.step_s.median)
    busy_s = [sum(sum(terms.values()) for key, terms in rank.items()) for rank in times.by_rank]
    assert min(busy_s) > 0
    assert measured.time_terms_s["bubble"] > 0 and measured.time_terms_s["exposed.pp"] > 0
    assert measured.bytes_on_wire == pytest.approx(plan_file.estimate.bytes_on_wire)
    compared = diff(plan_file, measured)
    assert compared["emulated"]["device"] == "H100-SXM-80GB"
    assert "emulated: chunks held to the times of H100-SXM-80GB" in report_html(compared)


@pytest.mark.parametrize(
    ("pace", "scale", "problem"),
    [
        ("H1000", None, "gpus=H1000: unknown name"),
        ("plan", 0.0, "pace-scale=0.0: not positive"),
        ("nothing.json", None, "file=nothing.json"),
    ],
)
def test_what_cannot_be_emulated(pace: str, scale: float | None, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        launch.run(on("2xH100", pp=2), pace=pace, pace_scale=scale)


def test_a_model_too_large_for_here_is_refused() -> None:
    plan_file = on("2xH100", pp=2)
    model = replace(plan_file.plan.model, vocab=2**36)
    plan = replace(plan_file.plan, model=model)
    with pytest.raises(InputError, match=r"pace=small: 2 processes with the whole model need"):
        launch.run(replace(plan_file, plan=plan), pace="plan")


def test_another_device_takes_the_place_of_the_plans_own() -> None:
    plan = on("2xcpu", pp=2).plan
    emulated = emulation.emulated(plan, "H100")
    assert emulated.cluster.pools[0].device.name == "H100-SXM-80GB"
    emulated.check()
    own = emulation.emulated(plan, "plan")
    assert own.cluster.pools[0].shared_cores is None
    assert plan.cluster.pools[0].shared_cores is not None
