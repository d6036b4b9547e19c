"""A plan executed by real processes, measured, and written down."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from forerun import Measurement, PlanFile, document
from forerun.estimate import MEMORY_TERMS, TIME_TERMS
from forerun.executors import launch, tune
from forerun.executors.measure import report

FP32 = 4


def with_learning_rate(plan_file: PlanFile, learning_rate: float) -> PlanFile:
    replace = msgspec.structs.replace
    workload = replace(plan_file.plan.workload, learning_rate=learning_rate)
    return replace(plan_file, plan=replace(plan_file.plan, workload=workload))


def test_two_processes_learn_and_everything_is_measured(
    plan_file: PlanFile, tmp_path: Path
) -> None:
    """20 steps of DDP on real text; counted terms against what this plan must give."""
    plan_file = with_learning_rate(plan_file, 3e-3)
    seen: list[tuple[int, int]] = []
    measured = launch.run(
        plan_file,
        steps=20,
        warmup_steps=2,
        output=tmp_path / "measured.json",
        on_progress=lambda step, steps, loss: seen.append((step, steps)),
        log_dir=tmp_path / "logs",
    )
    assert seen == [(step, 22) for step in range(1, 23)]
    assert len(measured.steps) == 20 and len(measured.loss) == 22
    assert measured.loss[0] == pytest.approx(math.log(256), rel=0.02), "random bytes at first"
    assert measured.loss[-1] < measured.loss[0] - 0.5, "it learns"
    assert min(measured.steps) <= measured.step_s.p10 <= measured.step_s.median
    assert measured.step_s.median <= measured.step_s.p90 <= max(measured.steps)

    parameter_bytes = plan_file.plan.model.num_params * FP32
    assert measured.bytes_on_wire == {"all_reduce@dp": parameter_bytes}
    assert set(measured.time_terms_s) == set(TIME_TERMS)
    assert sum(measured.time_terms_s.values()) == pytest.approx(measured.step_s.median)
    for name in ("forward", "backward", "optimizer", "exposed.dp"):
        assert measured.time_terms_s[name] > 0, name
    assert measured.time_terms_s["exposed.pp"] == measured.time_terms_s["bubble"] == 0

    memory = measured.memory_terms_bytes
    assert set(memory) == set(MEMORY_TERMS)
    assert memory["parameters"] == parameter_bytes
    num_tensors = 2 * 9 + 3
    assert memory["optimizer"] == 2 * parameter_bytes + num_tensors * FP32  # and step counters
    live = sum(n for name, n in memory.items() if name not in ("context", "fragmentation"))
    assert live == measured.peak_memory_bytes
    assert measured.process_peak_bytes >= memory["context"] + live
    assert [rank.coordinates["dp_replicate"] for rank in measured.ranks] == [0, 1]
    assert measured.environment["backend"] == "gloo" and measured.environment["date"]

    assert document.read(Measurement, tmp_path / "measured.json") == measured
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["measured.json"]
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {
        "agent.log", "rank-0.log", "rank-1.log",
    }  # fmt: skip


def result(
    rank: int, steps_s: tuple[float, ...], profiled_s: float, peak: int
) -> report.RankResult:
    return report.RankResult(
        rank=rank,
        coordinates={"pp": rank},
        steps_s=steps_s,
        loss=(5.0,),
        peak_memory_bytes=peak,
        process_peak_bytes=1000 + peak,
        context_bytes=700,
        live_bytes={"parameters": peak},
        profiled_s={"forward": profiled_s},
        bytes_on_wire={"send@pp": 10.0 * (1 - rank)},
        environment={},
    )


def test_report_takes_slowest_step_fullest_rank_and_mean_terms(plan_file: PlanFile) -> None:
    results = [result(0, (1.0, 4.0, 2.0), 6.0, 100), result(1, (3.0, 1.0, 2.5), 12.0, 200)]
    measured = report.measurement(plan_file.plan, "label", results, {"date": "today"})
    assert measured.steps == (3.0, 4.0, 2.5) and measured.step_s.median == 3.0
    assert measured.tokens_per_s == plan_file.plan.workload.global_batch_tokens / 3.0
    assert measured.peak_memory_bytes == 200 and measured.process_peak_bytes == 1200
    assert measured.memory_terms_bytes["fragmentation"] == 300
    assert measured.bytes_on_wire == {"send@pp": 5.0}
    assert measured.time_terms_s["forward"] == pytest.approx((1.5 + 3.0) / 2)
    assert measured.time_terms_s["host"] == pytest.approx(1.5 / 2), "rank 0 waited for rank 1"
    assert sum(measured.time_terms_s.values()) == pytest.approx(3.0)


def test_tune_keeps_the_fastest_and_knows_the_noise(
    plan_file: PlanFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = plan_file, with_learning_rate(plan_file, 1e-3)
    medians = iter([4.0, 2.0, 5.0, 2.2])
    order: list[PlanFile] = []
    ticks: list[tuple[int, int]] = []

    def run(tried: PlanFile, **options: object) -> Measurement:
        order.append(tried)
        options["on_progress"](1, 3, 0.5)  # type: ignore[operator]
        steps_s = (next(medians),)
        results = [result(0, steps_s, 1.0, 1)]
        return report.measurement(tried.plan, tried.label, results, {})

    monkeypatch.setattr(launch, "run", run)
    winner, measured, noise = tune(
        [slow, fast], rounds=2, on_progress=lambda step, steps, _: ticks.append((step, steps))
    )
    assert order == [slow, fast, slow, fast], "in turns"
    assert winner == 1
    assert [m.step_s.median for m in measured] == [4.0, 2.0]
    assert noise == pytest.approx(1 / 4.5)
    assert ticks == [(1, 12), (4, 12), (7, 12), (10, 12)]
