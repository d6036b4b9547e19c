"""A plan executed by real processes, measured, and written down."""

from __future__ import annotations

import math
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import running

from forerun import InputError, Measurement, PlanFile, RunFailed, document
from forerun.estimate import MEMORY_TERMS, TIME_TERMS
from forerun.executors import job, launch
from forerun.executors.checkpoints import folder as checkpoints
from forerun.executors.machine import Nodes
from forerun.executors.measure import report
from forerun.executors.session import Session

FP32 = 4


def with_learning_rate(plan_file: PlanFile, learning_rate: float) -> PlanFile:
    replace = msgspec.structs.replace
    workload = replace(plan_file.plan.workload, learning_rate=learning_rate)
    return replace(plan_file, plan=replace(plan_file.plan, workload=workload))


class Learned:
    """A run of 20 steps of DDP on real text that others are compared with; run once."""

    def __init__(self, plan_file: PlanFile, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[int, int]] = []
        self.measured = launch.run(
            plan_file,
            steps=20,
            warmup_steps=2,
            output=folder / "measured.json",
            on_progress=lambda step, steps, loss: self.seen.append((step, steps)),
            log_dir=folder / "logs",
        )


KNOWN: list[Learned] = []


@pytest.fixture
def fast_learner(plan_file: PlanFile) -> PlanFile:
    return with_learning_rate(plan_file, 3e-3)


@pytest.fixture
def learned(fast_learner: PlanFile, tmp_path: Path) -> Learned:
    if not KNOWN:
        KNOWN.append(Learned(fast_learner, tmp_path))
    return KNOWN[0]


def test_two_processes_learn_and_everything_is_measured(
    fast_learner: PlanFile, learned: Learned
) -> None:
    """Counted terms against what this plan must give."""
    plan_file, measured, tmp_path = fast_learner, learned.measured, learned.folder
    assert learned.seen == [(step, 22) for step in range(1, 23)]
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


@pytest.mark.usefixtures("nothing_left_behind")
def test_killed_ranks_start_again_and_the_curve_is_that_of_one_run(
    fast_learner: PlanFile, learned: Learned, tmp_path: Path
) -> None:
    """Killed before the first checkpoint and after one; the second time nobody restarts them."""
    place, notes, seen = tmp_path / "checkpoints", list[str](), list[int]()
    to_kill = [0, 1]

    def kill(step: int, steps: int, loss: float) -> None:
        seen.append(step)
        kept = list(place.glob("step-*"))
        if (step == 2 and len(to_kill) == 2) or (to_kill == [0] and kept):
            running.kill_rank(to_kill.pop())

    training = job.Training(checkpoint=str(place), every=5, keep=1)
    ended = r"rank 0 was killed by SIGKILL after step \d+; other ranks were ended, add --resume"
    with pytest.raises(RunFailed, match=ended) as caught:
        launch.run(fast_learner, steps=20, on_progress=kill, on_note=notes.append,
                   training=training, max_restarts=1)  # fmt: skip
    assert "\n" not in str(caught.value)
    assert "warning: restart 1: a rank was lost; going on from step 0" in notes
    assert seen.count(1) == 2 and 20 not in seen
    (kept,) = checkpoints.steps(place)

    again = msgspec.structs.replace(training, resume=str(place))
    resumed = launch.run(fast_learner, steps=20, on_note=notes.append, training=again)
    assert f"note: going on from step {kept}" in notes
    assert resumed.loss == learned.measured.loss[:20]
    assert resumed.bytes_on_wire == learned.measured.bytes_on_wire
    assert len(resumed.steps) == max(1, 20 - kept - 3), "those of this start after its warm-up"


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left_behind")
def test_two_nodes_run_one_plan(fast_learner: PlanFile, learned: Learned) -> None:
    """Two launches that meet at a port; ranks count by the place of the node."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        rendezvous = f"localhost:{probe.getsockname()[1]}"
    nodes = [Nodes(num=2, node=node, rendezvous=rendezvous) for node in (0, 1)]
    with socket.socket() as taken:
        taken.bind(("", int(rendezvous.partition(":")[2])))
        taken.listen()
        with pytest.raises(InputError, match=f"rendezvous={rendezvous}: the port is in use"):
            launch.run(fast_learner, nodes=nodes[0])
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(launch.run, fast_learner, steps=3, warmup_steps=1, nodes=node)
                for node in nodes]  # fmt: skip
        first, second = (run.result() for run in runs)
    assert first.loss == second.loss == learned.measured.loss[:4]
    assert [rank.coordinates["dp_replicate"] for rank in first.ranks] == [0, 1]
    assert first.bytes_on_wire == learned.measured.bytes_on_wire


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


@pytest.mark.usefixtures("nothing_left_behind")
def test_a_session_runs_plan_after_plan_and_survives_a_failure(
    fast_learner: PlanFile, learned: Learned
) -> None:
    """Three plans on two processes, the second of which cannot be held."""
    model = msgspec.structs.replace(fast_learner.plan.model, vocab=2**42)
    plan = msgspec.structs.replace(fast_learner.plan, model=model)
    too_large = msgspec.structs.replace(fast_learner, plan=plan)
    started: list[int] = []
    with Session() as session:
        first = session.run(fast_learner, steps=2, warmup_steps=1)
        started += [process.pid for process in running.workers()]
        timed = session.run(fast_learner, steps=3, warmup_steps=0, counted=False)
        assert {process.pid for process in running.workers()} == set(started), "the same processes"
        with pytest.raises(RunFailed, match="ran out of memory"):
            session.run(too_large, steps=2, warmup_steps=0)
        again = session.run(fast_learner, steps=1, warmup_steps=0, counted=False)
    losses = learned.measured.loss
    assert [r.loss for r in first] == [losses[:3]] * 2 and [r.loss for r in timed] == [
        losses[:3]
    ] * 2
    assert [r.loss for r in again] == [losses[:1]] * 2
    assert len(timed[0].steps_s) == 3 and not timed[0].bytes_on_wire
    measured = report.measurement(fast_learner.plan, "label", first, {})
    assert measured.bytes_on_wire == learned.measured.bytes_on_wire
    assert measured.peak_memory_bytes == learned.measured.peak_memory_bytes
