"""One worker process of the profiler: runs the phases that its rank takes part in.

Started as `python -m forerun.executors.profiling.worker FOLDER RANK WORLD`.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from ...cluster import CollectiveCurve, WaitCurve
from ...measurement import REFERENCE_MATMUL
from ..measure.pace import matmul_s
from . import collectives, gpu_host, grids, host
from .cases import Bench, Sizes
from .collectives import Groups, Setting
from .operators import benches, engine_start_s
from .runner import Findings, Phase, Request, Timing
from .timing import Buffers, Clock, CpuClock, CudaClock, median

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Of the tensors between operators."""
PHASE_S = {("fp32", 1): 8.0, ("fp32", 2): 7.0, ("fp32", 4): 4.0,
           ("bf16", 1): 3.0, ("bf16", 2): 2.0, ("bf16", 4): 1.0}  # fmt: skip
QUICK_PHASE_S = 5.0
LONGEST_CALL_S = 0.08
"""Sizes whose call is expected to take longer are skipped."""


class Worker:
    """One rank at work: its device, process groups and findings."""

    def __init__(self, folder: Path, rank: int, world: int, request: Request) -> None:
        self.folder, self.rank, self.world, self.request = folder, rank, world, request
        self.device = torch.device(request.device)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        else:
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.cuda.set_device(0)
        self.timings: list[Timing] = []
        self.reference_s: list[float] = []
        self.clock: Clock = CpuClock() if request.device == "cpu" else CudaClock(self.device)
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

    def connect(self) -> None:
        """Joins the workers' process group; every rank makes all groups, in the same order."""
        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.folder / 'rendezvous'}",
            rank=self.rank,
            world_size=self.world,
            timeout=datetime.timedelta(minutes=5),
        )
        self.settings = [Setting(2)] if self.world >= 2 else []
        if self.world >= 4 and not self.request.quick:
            self.settings += [Setting(4), Setting(2, 2)]
        self.groups = Groups(self.settings, self.rank)
        busy = {phase.busy for phase in self.request.phases()}
        for count in sorted(busy | {setting.world for setting in self.settings}):
            self.groups.add_barrier(count)

    def barrier(self, busy: int) -> None:
        """Lines up the first `busy` ranks."""
        if busy > 1:
            dist.barrier(group=self.groups.barrier_group(busy))

    def report(self, done: float, label: str) -> None:
        """Tells the parent how far the work is."""
        if self.rank == 0:
            with (self.folder / "progress.txt").open("a") as file:
                file.write(f"{done:.3f} {label}\n")

    def grid(self, phase: Phase) -> dict[str, list[Sizes]]:
        """The points of this phase."""
        if self.request.grid is not None:
            grid = {name: list(points) for name, points in self.request.grid.items()}
        elif phase.runtime == "compiled":
            grid = grids.compiled_grid()
        elif self.device.type == "cuda":
            grid = grids.cuda_grid(phase.dtype)
        else:
            grid = grids.cpu_grid(phase.dtype, phase.busy, self.request.quick)
        names = self.request.operators
        return {name: points for name, points in grid.items() if names is None or name in names}

    def budget_s(self, dtype: str, busy: int) -> float:
        """Seconds for a phase's operators."""
        if self.request.budget_s is not None:
            return self.request.budget_s
        if self.device.type == "cuda":
            return 10.0 if dtype == "fp8" else 30.0
        return QUICK_PHASE_S if self.request.quick else PHASE_S.get((dtype, busy), 8.0)

    def operators(self, phase: Phase) -> None:
        """Measures a phase's grid, in two rounds where there is time.

        Every sample is kept in units of the reference operator's time around it, because the speed
        of a shared machine drifts within minutes; `settled` turns units into seconds.
        """
        dtype, busy, runtime = phase
        if dtype == "fp8" and not has_fp8(self.device):
            return
        buffers, known = Buffers(self.device, DTYPES[dtype], runtime), benches(dtype)
        engine_s = engine_start_s(self.clock, self.device) / self.pace_s()
        grid = self.grid(phase)
        rounds = 2 if dtype == "fp32" and busy <= self.cores and not self.request.quick else 1
        calls = sum(len(points) for points in grid.values()) * 2
        point_budget_s = min(0.08, max(0.004, self.budget_s(dtype, busy) / max(1, calls * rounds)))
        shared = max(1.0, busy / self.cores)  # wall time over processor time
        samples: dict[tuple[str, Sizes], tuple[list[float], list[float]]] = {}
        for _ in range(rounds):
            for name, points in grid.items():
                self._sweep(name, known[name], points, buffers, point_budget_s, busy, samples)
        for (name, size), (forward, backward) in samples.items():
            bench = known[name]
            backward_s = None
            if backward:
                less = engine_s if bench.engine else 0.0
                backward_s = max(1e-4 * median(backward), median(backward) - less) * shared
            self.timings.append(
                Timing(operator=name, dtype=dtype, busy=busy, runtime=runtime, axes=bench.axes,
                       size=size, forward_s=median(forward) * shared, backward_s=backward_s)
            )  # fmt: skip

    def _sweep(
        self,
        name: str,
        bench: Bench,
        points: list[Sizes],
        buffers: Buffers,
        budget_s: float,
        busy: int,
        samples: dict[tuple[str, Sizes], tuple[list[float], list[float]]],
    ) -> None:
        """One round over an operator's points; the time of each bounds that of the next."""
        slowest_rate = 0.0
        taken: list[tuple[Sizes, list[float], list[float]]] = []
        pace_s = self.pace_s()
        for size in points:
            self.barrier(busy)
            work = bench.work(size)
            if slowest_rate and work * slowest_rate > LONGEST_CALL_S:
                continue
            try:
                forward, backward = self._time(bench, size, buffers, budget_s)
            except torch.OutOfMemoryError:  # a GPU with less memory: the point is left out
                torch.cuda.empty_cache()
                continue
            taken.append((size, forward, backward))
            # Small calls are all overhead and say nothing about the rate of large ones.
            longest = max(median(forward), median(backward) if backward else 0.0)
            slowest_rate = longest / work if longest > 1e-3 else 0.0
        pace_s = (pace_s + self.pace_s()) / 2
        for size, forward, backward in taken:
            kept = samples.setdefault((name, size), ([], []))
            kept[0].extend(seconds / pace_s for seconds in forward)
            kept[1].extend(seconds / pace_s for seconds in backward)

    def _time(
        self, bench: Bench, size: Sizes, buffers: Buffers, budget_s: float
    ) -> tuple[list[float], list[float]]:
        case = bench.prepare(buffers, size)
        forward = self.clock.samples(case.forward, budget_s)
        if case.backward is None:
            return forward, []
        return forward, self.clock.samples(case.backward(), budget_s)

    def pace_s(self) -> float:
        """Seconds of the reference operator now; 1 on a GPU, whose clock is its own."""
        if self.device.type == "cuda":
            return 1.0
        self.reference_s.append(matmul_s())
        return self.reference_s[-1]

    def settled(self) -> list[Timing]:
        """The timings in seconds, at the median speed of the whole profile."""
        pace_s = median(self.reference_s) if self.reference_s else 1.0
        return [
            msgspec.structs.replace(
                t,
                forward_s=t.forward_s * pace_s,
                backward_s=None if t.backward_s is None else t.backward_s * pace_s,
            )
            for t in self.timings
        ]

    def collectives(self) -> list[CollectiveCurve]:
        """Curves of all collectives in all settings."""
        curves = []
        sizes = grids.message_sizes(self.request.quick)
        for setting in self.settings:
            if self.rank < setting.world:
                for kind in collectives.KINDS:
                    seconds = [
                        collectives.measure(kind, size, setting, self.groups,
                                            quick=self.request.quick)
                        for size in sizes
                    ]  # fmt: skip
                    curves.append(
                        CollectiveCurve(
                            collective=kind,
                            group=setting.group,
                            groups=setting.groups,
                            message_bytes=tuple(float(size) for size in sizes),
                            seconds=tuple(seconds),
                        )
                    )
            dist.barrier()
        return curves

    def waits(self) -> list[WaitCurve]:
        """Curves of what ranks lose at meetings, in all settings."""
        curves = []
        seconds = 0.25 if self.request.quick else 0.35
        for setting in self.settings:
            if self.rank < setting.world:
                points = [
                    collectives.measure_wait(calls, seconds, setting, self.groups, self.cores)
                    for calls in grids.wait_calls(self.request.quick)
                ]
                curves.append(
                    WaitCurve(
                        group=setting.group,
                        groups=setting.groups,
                        compute_s=tuple(point[0] for point in points),
                        seconds=tuple(point[1] for point in points),
                    )
                )
            dist.barrier()
        return curves

    def host(self) -> dict[str, float]:
        """Host times: of what the operators wait for on a CPU, of what runs beside a GPU."""
        if self.device.type == "cuda":
            found = gpu_host.measure(self.folder, self.device)
            return {**found, "graph_launch": gpu_host.graph_launch_s(self.device)}
        return host.measure(self.folder, self.rank, self.world, self.clock)

    def process_bytes(self) -> float:
        """What a process takes before its first tensor: of the host's memory, or of the GPU's."""
        if self.device.type == "cuda":
            return gpu_host.context_bytes(self.device)
        return training_process_bytes()

    def environment(self) -> dict[str, str]:
        """What the figures were measured on and with."""
        found = {
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": str(self.cores),
            "threads_per_process": str(torch.get_num_threads()),
            "cpu": host.cpu_name(),
        }
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            found["device"] = properties.name
            found["device_memory_bytes"] = str(properties.total_memory)
            found |= gpu_host.card()
        return found


