"""What a rank runs on, and the memory of its process."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import sys
from pathlib import Path

import psutil
import torch
import torch.distributed as dist


def context_bytes(device: torch.device) -> int:
    """In use before the first tensor: resident memory, or the GPU's that is no tensor's."""
    if device.type == "cpu":
        return psutil.Process().memory_info().rss
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def process_peak_bytes(device: torch.device, context_bytes: int) -> int:
    """High-water mark of the process's resident memory, or of what it holds of the device's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) + context_bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def allocated_bytes(device: torch.device) -> int:
    """The most that tensors took on a device that counts it; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def start_afresh(device: torch.device) -> None:
    """Give back what an earlier plan left, and forget its peaks, where the system can."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # beyond a few shapes layers would not be compiled any more
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark


def environment(load_at_start: float, device: torch.device) -> dict[str, str]:
    """What a measurement says of where it was taken."""
    on_cuda = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads_per_rank": str(torch.get_num_threads()),
        "backend": dist.get_backend(),
        "load_at_start": f"{load_at_start:.2f}",
        "load_at_end": f"{os.getloadavg()[0]:.2f}",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
