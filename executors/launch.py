"""Running a plan on this machine: checks before, processes during, one clear line when it fails.

The parent never touches a tensor. It starts the agent (which starts one process per rank), follows
the progress file, and whatever happens - a rank lost, Ctrl-C, an error here - leaves no process and
no temporary file behind.
"""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from .. import document
from ..errors import InputError, RunFailed
from ..measurement import Measurement
from ..plan import Plan, PlanFile
from ..units import format_bytes
from . import corpus, emulation, failures, job
from .measure import report
from .processes import kill_tree, terminated_like_an_exit
from .support import check_executed

OnProgress = Callable[[int, int, float], None]
"""Hears (step, steps, loss) after every step, warm-up included."""

POLL_S = 0.05
NO_TEXT = b"\n"
"""The corpus of a module that makes its own batches: an empty file cannot be mapped."""

CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}
"""One thread per rank, and an allocator that keeps its pages, as in profiles: steadier steps."""

CUDA_ENVIRONMENT = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Segments that grow leave less memory between tensors: what is predicted to fit then does."""


def run(
    plan_file: PlanFile,
    *,
    steps: int | None = None,
    warmup_steps: int = 3,
    output: Path | None = None,
    data: str | None = None,
    on_progress: OnProgress | None = None,
    log_dir: Path | None = None,
    module: str | None = None,
    pace: str | None = None,
    pace_scale: float | None = None,
) -> Measurement:
    """What a plan really does on this machine.

    `steps` timed steps (default: the phase's) follow `warmup_steps`; a few more are counted and
    profiled. `data` takes the place of the workload's. The Measurement is written to `output`, and
    the ranks' own output kept in `log_dir`, when given. `module` names the function that made a
    traced plan's module: it is imported because the caller asks for it, never because of the plan.

    With `pace` (see `emulation.emulated`) CPU processes run the plan and hold every chunk to the
    time predicted for that device, times `pace_scale`; the Measurement is in the device's seconds
    and marked as emulated.

    Raises InputError for a plan or text that cannot be run here, RunFailed when a rank is lost,
    memory or disk runs out or the loss diverges; Ctrl-C and SIGTERM end all ranks and pass on.
    """
    plan = plan_file.plan
    plan.check()
    check_module(plan, module)
    check_executed(plan)
    _check_counts(steps, warmup_steps)
    paced = None
    if pace is None:
        device = check_machine(plan)
        check_memory(plan_file, device)
    else:
        device, paced = "cpu", emulation.prepare(plan, pace, pace_scale)
    data = data or plan.workload.data
    text = NO_TEXT
    if plan.model.traced is None or plan.model.traced.tokens:
        text = corpus.load(data)
        corpus.check_fits(text, plan.model, plan.phase.seq_tokens, data)
    work = job.Job(
        plan=plan,
        device=device,
        warmup_steps=warmup_steps,
        steps=plan.phase.steps if steps is None else steps,
        pace=paced,
    )
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with terminated_like_an_exit(), _folder() as folder:
        document.write_bytes(folder / job.CORPUS, text)
        document.write(folder / job.JOB, work)
        try:
            run_ranks(folder, plan_file, device, on_progress, module)
            results = [
                document.read(report.RankResult, folder / job.result_name(rank))
                for rank in range(plan.phase.mesh.world)
            ]
        finally:
            if log_dir is not None:
                _keep_logs(folder, log_dir)
    measured = report.measurement(plan, plan_file.label, results, {"date": date}, paced is not None)
    if output is not None:
        document.write(output, measured)
    return measured


def _check_counts(steps: int | None, warmup_steps: int) -> None:
    if steps is not None and steps < 1:
        raise InputError("steps", steps, "not positive", "give 1 or more")
    if warmup_steps < 0:
        raise InputError("warmup", warmup_steps, "negative", "give 0 or more")


def check_module(plan: Plan, module: str | None) -> None:
    """Raise InputError unless `module` is what a traced plan was made from, unchanged."""
    traced = plan.model.traced
    if traced is None and module is not None:
        raise InputError("model", module, f"the plan trains {plan.model.name}, no module of yours",
                         "drop --model")  # fmt: skip
    if traced is None:
        return
    if module is None:
        raise InputError("model", "(missing)",
                         f"the plan trains {traced.target}, and a plan never runs code by itself",
                         f"add --model {traced.target}")  # fmt: skip
    from .trace_module import trace

    if trace(module, traced.seq_tokens) != plan.model:
        raise InputError("model", module, f"is not {traced.target} as it was when it was planned",
                         f"give --model {traced.target}, or plan again")  # fmt: skip


def check_machine(plan: Plan) -> Literal["cpu", "cuda"]:
    """The kind of device to run on; raises InputError when this machine lacks what is planned."""
    needed = plan.cluster.num_devices
    names = ", ".join(dict.fromkeys(pool.device.name for pool in plan.cluster.pools))
    if sum(pool.num_nodes for pool in plan.cluster.pools) > 1:
        raise InputError("gpus", f"{needed} x {names}", "several nodes, and this machine is one",
                         "plan again for one node, such as --gpus 2xcpu")  # fmt: skip
    if plan.cluster.pools[0].device.kind == "cpu":
        return "cpu"
    found = num_cuda_devices()
    if found < needed:
        raise InputError("gpus", f"{needed} x {names}", f"this machine has {found} CUDA devices",
                         "run there, or plan again with --gpus 2xcpu")  # fmt: skip
    return "cuda"


def num_cuda_devices() -> int:
    """CUDA devices of this machine."""
    import torch

    return torch.cuda.device_count()


def check_memory(plan_file: PlanFile, device: str) -> None:
    """Raise RunFailed when the predicted peaks of all ranks exceed the memory that is free."""
    if device != "cpu":
        return
    num_ranks = plan_file.plan.phase.mesh.world
    predicted_bytes = plan_file.estimate.peak_memory_bytes.median
    available_bytes = failures.available_bytes()
    if predicted_bytes * num_ranks > available_bytes:
        raise RunFailed(
            f"memory={format_bytes(predicted_bytes * num_ranks)}: predicted for {num_ranks} ranks, "
            f"but {format_bytes(available_bytes)} are free "
            f"({predicted_bytes * num_ranks:.0f} against {available_bytes} bytes); "
            "lower --micro-batch, use --recompute full, or free memory"
        )


def run_ranks(
    folder: Path,
    plan_file: PlanFile,
    device: str,
    on_progress: OnProgress | None,
    module: str | None = None,
) -> None:
    """Run all ranks to their end; raises what ended them when that was not well."""
    num_ranks = plan_file.plan.phase.mesh.world
    command = [sys.executable, "-m", "forerun.executors.agent", str(folder), str(num_ranks)]
    command += [module] if module is not None else []
    oom_kills = failures.num_oom_kills()
    with (folder / "agent.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(device, folder),
            start_new_session=True,  # Ctrl-C comes to the parent alone, which ends the others
        )
        try:
            progress = _follow(process, folder / job.PROGRESS, on_progress)
        finally:
            kill_tree(process)
    if process.returncode != 0:
        killed_for_memory = failures.num_oom_kills() > oom_kills
        raise failures.explain(folder, plan_file, progress, killed_for_memory)


def _follow(process: subprocess.Popen[bytes], path: Path, on_progress: OnProgress | None) -> int:
    """Pass on progress until the process ends; returns the last step that was done."""
    position, last = 0, 0
    while True:
        ended = process.poll() is not None
        new = _whole_lines(path, position)
        position += len(new)
        for line in new.splitlines():
            step, steps, loss = document.parse_json(line, str(path))
            last = step
            if on_progress is not None:
                on_progress(step, steps, loss)
        if ended:
            return last
        time.sleep(POLL_S)


def _whole_lines(path: Path, position: int) -> bytes:
    """What a file holds beyond a position, up to its last line end; nothing without a file."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(position)
        new = file.read()
    return new[: new.rfind(b"\n") + 1]


def _environment(device: str, folder: Path) -> dict[str, str]:
    """The ranks' environment: forerun importable, threads settled, temporary files in `folder`."""
    environment = dict(os.environ, TMPDIR=str(folder))
    if device == "cuda":
        environment = CUDA_ENVIRONMENT | environment
    else:
        environment |= CPU_ENVIRONMENT
        if sys.platform.startswith("linux"):
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    root = str(Path(document.__file__).resolve().parent.parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{known}" if known else root
    return environment


@contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder for one run, removed at its end."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="forerun-run-"))
    except OSError as error:
        raise RunFailed(f"folder={tempfile.gettempdir()}: cannot write ({error.strerror}); "
                        "set TMPDIR to a writable place") from error  # fmt: skip
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep_logs(folder: Path, log_dir: Path) -> None:
    """Copy what the agent and the ranks printed."""
    log_dir.mkdir(parents=True, exist_ok=True)
    for rank, log in failures.rank_logs(folder).items():
        shutil.copyfile(log, log_dir / f"rank-{rank}.log")
    if (folder / "agent.log").exists():
        shutil.copyfile(folder / "agent.log", log_dir / "agent.log")
