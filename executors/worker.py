"""One rank of a run: `python -m forerun.executors.worker FOLDER [MODULE]`, started by the agent.

Order: warm-up steps, timed steps with nothing attached, one counted step (memory and collectives),
profiled steps. The rank writes its result, or why it failed, into the folder.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import resource
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from .. import document
from ..errors import RunFailed
from ..measurement import REFERENCE_MATMUL
from . import data, job
from .build import build
from .decoder import Decoder
from .experts.loads import rank_loads
from .measure import pace
from .measure.clock import ProfilerMarks, StepProfile, attribute, profile_step
from .measure.comm import Call, CollectiveCounter
from .measure.memory import LiveTensors
from .measure.report import RankResult
from .processes import die_with_parent
from .traced import TracedTrainer
from .trainer import Trainer

PROFILED_STEPS = 3
"""Their mean is less at the mercy of a busy machine than one."""


def main(folder: Path, module: str | None = None) -> int:
    """Run this rank; 0, or 1 with the reason written into the folder."""
    die_with_parent()
    rank = int(os.environ["RANK"])
    progress = job.Progress(folder, rank)
    try:
        work = document.read(job.Job, folder / job.JOB)
        corpus = data.open_corpus(folder / job.CORPUS)
        result = _kind_of_run(work)(work, corpus, progress, module).measure()
        document.write(folder / job.result_name(rank), result)
    except Exception as error:
        traceback.print_exc()
        document.write(folder / job.failure_name(rank), job.describe(error, rank, progress.step))
        return 1
    return 0


class Run:
    """The steps of one rank."""

    def __init__(
        self,
        work: job.Job,
        corpus: np.ndarray,
        progress: job.Progress,
        module: str | None = None,
    ) -> None:
        self.work, self.corpus, self.progress = work, corpus, progress
        self.device = _start_process_group(work.device)
        self.context_bytes = _context_bytes(self.device)
        self.trainer: Trainer = build(work.plan, device=self.device, module=module)
        place = self.trainer.coordinates
        self.dp_rank = place["dp_replicate"] * work.plan.phase.mesh.dp_shard + place["dp_shard"]
        self.next_step = 0
        self.pace_s: list[float] = []
        """The machine's speed before every step."""

    def measure(self) -> RankResult:
        """Train, then count one step and profile some."""
        load_at_start = os.getloadavg()[0]
        loss: list[float] = []
        steps_s: list[float] = []
        for index in range(self.work.warmup_steps + self.work.steps):
            if index == self.work.warmup_steps:
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)
                if self.trainer.experts is not None:
                    self.trainer.experts.forget()
            seconds, mean_loss = self.train_step()
            loss.append(mean_loss)
            if index >= self.work.warmup_steps:
                steps_s.append(seconds)
        pace_s = statistics.median(self.pace_s)
        peak_bytes = process_peak_bytes(self.device, self.context_bytes)
        allocated_bytes = _allocated_bytes(self.device)
        experts = rank_loads(self.trainer.experts)
        live_bytes, counter = self.count_step()
        profiled_s, matched = self.profile_steps(counter.calls)
        result = RankResult(
            rank=dist.get_rank(),
            coordinates=self.trainer.coordinates,
            steps_s=tuple(steps_s),
            loss=tuple(loss),
            peak_memory_bytes=allocated_bytes or sum(live_bytes.values()),
            process_peak_bytes=peak_bytes,
            context_bytes=self.context_bytes,
            live_bytes=live_bytes,
            profiled_s=profiled_s,
            bytes_on_wire=counter.bytes_on_wire(),
            experts=experts,
            environment=environment(load_at_start, self.device)
            | {
                "collectives_matched": "yes" if matched else "no",
                REFERENCE_MATMUL: f"{pace_s:.6g}",
            },
        )
        leave()
        return result

    def tokens(self) -> Any:
        """This replica's sequences of the next step, or the batches that a user's module takes."""
        self.progress.step = self.next_step
        work = self.work
        if isinstance(self.trainer, TracedTrainer):
            own = self.trainer.own_batch(self.next_step, self.dp_rank)
            if own is not None:
                self.next_step += 1
                return own
        batch = data.batch(
            self.corpus, work.plan.workload.seed, self.next_step, work.plan.phase, self.dp_rank
        )
        self.next_step += 1
        return batch.to(self.device)

    def train_step(self) -> tuple[float, float]:
        """Seconds and mean loss of one step, all ranks starting together."""
        tokens = self.tokens()
        dist.barrier()
        self.pace_s.append(pace.matmul_s(calls=3))
        self.synchronize()
        dist.barrier()
        start_s = time.perf_counter()
        local_loss = self.trainer.forward_backward(tokens)
        if self.next_step == 1:
            paused_s = time.perf_counter()
            self.trainer.check_gradients()
            start_s += time.perf_counter() - paused_s
        self.trainer.optimizer_step()
        self.synchronize()
        seconds = time.perf_counter() - start_s
        mean_loss = self.trainer.global_loss(local_loss)
        if not math.isfinite(mean_loss):
            self.check_routers()
            raise RunFailed(f"loss={mean_loss} at step {self.next_step}: training diverged; "
                            "lower the learning rate or use fp32")  # fmt: skip
        self.progress.report(self.next_step, self.work.warmup_steps + self.work.steps, mean_loss)
        return seconds, mean_loss

    def check_routers(self) -> None:
        """Raise RunFailed on every rank when a router of any gave no numbers."""
        experts = self.trainer.experts
        if experts is None:
            return
        broken: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(broken, experts.broken_routers())
        for rank, layers in enumerate(broken):
            if layers:
                raise RunFailed(f"router=nan: that of layer {layers[0]} on rank {rank} at step "
                                f"{self.next_step}: training diverged; lower the learning rate, or "
                                "raise router_z_loss_coef")  # fmt: skip

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def count_step(self) -> tuple[dict[str, int], CollectiveCounter]:
        """Live tensors by category at the peak of one step, and its collectives."""
        tokens = self.tokens()
        parameters = [p for piece in self.trainer.pieces for p in piece.parameters()]
        states = [
            value
            for state in self.trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        live = LiveTensors(logits_shape=self.logits_shape())
        counter = CollectiveCounter(self.trainer.mesh)
        heads = [p for p in self.trainer.pieces if isinstance(p, Decoder) and p.is_last]
        hooks = [live.watch_head(piece.norm) for piece in heads]
        self.trainer.observer = live
        dist.barrier()
        with counter, live:
            live.hold(parameters, "parameters")
            live.hold([b for piece in self.trainer.pieces for b in piece.buffers()], "parameters")
            live.hold(states, "optimizer")
            self.trainer.forward_backward(tokens)
            live.hold([p.grad for p in parameters if p.grad is not None], "gradients")
            self.trainer.optimizer_step()
        for hook in hooks:
            hook.remove()
        return live.peak(), counter

    def logits_shape(self) -> tuple[int, int] | None:
        """Tokens and local vocabulary of a micro-batch's logits; None without a head."""
        phase = self.work.plan.phase
        if not any(piece.is_last for piece in self.trainer.pieces):
            return None
        tokens = phase.micro_batch_seqs * phase.seq_tokens
        return tokens, self.work.plan.model.vocab // phase.mesh.tp

    def profile_steps(self, calls: list[Call]) -> tuple[dict[str, float], bool]:
        """Mean seconds by time term of the profiled steps, and whether collectives were known."""
        rows: list[dict[str, float]] = []
        matched = True
        pipeline = self.trainer.pipeline
        message_s = pipeline.message_s() if pipeline is not None else 0.0
        for _ in range(PROFILED_STEPS):
            seen = self.profile_step(calls)
            matched = matched and seen.matched
            rows.append(attribute(seen, message_s))
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}, matched

    def profile_step(self, calls: list[Call]) -> StepProfile:
        """One step under the profiler, all ranks starting together."""
        tokens = self.tokens()
        marks = ProfilerMarks(self.device)
        self.trainer.observer = marks
        gc.collect()

        def ready() -> None:
            dist.barrier()
            self.synchronize()

        def step() -> None:
            self.trainer.forward_backward(tokens)
            self.trainer.optimizer_step()

        return profile_step(ready, step, marks, calls, self.device)


def _kind_of_run(work: job.Job) -> type[Run]:
    if work.pace is None:
        return Run
    from .paced_run import PacedRun  # which is built on this module

    return PacedRun


def leave() -> None:
    """End the process group, all ranks together."""
    dist.barrier()
    dist.destroy_process_group()


def _start_process_group(kind: str) -> torch.device:
    """The device of this rank, with the default process group over all ranks."""
    if kind == "cpu":
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def _context_bytes(device: torch.device) -> int:
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


def _allocated_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def environment(load_at_start: float, device: torch.device) -> dict[str, str]:
    """What the run ran on."""
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


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
