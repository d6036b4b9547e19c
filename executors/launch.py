"""Running a plan on this machine: checks before, processes during, one clear line when it fails.

The parent never touches a tensor. It starts the agent (which starts one process per rank), follows
the progress file, and whatever happens - a rank lost, Ctrl-C, an error here - leaves no process and
no temporary file behind.
"""

from __future__ import annotations

import datetime
import hashlib
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

import msgspec

from .. import document
from ..errors import InputError, Interrupted, RunFailed
from ..measurement import Measurement
from ..plan import Plan, PlanFile
from . import corpus, emulation, failures, job, links, machine
from .checkpoints import folder as checkpoints
from .interrupts import Stop, stopping_gently
from .machine import Nodes
from .measure import report
from .processes import kill_tree, terminated_like_an_exit
from .support import check_executed, check_kept

OnProgress = Callable[[int, int, float], None]
"""Hears (step, steps, loss) after every step, warm-up included; steps is 0 where none were set."""
OnNote = Callable[[str], None]
"""Hears what a run has to say besides: a restart, a checkpoint that was not written."""

POLL_S = 0.05
GRACE_S = 30.0
"""What ranks get, after Ctrl-C or SIGTERM, to end their step and write a checkpoint."""
RESTARTS = 3
"""Default of a run with checkpoints; without them a lost rank ends the run."""
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
    on_note: OnNote | None = None,
    log_dir: Path | None = None,
    module: str | None = None,
    training: job.Training | None = None,
    max_restarts: int | None = None,
    grace_s: float = GRACE_S,
    nodes: Nodes | None = None,
    offload_folder: Path | None = None,
    base: Path | None = None,
    static_memory: Literal["report", "run"] | None = None,
    pace: str | None = None,
    pace_scale: float | None = None,
    emulate_links: bool = False,
) -> Measurement:
    """What a plan really does on this machine.

    `steps` timed steps (default: the phase's) follow `warmup_steps`; a few more are counted and
    profiled. `data` takes the place of the workload's. The Measurement is written to `output`, and
    the ranks' own output kept in `log_dir`, when given. `module` names the function that made a
    traced plan's module: it is imported because the caller asks for it, never because of the plan.
    `offload_folder` is where files of offloaded tensors lie; `base` holds a checkpoint, or
    quantised weights, that adapters train beside. `static_memory` has the run say what
    allocators need for a step's tensors, or use one arena for them as well.

    With `training`, training goes to step `steps` (default: the phase's, or no end where `training`
    has one), the first `warmup_steps` of which are not timed; lost ranks are started again from the
    last checkpoint, `max_restarts` times. With `nodes`, this machine runs its part of the plan.
    With `pace` (see `emulation.emulated`) CPU processes run the plan and hold every chunk to the
    time predicted for that device, times `pace_scale`; the Measurement is in the device's seconds
    and marked as emulated. With `emulate_links` all nodes of a plan are processes of this machine,
    and what they send one another goes no faster than the plan's link between nodes.

    Raises InputError for a plan or text that cannot be run here, RunFailed when a rank is lost,
    memory or disk runs out or the loss diverges. Ctrl-C and SIGTERM end all ranks and pass on; with
    checkpoints they end the step first, write one and raise Interrupted.
    """
    plan = plan_file.plan
    plan.check()
    machine.check_nodes(nodes)
    device = "cpu" if pace is not None else machine.check_machine(plan, nodes, emulate_links)
    machine.check_module(plan, module)
    check_executed(plan)
    _check_counts(steps, warmup_steps)
    if emulate_links:
        _check_alone(pace, nodes)
        links.check(plan, device)
    per_node = machine.ranks_per_node(plan, nodes, emulate_links)
    num_ranks = per_node[nodes.node if nodes is not None else 0]
    paced = None
    if pace is None:
        machine.check_memory(plan_file, device, num_ranks)
    else:
        if static_memory is not None:
            raise InputError("static-memory", static_memory, "says nothing of an emulated device",
                             "drop --pace or --static-memory")  # fmt: skip
        _check_paced(plan, pace, training, nodes)
        paced = emulation.prepare(plan, pace, pace_scale)
    machine.check_offload(plan_file, offload_folder)
    machine.check_base(plan, base)
    if training is not None:
        training = _absolute(training)
        if training.checkpoint is not None or training.resume is not None:
            check_kept(plan)
        if training.until_loss is None and training.until_s is None:
            steps = steps or plan.phase.steps
        machine.check_training(plan, steps, training)
    else:
        steps = plan.phase.steps if steps is None else steps
        steps, warmup_steps = whole_rounds(plan, steps, warmup_steps, on_note)
    text = text_of(plan, data)
    work = job.Job(
        plan=plan,
        device=device,
        warmup_steps=warmup_steps,
        steps=steps,
        static_memory=static_memory,
        offload_folder=None if offload_folder is None else str(offload_folder.absolute()),
        base=None if base is None else str(base.absolute()),
        pace=paced,
        emulates_links=emulate_links,
        training=training,
        started_s=time.time(),
        data_digest=hashlib.sha256(text).hexdigest() if text is not NO_TEXT else "",
        ranks_per_node=per_node if nodes is not None else (),
    )
    if max_restarts is None:
        max_restarts = RESTARTS if training is not None and training.checkpoint else 0
    launch = job.Launch(num_ranks=num_ranks, module=module, max_restarts=max_restarts)
    if nodes is not None:
        launch = msgspec.structs.replace(
            launch, num_nodes=nodes.num, node=nodes.node, rendezvous=nodes.rendezvous,
            address=machine.own_address(nodes),
        )  # fmt: skip
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with terminated_like_an_exit(), _lock(training, nodes), _folder() as folder:
        stop = None
        if training is not None and training.checkpoint is not None:
            stop = Stop(folder / job.STOP, grace_s)
        document.write_bytes(folder / job.CORPUS, text)
        document.write(folder / job.JOB, work)
        document.write(folder / job.LAUNCH, launch)
        try:
            with stopping_gently(stop):
                run_ranks(folder, plan_file, launch, device, stop, on_progress, on_note)
            _check_end(folder, training)
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


