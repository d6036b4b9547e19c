"""Host times beside a GPU: what Python, autograd, hooks and launches take while the device works.

A device that has more to do than the host takes to launch it hides these times; small models on
large GPUs are bound by them. They are wall times of the real trainer's steps on a model whose
kernels are shorter than their launches, per layer by the difference of few and many layers, apart
for one process without FSDP2, for its hooks, for recomputation and for compiled blocks.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ...costmodel.graph import Graph
from ...costmodel.layers import decoder_layer
from ...costmodel.operators import KINDS
from ...costmodel.options import Options
from ...model import Model
from . import steps
from .steps import FEW, MANY, TimedTrainer, per_layer_s, tiny_plan
from .timing import median

WAYS = ("forward", "backward")
ALLOCATOR = {"fragmentation": 0.01, "spread": 0.01}
"""Of an allocator with expandable segments, which gives back what it does not use before it runs
out: held against the longest sequences that fit on one H200 (docs/accuracy.md)."""


def launch_s(device: torch.device) -> float:
    """Host seconds to launch one small kernel."""
    x = torch.ones(64, device=device)
    samples: list[float] = []
    for _ in range(20):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(50):
            x = x + 1.0
        samples.append((time.perf_counter() - start) / 50)
    return median(samples)


def graph_launch_s(device: torch.device, kernels: int = 50) -> float:
    """Host seconds per kernel of a captured graph that is launched as a whole."""
    x = torch.ones(64, device=device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        x.add_(1.0)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            x.add_(1.0)
    samples: list[float] = []
    for _ in range(20):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        graph.replay()
        samples.append((time.perf_counter() - start) / kernels)
    return median(samples)


def measure(folder: Path, device: torch.device) -> dict[str, float]:
    """Host seconds by name (see `costmodel/prices.py`), and `graph_launch`, which no price reads.

    The process group of the other measurements must have been destroyed.
    """
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder / 'beside'}",
        rank=0,
        world_size=1,
    )
    plans = {
        f"{name}.{layers}": tiny_plan(layers, compute=compute, recompute=recompute, runtime=runtime)
        for name, compute, recompute, runtime in (
            ("plain", "fp32", "none", "eager"),
            ("units", "bf16", "none", "eager"),
            ("again", "fp32", "full", "eager"),
            ("compiled", "fp32", "none", "compiled"),
        )
        for layers in (FEW, MANY)
    }
    times = steps.run_interleaved(plans, device)
    dist.destroy_process_group()
    return _differences(times, launch_s(device), _launches(plans[f"plain.{MANY}"].model))


def _differences(
    times: dict[str, TimedTrainer], launch: float, launches: dict[str, int]
) -> dict[str, float]:
    def layer(name: str, way: str) -> float:
        return per_layer_s(times[f"{name}.{FEW}"], times[f"{name}.{MANY}"], way)

    found = {"launch": launch}
    for way in WAYS:
        plain = layer("plain", way)
        found[f"layer_{way}"] = plain - launches[way] * launch
        found[f"fsdp_unit_{way}"] = layer("units", way) - plain
        found[f"compiled_layer_{way}"] = layer("compiled", way)
    twice = layer("again", "backward") - layer("plain", "backward")
    found["checkpoint"] = twice - layer("plain", "forward")
    return {name: max(0.0, seconds) for name, seconds in found.items()}


def _launches(model: Model) -> dict[str, int]:
    """Kernel launches of one layer as the cost model counts them."""
    graph: Graph = decoder_layer(
        model, model.layers[0], sequence_parallel=False, fused=True, options=Options(compute="fp32")
    )
    forward = sum(KINDS[op.kind].launches for op in graph.operators if op.kind != "edge")
    return {"forward": forward, "backward": 2 * forward}


def context_bytes(device: torch.device) -> float:
    """Memory of the GPU in use that is no tensor's: driver, libraries, other processes.

    With a matmul done, so that the library's own memory is there.
    """
    x = torch.ones(256, 256, device=device, dtype=torch.bfloat16)
    torch.mm(x, x)
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return float(total - free - torch.cuda.memory_reserved(device))


CARD = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "pstate")


def card() -> dict[str, str]:
    """Driver, clocks and power limit of the first GPU as found, in the words of nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(CARD)}", "--format=csv,noheader", "-i", "0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return {}
    values = [value.strip() for value in answer.stdout.splitlines()[0].split(",")]
    return dict(zip(CARD, values, strict=False))
