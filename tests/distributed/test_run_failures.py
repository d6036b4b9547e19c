"""Runs that fail: one line that says what happened, no process and no temporary file left."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from running import workers

from forerun import InputError, PlanFile, RunFailed, document
from forerun.executors import failures, job, launch, machine
from forerun.executors.processes import kill_tree, terminated_like_an_exit

replace = msgspec.structs.replace


pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def alone(plan_file: PlanFile, **workload: object) -> PlanFile:
    """The same on one process."""
    plan = plan_file.plan
    pool = replace(plan.cluster.pools[0], devices_per_node=1)
    phase = replace(plan.phase, mesh=replace(plan.phase.mesh, dp_replicate=1))
    changed = replace(
        plan,
        cluster=replace(plan.cluster, pools=(pool,)),
        workload=replace(plan.workload, global_batch_seqs=2, **workload),
        phases=(phase,),
    )
    return replace(plan_file, plan=changed)


def test_loss_that_is_not_a_number_stops_the_run(plan_file: PlanFile) -> None:
    with pytest.raises(RunFailed, match=r"loss=(nan|inf) at step \d+ on rank 0: training div"):
        launch.run(alone(plan_file, learning_rate=1e30), steps=50)


def test_memory_that_runs_out_is_reported_in_bytes(plan_file: PlanFile) -> None:
    """An embedding larger than the address space, under an estimate that did not see it coming."""
    plan_file = alone(plan_file)
    model = replace(plan_file.plan.model, vocab=2**42)
    plan_file = replace(plan_file, plan=replace(plan_file.plan, model=model))
    expected = r"rank 0 .* ran out of memory: predicted 1000 bytes .* \d+ bytes available"
    with pytest.raises(RunFailed, match=expected):
        launch.run(plan_file)


@pytest.mark.parametrize(
    ("number", "more"),
    [
        pytest.param(signal.SIGINT, (), marks=pytest.mark.slow),
        (signal.SIGTERM, ("--checkpoint", "kept")),
    ],
)
def test_ctrl_c_and_terminate_end_all_ranks(
    plan_file: PlanFile, tmp_path: Path, number: int, more: tuple[str, ...]
) -> None:
    document.write(tmp_path / "plan.json", alone(plan_file))
    command = [sys.executable, "-m", "forerun", "run", str(tmp_path / "plan.json"), "--steps"]
    root = str(Path(document.__file__).parents[1])
    with subprocess.Popen(
        [*command, "100000", *more],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=root),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # a test run in the background of a shell ignores Ctrl-C, and its children would as well
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        give_up_at = time.monotonic() + 300
        while not any("forerun.executors.worker" in p.cmdline() for p in workers()):
            assert process.poll() is None and time.monotonic() < give_up_at
            time.sleep(0.1)
        started = workers()
        os.killpg(process.pid, number)
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            raise
    assert process.returncode == 130, err.decode()
    assert out == b"" and b"Traceback" not in err
    if more:
        (step,) = [path.name for path in (tmp_path / "kept").glob("step-*")]
        assert re.search(
            rf"interrupted after step \d+: .*{step} is written; add --resume".encode(), err
        )
    assert psutil.wait_procs(started, timeout=60)[1] == []


def test_terminate_unwinds_a_run_that_keeps_nothing() -> None:
    with pytest.raises(SystemExit) as left, terminated_like_an_exit():
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 143


def test_full_disk_is_told_before_anything_starts(
    plan_file: PlanFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(document.os, "fsync", full)
    with pytest.raises(RunFailed, match=r"cannot write \(No space left on device\); free some"):
        launch.run(plan_file)


def test_unwritable_temporary_folder(plan_file: PlanFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(RunFailed, match=r"folder=/nowhere: cannot write .* TMPDIR"):
        launch.run(plan_file)


def test_gpus_that_this_machine_lacks(plan_file: PlanFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "num_cuda_devices", lambda: 1)
    pool = plan_file.plan.cluster.pools[0]
    pool = replace(pool, device=replace(pool.device, name="H100-SXM", kind="gpu"))
    cluster = replace(plan_file.plan.cluster, pools=(pool,))
    wanted = replace(plan_file, plan=replace(plan_file.plan, cluster=cluster))
    with pytest.raises(InputError, match="gpus=2 x H100-SXM: this machine has 1 CUDA devices; "):
        launch.run(wanted)


def test_several_nodes_are_refused(plan_file: PlanFile) -> None:
    pool = replace(plan_file.plan.cluster.pools[0], devices_per_node=1, num_nodes=2)
    cluster = replace(plan_file.plan.cluster, pools=(pool,))
    with pytest.raises(InputError, match="planned for 2 nodes, and this is 1"):
        launch.run(replace(plan_file, plan=replace(plan_file.plan, cluster=cluster)))


def test_prediction_beyond_free_memory_is_refused(plan_file: PlanFile) -> None:
    peak = replace(plan_file.estimate.peak_memory_bytes, median=1e15)
    wanted = replace(plan_file, estimate=replace(plan_file.estimate, peak_memory_bytes=peak))
    with pytest.raises(RunFailed, match=r"2000000000000000 against \d+ bytes"):
        launch.run(wanted)


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("warmup_steps", -1)])
def test_counts_below_their_least(plan_file: PlanFile, field: str, value: int) -> None:
    with pytest.raises(InputError, match=f"={value}: "):
        launch.run(plan_file, **{field: value})  # type: ignore[arg-type]


def test_empty_data_is_refused(plan_file: PlanFile, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=r"data=.*empty.txt: holds no text"):
        launch.run(plan_file, data=str(tmp_path / "empty.txt"))


def explained(folder: Path, plan_file: PlanFile, *errors: Exception) -> Exception:
    """What the parent raises when rank i failed with error i."""
    for rank, error in enumerate(errors):
        document.write(folder / job.failure_name(rank), job.describe(error, rank, step=3))
    return failures.explain(folder, plan_file, 3, killed_for_memory=False)


def test_lost_peers_do_not_hide_the_cause(plan_file: PlanFile, tmp_path: Path) -> None:
    peer = RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer [127.0.0.1]:1")
    cause = ValueError("boom")
    error = explained(tmp_path, plan_file, peer, cause)
    assert isinstance(error, RunFailed)
    assert "rank 1 at step 4 failed: ValueError: boom" in str(error)


def test_what_a_rank_said_keeps_its_kind(plan_file: PlanFile, tmp_path: Path) -> None:
    refused = InputError("cp", 2, "cannot be run yet", "use --cp 1")
    assert str(explained(tmp_path, plan_file, refused)) == str(refused)
    full = OSError(errno.ENOSPC, "No space left on device")
    assert "the disk is full" in str(explained(tmp_path, plan_file, full))
    assert "ran out of memory" in str(explained(tmp_path, plan_file, MemoryError()))


def test_kernel_kill_for_memory_names_bytes(plan_file: PlanFile, tmp_path: Path) -> None:
    exits = [job.Exit(rank=0, exit_code=-signal.SIGTERM), job.Exit(rank=1, exit_code=-9)]
    document.write_bytes(tmp_path / job.EXITS, document.to_json(exits))
    error = failures.explain(tmp_path, plan_file, 7, killed_for_memory=True)
    assert "rank 1 was killed by SIGKILL after step 7" in str(error)
    assert "predicted 1000 bytes" in str(error)
