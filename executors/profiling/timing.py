"""Clocks and buffers of the profiler: how a call is timed, and which memory it finds.

A training step does not call one operator on the same buffers again and again. Its inputs were just
written by the operator before (warm), its weights and saved tensors were last touched a whole layer
stack ago (cold, where they do not fit the cache), and its output goes to memory that was freed some
time ago. `Buffers` imitates that: weights and saved tensors rotate over views of one large buffer,
outputs are kept alive in a ring before their memory is used again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # not a Unix system
    resource = None

Call = Callable[[], object]

MAX_COPIES = 48
"""Tensors of one kind between the writing and the reading of a saved one: 4 layers or so."""
MAX_CALLS = 400
HEAP_COPIES = 6
"""Heap to touch beforehand, in units of the cold bytes."""


def last_level_cache_bytes(device: torch.device) -> int:
    """Size of the cache in front of memory; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 32 << 20))
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        digits = text.rstrip("KM")
        if digits.isdigit():
            sizes.append(int(digits) * unit)
    return min(max(sizes), 64 << 20) if sizes else 32 << 20


class Buffers:
    """Tensors for one device and dtype in the state that a step would find them in."""

    def __init__(self, device: torch.device, dtype: torch.dtype, runtime: str = "eager") -> None:
        self.device, self.dtype = device, dtype
        self.runtime = runtime
        """How operators that go through autograd are launched: eager, or compiled."""
        self.cold_bytes = 2 * last_level_cache_bytes(device)
        generator = torch.Generator(device=device).manual_seed(0)
        count = self.cold_bytes // dtype.itemsize
        base = torch.randn(count, device=device, generator=generator).mul_(0.5)
        self.base = base.to(dtype)
        if device.type == "cpu":  # touch the heap once; glibc keeps it (see the MALLOC_ settings)
            torch.empty(HEAP_COPIES * self.cold_bytes, dtype=torch.uint8).fill_(1)

    def copies(self, numel: int) -> int:
        """Buffers of `numel` elements to rotate over, so that the next one is as cold as it is."""
        nbytes = max(1, numel * self.dtype.itemsize)
        return max(2, min(MAX_COPIES, self.cold_bytes // nbytes))

    def take(self, *shape: int, index: int = 0) -> Tensor:
        """A filled tensor; a view of the large buffer where it fits, position by `index`."""
        numel = 1
        for size in shape:
            numel *= size
        if numel > self.base.numel():
            return torch.randn(shape, device=self.device).to(self.dtype)
        step = -(-numel // 64) * 64
        places = max(1, self.base.numel() // step)
        start = (index % places) * step
        return self.base[start : start + numel].view(shape)

    def rotating(self, *shape: int, count: int | None = None) -> list[Tensor]:
        """The same shape at `count` places (default: as many as make it cold)."""
        first = self.take(*shape)
        count = count or self.copies(first.numel())
        return [self.take(*shape, index=index) for index in range(count)]

    def ring(self, *shape: int) -> Ring:
        """A ring of outputs of this shape."""
        out = torch.empty(shape, device=self.device, dtype=self.dtype)
        return Ring([out] + [torch.empty_like(out) for _ in range(self.copies(out.numel()) - 1)])


class Ring:
    """Keeps the latest outputs alive and frees the oldest, whose memory the next call gets."""

    def __init__(self, outputs: Sequence[object]) -> None:
        self.outputs: deque[object] = deque(outputs)

    def push(self, output: object) -> None:
        """Keep `output`, free the oldest."""
        self.outputs.append(output)
        self.outputs.popleft()


class CpuClock:
    """Processor time of single calls of this thread, which runs them alone.

    On an idle machine that is their wall time. On a busy one it leaves out the time that other
    processes had the core, which would strike some sizes and not others. Calls that met new pages
    are dropped where others did not: a step after the first ones works in memory used before.
    """

    def __init__(self) -> None:
        taken = []
        for _ in range(200):
            start = time.thread_time_ns()
            taken.append(time.thread_time_ns() - start)
        self.own_s = median(taken) / 1e9

    def samples(self, call: Call, budget_s: float) -> list[float]:
        """Seconds of single calls, at least two, for about `budget_s`; one call is discarded."""
        now = time.thread_time_ns
        call()
        taken: list[tuple[int, float]] = []  # (page faults, seconds)
        deadline = time.perf_counter() + budget_s
        while len(taken) < 2 or (time.perf_counter() < deadline and len(taken) < MAX_CALLS):
            before = _page_faults()
            start = now()
            call()
            seconds = max(1e-8, (now() - start) / 1e9 - self.own_s)
            taken.append((_page_faults() - before, seconds))
        fewest = min(faults for faults, _ in taken)
        return [seconds for faults, seconds in taken if faults <= fewest + 2]


def _page_faults() -> int:
    """Page faults of this process so far; zero where the system does not count them."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class CudaClock:
    """Device time of calls, by events around a batch that the host has queued ahead."""

    CALLS = 8

    def __init__(self, device: torch.device) -> None:
        # About 5 ms on a large GPU: time for the host to queue the calls behind it, so that the
        # events see the device's time and not that of launching.
        self.delay = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def batch_s(self, call: Call, calls: int) -> float:
        """Seconds per call over one queued batch."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        for _ in range(3):
            torch.mm(self.delay, self.delay)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def samples(self, call: Call, budget_s: float) -> list[float]:
        """Seconds per call of several batches, for about `budget_s`; one call is discarded."""
        call()
        first = self.batch_s(call, 1)
        calls = self.CALLS if first < budget_s / 16 else 1
        taken: list[float] = []
        deadline = time.perf_counter() + budget_s
        while len(taken) < 3 or (time.perf_counter() < deadline and len(taken) < MAX_CALLS):
            taken.append(self.batch_s(call, calls))
        return taken


Clock = CpuClock | CudaClock


def median(samples: Sequence[float]) -> float:
    """The middle sample (the mean of the middle two)."""
    ordered = sorted(samples)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def trimmed_mean(samples: Sequence[float], cut: float = 0.1) -> float:
    """The mean without the slowest and the fastest `cut` of the samples."""
    ordered = sorted(samples)
    drop = int(len(ordered) * cut)
    kept = ordered[drop : len(ordered) - drop] or ordered
    return sum(kept) / len(kept)
