"""Writes checkpoints beside the training: a copy now, the files in a thread.

`save` copies this rank's boxes into host memory and returns; a thread of every rank then writes
them through torch's distributed checkpoint, over a process group of its own, so that its messages
never meet those of the training. Once every rank's file is on disk, rank 0 renames the folder,
which is the moment from which the checkpoint exists, and removes the oldest beyond those to keep.

A write that fails (a full disk) leaves the last checkpoint as it was; the run is told and goes on.
Parameters that are not finite are never kept.
"""

from __future__ import annotations

import datetime
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from ..trainer import Trainer
from . import folder
from .folder import Checkpoint, File
from .planners import BOXES, BoxSavePlanner, State
from .shards import LOSSES, Shard, model_state, optimizer_state, outer_state, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a checkpoint: `problem` is empty when it is complete."""

    step: int
    problem: str = ""


class Writer:
    """The checkpoints of one run, as one rank sees them; every rank calls the same in turn."""

    def __init__(self, place: Path, facts: Checkpoint, keep: int, group: dist.ProcessGroup) -> None:
        """`facts` is the document of every checkpoint, but for step, date and files."""
        self.place, self.facts, self.keep, self.group = place, facts, keep, group
        self.rank = dist.get_rank(group)
        self.last: int | None = None
        """The step of the last complete checkpoint written or resumed from."""
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Outcome] | None = None

    def save(self, trainer: Trainer, step: int, losses: list[float]) -> list[Outcome]:
        """Begin the checkpoint of a step; what became of the one before, if it was not known yet.

        Waits where that is still being written.
        """
        before = self.wait()
        state = model_state(trainer) | optimizer_state(trainer) | outer_state(trainer)
        state[LOSSES] = whole(torch.tensor(losses, dtype=torch.float64))
        staged = self._stage(state, trainer.device)
        self._pending = self._thread.submit(self._write, staged, step)
        return before

    def finished(self) -> list[Outcome]:
        """What became of the checkpoint in the making, when it is done; never waits."""
        return self.wait() if self._pending is not None and self._pending.done() else []

    def wait(self) -> list[Outcome]:
        """What became of the checkpoint in the making, once it is done."""
        if self._pending is None:
            return []
        outcome = self._pending.result()
        self._pending = None
        if not outcome.problem:
            self.last = outcome.step
        return [outcome]

    def close(self) -> None:
        """Let the thread go."""
        self._thread.shutdown(wait=True)

    def _stage(self, state: State, device: torch.device) -> State:
        """The state in host memory, in buffers that are kept from one checkpoint to the next."""
        staged: State = {}
        for name, shard in state.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != shard.tensor.shape:
                copy = torch.empty(
                    shard.tensor.shape, dtype=shard.tensor.dtype, pin_memory=device.type == "cuda"
                )
                self._copies[name] = copy
            copy.copy_(shard.tensor, non_blocking=True)
            staged[name] = Shard(tensor=copy, shape=shard.shape, offsets=shard.offsets)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return staged

    def _write(self, state: State, step: int) -> Outcome:
        written = folder.partial(self.place, step)
        files, problem = self._write_files(state, written)
        everyone: list[Any] = [None] * self.group.size()
        dist.all_gather_object(everyone, (files, problem), group=self.group)
        problems = [found for _, found in everyone if found]
        verdict = [problems[0] if problems else ""]
        if self.rank == 0 and not problems:
            known = {name: file for found, _ in everyone for name, file in found.items()}
            verdict = [self._complete(written, step, known)]
        dist.broadcast_object_list(verdict, group=self.group, group_src=0)
        if verdict[0] and self.rank == 0:
            shutil.rmtree(written, ignore_errors=True)
        return Outcome(step=step, problem=verdict[0])

    def _write_files(self, state: State, written: Path) -> tuple[dict[str, File], str]:
        """This rank's files with their digests, or what went wrong; the same calls on all ranks."""
        finite = torch.tensor([all(_finite(shard.tensor) for shard in state.values())])
        dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=self.group)
        if not finite:
            return {}, "parameters or optimiser states are not finite"
        try:
            state_dict_saver.save(
                {BOXES: state},
                storage_writer=FileSystemWriter(written, overwrite=False),
                planner=BoxSavePlanner(),
                process_group=self.group,
            )
            mine = list(written.glob(f"__{self.rank}_*"))
            mine += [written / ".metadata"] if self.rank == 0 else []
            return {path.name: folder.digest(path) for path in mine}, ""
        except Exception as error:
            return {}, folder.disk_problem(error, self.place)

    def _complete(self, written: Path, step: int, files: dict[str, File]) -> str:
        """Make the checkpoint exist; what went wrong, if anything did."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        document = msgspec.structs.replace(self.facts, step=step, date=now, files=files)
        try:
            folder.complete(written, document)
            folder.prune(self.place, self.keep)
        except Exception as error:
            return folder.disk_problem(error, self.place)
        return ""


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
