"""One rank of a run: `python -m forerun.executors.worker FOLDER [MODULE]`, started by the agent.

Order: warm-up steps, timed steps with nothing attached, one counted step (memory and collectives),
profiled steps. The rank writes its result, or why it failed, into the folder. In a training run
(`job.Training`) the steps before the counted one are the training, with its checkpoints; what is
counted and profiled afterwards changes nothing that was kept.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import document
from ..errors import RunFailed
from ..measurement import EMULATED_LINKS, REFERENCE_MATMUL
from ..units import format_bytes, format_rate
from . import data, job, links
from .arena import StaticArena
from .build import build
from .decoder import Decoder
from .experts.loads import rank_loads
from .measure import environment, lives, pace
from .measure.clock import ProfilerMarks, StepProfile, attribute, profile_step
from .measure.comm import Call, CollectiveCounter
from .measure.memory import LiveTensors
from .measure.report import RankResult
from .measure.rounds import OTHERS, Counted, count_round
from .processes import die_with_parent
from .ranks import check_device, check_nodes, of_all_nodes, own_rank, start_process_group
from .torch_compat import destroy_process_groups
from .traced import TracedTrainer
from .trainer import Trainer
from .training import Keeper

THROWAWAY_STEPS = 3
"""Timed where a run goes on from the end of its training."""


def main(folder: Path, module: str | None = None) -> int:
    """Run this rank; 0, or 1 with the reason written into the folder."""
    die_with_parent()
    launch = document.read(job.Launch, folder / job.LAUNCH)
    corpus = data.open_corpus(folder / job.CORPUS)
    if not launch.session:
        return run_plan(folder, corpus, module)
    device = torch.device("cpu")
    for number in itertools.count():
        item = job.next_item(folder, number)
        if item is None:
            return 0
        environment.start_afresh(device)
        code = run_plan(item, corpus, module, item.name)
        if code != 0:
            return code
        device = torch.device(document.read(job.Job, item / job.JOB).device)
    raise AssertionError


def run_plan(folder: Path, corpus: np.ndarray, module: str | None, name: str = "") -> int:
    """Run this rank's part of the plan in a folder, the `name`-th of these processes."""
    work = document.read(job.Job, folder / job.JOB)
    if any(failure.is_final for failure in job.failures(folder)):
        return 0  # restarted in vain: the parent reads what failed before
    rank = own_rank(work.ranks_per_node)
    progress = job.Progress(folder, rank)
    try:
        run = _kind_of_run(work)(work, corpus, progress, folder, module, name)
        for result in run.measure():
            document.write(folder / job.result_name(result.rank), result)
    except Exception as error:
        traceback.print_exc()
        failure = job.describe(error, rank, progress.step)
        document.write(folder / job.failure_name(rank), failure)
        return 1
    return 0