def whole_rounds(
    plan: Plan, steps: int, warmup_steps: int, on_note: OnNote | None = None
) -> tuple[int, int]:
    """Timed steps and those before them, such that what is timed is typical of a long run.

    Replicas that train apart are timed over whole rounds, from the first one on in which what was
    sent before is used; `on_note` hears it where that takes more steps than were asked for.
    """
    local = plan.phase.local_sgd
    if local is None:
        return steps, warmup_steps
    before = -(-max(warmup_steps, local.period + local.steps_late) // local.period) * local.period
    whole = -(-steps // local.period) * local.period
    if (whole, before) != (steps, warmup_steps) and on_note is not None:
        on_note(f"note: {before} steps, then {whole} timed ones: whole rounds of {local.period}")
    return whole, before


def text_of(plan: Plan, data: str | None) -> bytes:
    """What a plan is trained on: `data`, or what its workload names."""
    if plan.model.traced is not None and not plan.model.traced.tokens:
        return NO_TEXT
    data = data or plan.workload.data
    text = corpus.load(data)
    corpus.check_fits(text, plan.model, plan.phase.seq_tokens, data)
    return text


def _check_counts(steps: int | None, warmup_steps: int) -> None:
    if steps is not None and steps < 1:
        raise InputError("steps", steps, "not positive", "give 1 or more")
    if warmup_steps < 0:
        raise InputError("warmup", warmup_steps, "negative", "give 0 or more")


def _check_paced(plan: Plan, pace: str, training: job.Training | None, nodes: Nodes | None) -> None:
    """Raise InputError for what a paced run, which only measures, on one machine, does not do."""
    if plan.phase.local_sgd is not None:
        raise InputError("pace", pace, "holds a step's chunks, and replicas that train apart meet "
                         "between steps", "leave it out, or --local-sgd in the plan")  # fmt: skip
    for field, value in (("training", training), ("nnodes", nodes and nodes.num)):
        if value is not None:
            raise InputError("pace", pace, f"a paced run takes no {field}: it emulates, here, and "
                             "keeps nothing", "leave out --checkpoint, --until, --metrics, "
                             "--tensorboard and --nnodes")  # fmt: skip


def _check_alone(pace: str | None, nodes: Nodes | None) -> None:
    """Raise InputError for what emulated links do not go with."""
    for field, value in (("pace", pace), ("nnodes", nodes and nodes.num)):
        if value is not None:
            raise InputError("emulate-links", "on", f"{field}={value}: all nodes are emulated here,"
                             " at the speed of this machine", f"drop --{field}")  # fmt: skip


def _absolute(training: job.Training) -> job.Training:
    """The same with paths that hold in any folder."""
    names = ("checkpoint", "resume", "metrics", "tensorboard")
    given = {name: getattr(training, name) for name in names}
    return msgspec.structs.replace(
        training, **{name: os.path.abspath(path) for name, path in given.items() if path}
    )


@contextmanager
def _lock(training: job.Training | None, nodes: Nodes | None) -> Iterator[None]:
    """Keep other runs out of the folder of checkpoints; node 0 does so for all."""
    mine = nodes is None or nodes.node == 0
    if training is None or training.checkpoint is None or not mine:
        yield
        return
    with checkpoints.locked(Path(training.checkpoint)):
        yield


def _check_end(folder: Path, training: job.Training | None) -> None:
    """Raise Interrupted when training was told to stop."""
    if training is None:
        return
    end = document.read(job.End, folder / job.END)
    if end.reason == "interrupted":
        raise Interrupted(f"interrupted after step {end.step}: {end.checkpoint} is written; "
                          "add --resume to go on")  # fmt: skip


def run_ranks(
    folder: Path,
    plan_file: PlanFile,
    launch: job.Launch,
    device: str,
    stop: Stop | None,
    on_progress: OnProgress | None,
    on_note: OnNote | None,
) -> None:
    """Run this machine's ranks to their end; raises what ended them when that was not well."""
    oom_kills = failures.num_oom_kills()
    process = start_agent(folder, launch, device)
    try:
        progress = follow(process, folder / job.PROGRESS, stop, on_progress, on_note)
    finally:
        kill_tree(process)
    final = any(failure.is_final for failure in job.failures(folder))
    if process.returncode != 0 or final:
        killed_for_memory = failures.num_oom_kills() > oom_kills
        remedy = "run again" if stop is None else "add --resume to go on from the last checkpoint"
        raise failures.explain(folder, plan_file, progress, killed_for_memory, remedy)


def start_agent(folder: Path, launch: job.Launch, device: str) -> subprocess.Popen[bytes]:
    """The agent of a run, which starts its ranks; `kill_tree` ends them all."""
    with (folder / "agent.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "forerun.executors.agent", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(device, folder, launch),
            start_new_session=True,  # Ctrl-C comes to the parent alone, which ends the others
        )


def follow(
    process: subprocess.Popen[bytes],
    path: Path,
    stop: Stop | None,
    on_progress: OnProgress | None,
    on_note: OnNote | None,
    is_over: Callable[[], bool] = lambda: False,
) -> int:
    """Pass on progress until the process ends or `is_over`; returns the last step that was done."""
    position, last = 0, 0
    while True:
        ended = process.poll() is not None or is_over()
        new = _whole_lines(path, position)
        position += len(new)
        for line in new.splitlines():
            said = document.parse_json(line, str(path))
            if isinstance(said, dict):
                if on_note is not None:
                    on_note(said["note"])
                continue
            step, steps, loss = said
            last = step
            if on_progress is not None:
                on_progress(step, steps, loss)
        if ended:
            return last
        if stop is not None and stop.is_overdue:
            raise Interrupted(f"interrupted after step {last}: the ranks did not end within "
                              f"{stop.grace_s:g} s and were killed; add --resume to go on from the "
                              "last checkpoint")  # fmt: skip
        time.sleep(POLL_S)


def _whole_lines(path: Path, position: int) -> bytes:
    """What a file holds beyond a position, up to its last line end; nothing without a file."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(position)
        new = file.read()
    return new[: new.rfind(b"\n") + 1]


def _environment(device: str, folder: Path, launch: job.Launch) -> dict[str, str]:
    """The ranks' environment: forerun importable, threads settled, temporary files in `folder`."""
    environment = dict(os.environ, TMPDIR=str(folder))
    if device == "cuda":
        environment = CUDA_ENVIRONMENT | environment
    else:
        environment |= CPU_ENVIRONMENT
    if sys.platform.startswith("linux"):
        alone = launch.num_nodes == 1
        interface = "lo" if alone else machine.interface_of(launch.address)
        if interface is not None:
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    root = str(Path(document.__file__).resolve().parent.parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{known}" if known else root
    return environment


def make_folder() -> Path:
    """A temporary folder for the files of a run."""
    try:
        return Path(tempfile.mkdtemp(prefix="forerun-run-"))
    except OSError as error:
        raise RunFailed(f"folder={tempfile.gettempdir()}: cannot write ({error.strerror}); "
                        "set TMPDIR to a writable place") from error  # fmt: skip


@contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder for one run, removed at its end."""
    folder = make_folder()
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