def has_fp8(device: torch.device) -> bool:
    """Whether a device has matmuls on 8-bit floats; CPUs emulate them."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def training_process_bytes() -> float:
    """Resident memory of a process that has imported what training needs, and has no model yet."""
    from .. import build

    assert build
    return host.resident_bytes()


def run_worker(folder: Path, rank: int, world: int, request: Request) -> None:
    """Runs all phases and writes this rank's findings."""
    worker = Worker(folder, rank, world, request)
    worker.connect()
    memory = {"process_bytes": worker.process_bytes()} if rank == 0 else {}
    if request.device == "cuda" and rank == 0:
        memory |= gpu_host.ALLOCATOR
    phases = request.phases()
    started = time.perf_counter()
    for index, phase in enumerate(phases):
        label = f"operators {phase}"
        worker.report(index / (len(phases) + 2), label)
        if rank < phase.busy:
            worker.operators(phase)
        dist.barrier()
        if rank == 0:
            note(f"{label} until {time.perf_counter() - started:.1f} s")
    worker.report(len(phases) / (len(phases) + 2), "collectives")
    curves = worker.collectives() if request.collectives else []
    note(f"collectives until {time.perf_counter() - started:.1f} s")
    waits = worker.waits() if request.collectives else []
    note(f"waits until {time.perf_counter() - started:.1f} s")
    worker.report((len(phases) + 1) / (len(phases) + 2), "host")
    dist.barrier()
    dist.destroy_process_group()
    host_s = worker.host() if request.host else {}
    if worker.reference_s:
        host_s[REFERENCE_MATMUL] = median(worker.reference_s)
    note(f"host until {time.perf_counter() - started:.1f} s")
    findings = Findings(
        timings=worker.settled(),
        collectives=curves,
        waits=waits,
        host_s=host_s,
        memory=memory,
        reference_s=worker.reference_s,
        environment=worker.environment(),
    )
    temporary = folder / f"findings{rank}.tmp"
    temporary.write_bytes(msgspec.json.encode(findings))
    temporary.replace(folder / f"findings{rank}.json")


def note(text: str) -> None:
    """A line for the worker's log."""
    print(text, flush=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    run_worker(
        Path(arguments[0]),
        int(arguments[1]),
        int(arguments[2]),
        msgspec.json.decode((Path(arguments[0]) / "request.json").read_bytes(), type=Request),
    )