class Run:
    """The steps of one rank."""

    def __init__(
        self,
        work: job.Job,
        corpus: np.ndarray,
        progress: job.Progress,
        folder: Path,
        module: str | None = None,
        name: str = "",
    ) -> None:
        self.work, self.corpus, self.progress, self.folder = work, corpus, progress, folder
        self.device = start_process_group(work, name)
        check_nodes(work)
        check_device(work.plan, self.device)
        self.context_bytes = environment.context_bytes(self.device)
        self.trainer: Trainer = build(
            work.plan,
            device=self.device,
            module=module,
            offload_folder=None if work.offload_folder is None else Path(work.offload_folder),
            base=None if work.base is None else Path(work.base),
        )
        if work.base is None and work.plan.phase.technique("lora") and not _goes_on(work):
            progress.note("note: adapters train beside initial weights; --base gives others")
        if work.static_memory == "run":
            self.trainer.arena = StaticArena(self.device)
        place = self.trainer.coordinates
        self.dp_rank = place["dp_replicate"] * work.plan.phase.mesh.dp_shard + place["dp_shard"]
        self.next_step = 0
        self.keeper: Keeper | None = None
        if work.training is not None:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self.keeper = Keeper(work, self.trainer, progress, group)
        if work.emulates_links:
            links.hold_rate(work.plan)
        self.pace_s: list[float] = []
        """The machine's speed before every step."""

    def measure(self) -> list[RankResult]:
        """Train, then count one step and profile some; the results this rank is to write.

        None when training was interrupted. On several nodes the first rank of each writes all.
        """
        load_at_start = os.getloadavg()[0]
        loss, steps_s = self.train()
        if self.keeper is not None:
            end = self.keeper.finish()
            if dist.get_rank() == 0 or self.work.ranks_per_node:
                document.write(self.folder / job.END, end)
            if end.reason == "interrupted":
                leave()
                return []
        if not self.work.counted:
            result = self.result(loss, steps_s)
            leave()
            return [result]
        peak_bytes = environment.process_peak_bytes(self.device, self.context_bytes)
        if self.device.type == "cpu":  # pages of a mapped file are the process's, not the device's
            peak_bytes -= int(self.trainer.away.made_bytes().get("host", 0.0))
        allocated_bytes = environment.allocated_bytes(self.device)
        experts = rank_loads(self.trainer.experts)
        live, counted = self.count_steps()
        live_bytes = live.peak()
        bytes_copied = self.trainer.away.take_copied()
        self.check_device_memory(sum(live_bytes.values()))
        profiled_s, matched = self.profile_steps(counted)
        result = self.result(
            loss,
            steps_s,
            peak_memory_bytes=allocated_bytes or sum(live_bytes.values()),
            process_peak_bytes=peak_bytes,
            context_bytes=self.context_bytes,
            live_bytes=live_bytes,
            profiled_s=profiled_s,
            bytes_on_wire=counted.bytes_on_wire(),
            experts=experts,
            bytes_copied=bytes_copied,
            bytes_off_device=self.trainer.away.made_bytes(),
            allocator=self.allocator(live),
            environment=environment.environment(load_at_start, self.device)
            | {
                "collectives_matched": "yes" if matched else "no",
                REFERENCE_MATMUL: f"{statistics.median(self.pace_s or [pace.matmul_s()]):.6g}",
                **_skipped_groups(self.trainer.optimizer),
                **self.emulated_links(),
            },
        )
        results = [result]
        if self.work.ranks_per_node:
            results = of_all_nodes(result)
        leave()
        return results

    def emulated_links(self) -> dict[str, str]:
        """What links between nodes were held to, where they were."""
        link = self.work.plan.cluster.pools[0].inter_node
        if not self.work.emulates_links or link is None:
            return {}
        return {EMULATED_LINKS: format_rate(link.bytes_per_s)}

    def result(self, loss: list[float], steps_s: list[float], **counted: Any) -> RankResult:
        """What this rank hands to the parent."""
        return RankResult(
            rank=dist.get_rank(),
            coordinates=self.trainer.coordinates,
            steps_s=tuple(steps_s),
            loss=tuple(loss),
            **counted,
        )

    def train(self) -> tuple[list[float], list[float]]:
        """Losses of all steps so far, and seconds of the timed ones."""
        losses: list[float] = []
        seconds: list[float] = []
        if self.keeper is not None:
            self.next_step = self.keeper.resume(self.backward)
        if self.keeper is not None and self.keeper.is_over:
            # restarted while it was being measured: steps that are not kept
            return self.keeper.losses, [self.train_step()[0] for _ in range(THROWAWAY_STEPS)]
        while self.keeper is not None or len(seconds) < self.last_step:
            if len(seconds) == self.work.warmup_steps:
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)
                if self.trainer.experts is not None:
                    self.trainer.experts.forget()
            step_s, loss, wishes = self.train_step()
            seconds.append(step_s)
            losses.append(loss)
            if self.keeper is not None:
                reason = self.keeper.after_step(self.next_step, loss, step_s, wishes)
                if reason is not None:
                    losses = self.keeper.losses
                    break
        return losses, seconds[self.work.warmup_steps :] or seconds[-1:]

    @property
    def last_step(self) -> int:
        """The step at which training ends by itself; 0 where nobody knows."""
        if self.keeper is not None:
            return self.work.steps or 0
        return self.work.warmup_steps + (self.work.steps or 0)

    def backward(self) -> None:
        """The forward and backward of a step that is not trained on."""
        self.trainer.forward_backward(self.tokens())
        self.next_step -= 1

    def tokens(self) -> Any:
        """This replica's sequences of the next step, or the batches that a user's module takes."""
        self.progress.step = step = self.next_step
        self.next_step += 1
        workload, phase = self.work.plan.workload, self.work.plan.phase
        made: Any = None
        if isinstance(self.trainer, TracedTrainer):
            made = self.trainer.own_batch(step, self.dp_rank)
            self.trainer.seed_step(step, self.dp_rank)
        if made is not None:
            return made
        if workload.lengths is not None:
            rows = data.packed_batch(self.corpus, workload, step, phase, self.dp_rank)
            return rows.to(self.device)
        return data.batch(self.corpus, workload.seed, step, phase, self.dp_rank).to(self.device)

    def train_step(self) -> tuple[float, float, tuple[bool, bool]]:
        """Seconds and mean loss of one step, and whether any rank wishes to stop or has no time.

        All ranks start together; those of a training run do so after the sum of the losses, and
        do not sample the machine's speed.
        """
        tokens = self.tokens()
        if self.keeper is None and self.starts_together():
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
        loss, (stop, late) = self.trainer.agree(local_loss, *self.wishes())
        if not math.isfinite(loss):
            self.fail_diverged(loss, local_loss)
        if self.keeper is None or not self.keeper.is_over:
            self.progress.report(self.next_step, self.last_step, loss)
        return seconds, loss, (stop, late)

    def starts_together(self) -> bool:
        """Whether ranks wait for one another before this step: before each, or before a round of
        steps, in which messages between replicas go on."""
        outer = self.trainer.outer
        return outer is None or outer.step % outer.settings.period == 0

    def wishes(self) -> tuple[bool, bool]:
        """Whether this rank's parent asks to stop, and whether the time that was given is up."""
        ask = self.work.training
        if ask is None:
            return False, False
        passed_s = time.time() - self.work.started_s
        late = dist.get_rank() == 0 and ask.until_s is not None and passed_s >= ask.until_s
        return (self.folder / job.STOP).exists(), late

    def fail_diverged(self, loss: float, local_loss: Tensor) -> None:
        """Raise RunFailed that names the step and the ranks, or the router that gave no numbers."""
        kept = self.keeper.last_words() if self.keeper is not None else ""
        self.check_routers(kept)
        ranks = ", ".join(map(str, self.trainer.diverged_ranks(local_loss)))
        raise RunFailed(f"loss={loss} at step {self.next_step} on rank {ranks}: training diverged"
                        f"{kept}; lower the learning rate or use fp32")  # fmt: skip

    def check_routers(self, kept: str) -> None:
        """Raise RunFailed on every rank when a router of any gave no numbers."""
        experts = self.trainer.experts
        if experts is None:
            return
        broken: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(broken, experts.broken_routers())
        for rank, layers in enumerate(broken):
            if layers:
                raise RunFailed(f"router=nan: that of layer {layers[0]} on rank {rank} at step "
                                f"{self.next_step}: training diverged{kept}; lower the learning "
                                "rate, or raise router_z_loss_coef")  # fmt: skip

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def allocator(self, live: LiveTensors) -> dict[str, float]:
        """What allocators need for the counted step, where that was asked for."""
        if self.work.static_memory is None:
            return {}
        found = lives.needs(live)
        if self.device.type == "cuda":
            found["caching_bytes"] = float(torch.cuda.max_memory_reserved(self.device))
            found["caching_live_bytes"] = float(torch.cuda.max_memory_allocated(self.device))
        arena = self.trainer.arena
        if arena is not None:
            found |= {
                "arena_bytes": float(arena.num_bytes),
                "placed_bytes": float(arena.use.placed_bytes),
                "not_placed_bytes": float(arena.use.other_bytes),
            }
        return found

    def count_steps(self) -> tuple[LiveTensors, Counted]:
        """Live tensors by category at the peak of one step, and collectives: of that step, or of a
        round, where replicas train apart and the step is the one with most on its way.

        Each tensor is counted by itself, so that an arena for them is left out for these steps.
        """
        arena, self.trainer.arena = self.trainer.arena, None
        outer = self.trainer.outer
        if outer is None:
            live, counter = self.count_step()
            counted = Counted(calls={OTHERS: counter.calls})
        else:
            counted = count_round(outer, self.step, lambda: CollectiveCounter(self.trainer.mesh))
            outer.skip_before(outer.settings.period)
            if outer.settings.steps_late:  # what is sent now is on its way in the next step
                self.step()
            live, _ = self.count_step()
        self.trainer.arena = arena
        return live, counted

    def step(self) -> None:
        """One step that nobody measures."""
        self.trainer.forward_backward(self.tokens())
        self.trainer.optimizer_step()

    def count_step(self) -> tuple[LiveTensors, CollectiveCounter]:
        """Live tensors of one step, and its collectives."""
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
        self.trainer.away.take_copied()
        dist.barrier()
        with counter, live:
            live.hold(parameters, "parameters")
            live.hold([b for piece in self.trainer.pieces for b in piece.buffers()], "parameters")
            live.hold(states, "optimizer")
            if self.trainer.outer is not None:
                live.hold(self.trainer.outer.kept(), "optimizer")
                live.hold(self.trainer.outer.on_their_way(), "comm_buffers")
            self.trainer.forward_backward(tokens)
            live.hold([p.grad for p in parameters if p.grad is not None], "gradients")
            self.trainer.optimizer_step()
        for hook in hooks:
            hook.remove()
        return live, counter

    def check_device_memory(self, live_bytes: int) -> None:
        """Raise RunFailed when live tensors were beyond the budget of an emulated device."""
        device = self.work.plan.cluster.pools[0].device
        if device.tensors_only and live_bytes > device.memory_bytes:
            raise RunFailed(
                f"device-memory={format_bytes(device.memory_bytes)}: live tensors of a step take "
                f"{format_bytes(live_bytes)}, {live_bytes - device.memory_bytes} bytes more; "
                "offload or recompute more, or raise the budget"
            )

    def logits_shape(self) -> tuple[int, int] | None:
        """Tokens and local vocabulary of a micro-batch's logits; None without a head."""
        phase = self.work.plan.phase
        if not any(piece.is_last for piece in self.trainer.pieces):
            return None
        tokens = phase.micro_batch_seqs * phase.seq_tokens // phase.mesh.cp
        return tokens, self.work.plan.model.vocab // phase.mesh.tp

    def profile_steps(self, counted: Counted) -> tuple[dict[str, float], bool]:
        """Mean seconds by time term of the profiled steps, and whether collectives were known.

        Where replicas train apart, the steps of a whole round are profiled.
        """
        rows: list[dict[str, float]] = []
        matched = True
        pipeline = self.trainer.pipeline
        message_s = pipeline.message_s() if pipeline is not None else 0.0
        outer = self.trainer.outer
        if outer is not None:
            outer.skip_before(1)
        for index in range(self.work.profiled_steps if outer is None else counted.period):
            seen = self.profile_step(counted.at(index + 1))
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


def _goes_on(work: job.Job) -> bool:
    """Whether weights come from a checkpoint of the same training."""
    return work.training is not None and work.training.resume is not None


def _skipped_groups(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """How many groups of an optimiser with 8-bit moments had gradients that were not finite."""
    skipped = getattr(optimizer, "num_skipped", 0)
    return {"skipped_groups": str(skipped)} if skipped else {}


def _kind_of_run(work: job.Job) -> type[Run]:
    if work.pace is None:
        return Run
    from .paced_run import PacedRun  # which is built on this module

    return PacedRun


def leave() -> None:
    """End the process group, all ranks together."""
    dist.barrier()
    destroy_process_groups()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
