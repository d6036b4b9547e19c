"""Why a run failed, in one line: which rank, how, at which step, and what to do about it.

When one rank goes, the others notice as a lost connection: such reports come last. What a rank said
itself comes first, then how its process ended, then the last line it printed.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from .. import document
from ..document import from_raw
from ..errors import ForerunError, InputError, RunFailed
from ..plan import PlanFile
from . import job

FULL_DISK_BYTES = 1024**2
"""Less free space than this is called a full disk."""


def available_bytes() -> int:
    """Memory of this machine that processes can still take, container limits not considered."""
    import psutil

    return psutil.virtual_memory().available


def num_oom_kills() -> int:
    """Processes that the kernel killed for want of memory since boot; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def explain(
    folder: Path,
    plan_file: PlanFile,
    last_step: int,
    killed_for_memory: bool,
    remedy: str = "run again",
    logs: Path | None = None,
) -> ForerunError:
    """The error to raise for a run whose agent failed.

    `remedy` is what to do about a lost rank; `logs` is the folder that the agent wrote into, where
    that is another.
    """
    said = sorted(job.failures(folder), key=lambda failure: failure.time_s)
    final = [failure for failure in said if failure.is_final]
    own = final or [failure for failure in said if failure.kind != "peer"]
    if own:
        return _from_failure(own[0], plan_file)
    lost = [end for end in _exits(folder) if end.exit_code < 0 and end.exit_code != -signal.SIGTERM]
    if lost:
        return _from_signal(lost[0], plan_file, last_step, killed_for_memory, remedy)
    if killed_for_memory:
        return _out_of_memory(f"the run was killed for want of memory after step {last_step}",
                              plan_file)  # fmt: skip
    if shutil.disk_usage(folder).free < FULL_DISK_BYTES:
        return RunFailed(f"disk={folder.parent}: full during the run at step {last_step}; "
                         "free some space or set TMPDIR")  # fmt: skip
    if said:
        return RunFailed(f"rank {said[0].rank} lost its connection after step {last_step}: "
                         f"{said[0].message}; {remedy}")  # fmt: skip
    return RunFailed(f"the ranks ended without a word after step {last_step}: "
                     f"{last_words(logs or folder)}; {remedy}")  # fmt: skip


def _from_failure(failure: job.Failure, plan_file: PlanFile) -> ForerunError:
    where = f"rank {failure.rank} at step {failure.step + 1}"
    if failure.input is not None:
        return InputError(*failure.input)
    if failure.kind == "run":
        return RunFailed(failure.message)
    if failure.kind == "memory":
        return _out_of_memory(f"{where} ran out of memory", plan_file)
    if failure.kind == "disk":
        return RunFailed(f"{where}: the disk is full ({failure.message}); free some space")
    if failure.kind == "shared memory":
        return RunFailed(f"{where}: shared memory is exhausted ({failure.message}); "
                         "free /dev/shm, or start the container with a larger one")  # fmt: skip
    return RunFailed(f"{where} failed: {failure.message}; other ranks were ended")


def _from_signal(
    end: job.Exit, plan_file: PlanFile, last_step: int, killed_for_memory: bool, remedy: str
) -> RunFailed:
    name = signal.Signals(-end.exit_code).name
    what = f"rank {end.rank} was killed by {name} after step {last_step}"
    if killed_for_memory:
        return _out_of_memory(f"{what} (the kernel ran out of memory)", plan_file)
    return RunFailed(f"{what}; other ranks were ended, {remedy}")


def _out_of_memory(what: str, plan_file: PlanFile) -> RunFailed:
    predicted = plan_file.estimate.peak_memory_bytes.median
    num_ranks = plan_file.plan.phase.mesh.world
    return RunFailed(
        f"{what}: predicted {predicted:.0f} bytes for each of {num_ranks} ranks, "
        f"{available_bytes()} bytes available now that they ended; "
        "lower --micro-batch or use --recompute full"
    )


def _exits(folder: Path) -> list[job.Exit]:
    path = folder / job.EXITS
    if not path.exists():
        return []
    return [from_raw(job.Exit, raw, str(path)) for raw in document.read_raw(path)]


def rank_logs(folder: Path) -> dict[int, Path]:
    """What each rank printed to stderr, by rank."""
    return {int(path.parent.name): path for path in sorted(folder.glob("logs/**/stderr.log"))}


def last_words(folder: Path) -> str:
    """The last line that a rank, or else the agent, printed."""
    for path in [*rank_logs(folder).values(), folder / "agent.log"]:
        lines = path.read_text(errors="replace").split(os.linesep) if path.exists() else []
        spoken = [line.strip() for line in lines if line.strip()]
        if spoken:
            return spoken[-1][:300]
    return "nothing was printed"
