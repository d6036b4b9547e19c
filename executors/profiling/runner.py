"""Measures this machine with worker processes, and gathers what they find into a Profile.

`profile_machine` is the parent: it starts one process per rank, follows their progress, and merges
their results. Each worker (`python -m forerun.executors.profiling.worker FOLDER RANK WORLD`) runs
the same list of phases; in a phase with `busy` processes the first `busy` ranks work, all started
from a barrier at every point, and the others sleep. Results pass through files in a temporary
folder.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

import forerun

from ...catalogs import load_hardware, names
from ...cluster import CollectiveCurve, OperatorCurve, Profile, WaitCurve
from ...errors import InputError, RunFailed

OnProgress = Callable[[float, str], None]

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}
TIME_LIMIT_S = 600.0


class Phase(NamedTuple):
    """One sweep over the operators: their dtype, the processes busy, how they are launched."""

    dtype: str
    busy: int
    runtime: str = "eager"

    def __str__(self) -> str:
        compiled = f", {self.runtime}" if self.runtime != "eager" else ""
        return f"{self.dtype}{compiled}, {self.busy} busy"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the workers are asked to measure."""

    device: str
    quick: bool
    operators: tuple[str, ...] | None = None
    """Only these operators; None = all."""
    grid: dict[str, tuple[tuple[int, ...], ...]] | None = None
    """A size grid of the caller's own, in the place of the built-in ones."""
    busy: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    collectives: bool = True
    host: bool = True
    budget_s: float | None = None
    """Seconds for the operators of one phase; None = the built-in ones."""

    def phases(self) -> list[Phase]:
        """In the order of measurement."""
        if self.device == "cuda":
            found = [Phase(dtype, 1) for dtype in self.dtypes or ("fp32", "bf16", "fp8")]
            compiled = not self.quick and self.grid is None
            return [*found, Phase("bf16", 1, "compiled")] if compiled else found
        busy = self.busy or ((1, 2) if self.quick else (1, 2, 4))
        dtypes = self.dtypes or (("fp32",) if self.quick else ("fp32", "bf16"))
        return [Phase(dtype, count) for dtype in dtypes for count in busy]

    def world(self) -> int:
        """Worker processes to start."""
        return max(phase.busy for phase in self.phases())


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's times of one operator at one size."""

    operator: str
    dtype: str
    busy: int
    runtime: str = "eager"
    axes: tuple[str, ...]
    size: tuple[int, ...]
    forward_s: float
    backward_s: float | None = None


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """All that one rank found."""

    timings: list[Timing] = []
    collectives: list[CollectiveCurve] = []
    waits: list[WaitCurve] = []
    host_s: dict[str, float] = {}
    memory: dict[str, float] = {}
    reference_s: list[float] = []
    environment: dict[str, str] = {}


def profile_machine(
    *, device: str = "auto", quick: bool = False, on_progress: OnProgress | None = None
) -> Profile:
    """The measured profile of this machine: operators, collectives, host times, memory.

    `device` is "cpu", "cuda" or "auto" (CUDA where there is one). Takes under two minutes on two
    cores, about half a minute when `quick` (fp32 only, one and two busy processes, fewer sizes).
    """
    request = Request(device=resolve_device(device), quick=quick)
    return run_request(request, on_progress=on_progress)


def resolve_device(device: str) -> str:
    """The device, cpu or cuda, for what the user asked; checks that a CUDA device is there."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError("device", device, "unknown device", "give cpu, cuda or auto")
    if device == "cpu" or (device == "auto" and shutil.which("nvidia-smi") is None):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise InputError("device", device, "this machine has no usable CUDA device",
                         "give cpu, or install a torch with CUDA")  # fmt: skip
    return "cpu"


def run_request(request: Request, *, on_progress: OnProgress | None = None) -> Profile:
    """The profile of what `request` names, measured by worker processes."""
    if importlib.util.find_spec("torch") is None:
        raise RunFailed("torch: not installed; install forerun[run]")
    load_before = _load_average()
    with tempfile.TemporaryDirectory(prefix="forerun-profile-") as name:
        folder = Path(name)
        (folder / "request.json").write_bytes(msgspec.json.encode(request))
        workers = [_start(folder, rank, request.world()) for rank in range(request.world())]
        try:
            _follow(workers, folder, on_progress)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
        found = [_read_findings(folder, rank) for rank in range(request.world())]
    return merge(request, found, load_before)


def _start(folder: Path, rank: int, world: int) -> subprocess.Popen[bytes]:
    package_parent = Path(forerun.__file__).absolute().parent.parent
    environment = {**os.environ, **WORKER_ENVIRONMENT}
    paths = [str(package_parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with (folder / f"log{rank}.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", str(folder), str(rank), str(world)],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip


def _follow(
    workers: list[subprocess.Popen[bytes]], folder: Path, on_progress: OnProgress | None
) -> None:
    """Waits for the workers, passing their progress on; raises RunFailed when one fails."""
    deadline = time.monotonic() + TIME_LIMIT_S
    progress, seen = folder / "progress.txt", 0
    while any(worker.poll() is None for worker in workers):
        for rank, worker in enumerate(workers):
            if worker.poll() not in (None, 0):
                raise RunFailed(_failure(folder, rank, worker.returncode))
        if time.monotonic() > deadline:
            raise RunFailed(
                f"profile: no end after {TIME_LIMIT_S:.0f} s; try it on an idle machine"
            )
        lines = progress.read_text().splitlines() if progress.exists() else []
        for line in lines[seen:]:
            done, _, label = line.partition(" ")
            if on_progress is not None:
                on_progress(float(done), label)
        seen = len(lines)
        time.sleep(0.2)
    for rank, worker in enumerate(workers):
        if worker.returncode:
            raise RunFailed(_failure(folder, rank, worker.returncode))


def _failure(folder: Path, rank: int, code: int) -> str:
    lines = (folder / f"log{rank}.txt").read_text(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else "no message"
    return f"profile: worker {rank} ended with code {code} ({reason}); run it again, or --quick"


def _read_findings(folder: Path, rank: int) -> Findings:
    return msgspec.json.decode((folder / f"findings{rank}.json").read_bytes(), type=Findings)


def merge(request: Request, found: list[Findings], load_before: str) -> Profile:
    """The ranks' findings as one profile: operator times and host times are means over ranks."""
    first = found[0]
    environment = {
        **first.environment,
        "load_average_before": load_before,
        "load_average_after": _load_average(),
        "quick": str(request.quick).lower(),
    }
    return Profile(
        name=f"{platform.system().lower()}-{request.device}",
        device=device_name(request.device, first.environment),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment=environment,
        operators=merge_operators(found),
        collectives=tuple(first.collectives),
        waits=tuple(first.waits),
        host_s=_mean_by_name([findings.host_s for findings in found]),
        memory=_mean_by_name([findings.memory for findings in found]),
        spread=_spread(first.reference_s),
    )


def device_name(device: str, environment: dict[str, str]) -> str:
    """The catalog's name of the device measured; CUDA's own name where the catalog lacks it.

    The family (the catalog name's first part) must occur in CUDA's name and the memory agree within
    a tenth; among several the form (SXM, PCIe, NVL) decides, then the nearest memory.
    """
    if device == "cpu":
        return "cpu"
    found = environment.get("device", device)
    squashed = found.lower().replace(" ", "").replace("-", "")
    memory_bytes = float(environment.get("device_memory_bytes", 0))
    # CUDA's names of H100, H200 and B200 boards leave SXM out.
    cuda_form = next((form for form in ("pcie", "nvl") if form in squashed), "sxm")
    candidates = []
    for name in names("hardware"):
        family, *form = name.lower().split("-")
        known = load_hardware(name).device
        apart = abs(known.memory_bytes / max(1.0, memory_bytes) - 1)
        if known.kind == "gpu" and family in squashed and apart < 0.1:
            candidates.append((cuda_form not in form, apart, known.name))
    return min(candidates)[2] if candidates else found


def merge_operators(found: list[Findings]) -> tuple[OperatorCurve, ...]:
    """One curve per operator and phase, over the sizes that every busy rank measured."""
    table: dict[tuple[str, Phase], dict[tuple[int, ...], list[Timing]]] = {}
    for timing in (timing for findings in found for timing in findings.timings):
        key = timing.operator, Phase(timing.dtype, timing.busy, timing.runtime)
        table.setdefault(key, {}).setdefault(timing.size, []).append(timing)
    curves = []
    for (operator, (dtype, busy, runtime)), sizes in table.items():
        whole = {size: rows for size, rows in sorted(sizes.items()) if len(rows) == busy}
        if not whole:
            continue
        rows = next(iter(whole.values()))
        backward = [[row.backward_s for row in rows] for rows in whole.values()]
        curves.append(
            OperatorCurve(
                operator=operator,
                dtype=dtype,
                busy=busy,
                runtime="compiled" if runtime == "compiled" else "eager",
                axes=rows[0].axes,
                sizes=tuple(tuple(float(x) for x in size) for size in whole),
                forward_s=tuple(_mean([r.forward_s for r in rows]) for rows in whole.values()),
                backward_s=tuple(
                    _mean([value for value in values if value is not None]) for values in backward
                )
                if rows[0].backward_s is not None
                else (),
            )
        )
    return tuple(curves)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean_by_name(tables: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for table in tables for name in table})
    return {name: _mean([table[name] for table in tables if name in table]) for name in names}


def _spread(values: list[float]) -> float:
    """Relative standard deviation; the default of a profile where there are too few values."""
    if len(values) < 3:
        return 0.05
    mean = _mean(values)
    variance = _mean([(value - mean) ** 2 for value in values])
    return max(0.005, variance**0.5 / mean)


def _load_average() -> str:
    with contextlib.suppress(OSError, AttributeError):
        return f"{os.getloadavg()[0]:.2f}"
    return "unknown"
