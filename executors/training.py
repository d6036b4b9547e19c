"""What a rank does between the steps of a training run: checkpoints, metrics, the end.

Every rank calls the same methods at the same step, and what they decide depends on what all ranks
know: the losses, and the wishes that were summed with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from ..costmodel.diff import plan_digest
from ..errors import InputError, RunFailed
from . import job
from .checkpoints import folder, reader
from .checkpoints.folder import Checkpoint
from .checkpoints.writer import Outcome, Writer
from .metrics import Metrics
from .trainer import Trainer

Reason = Literal["steps", "loss", "time", "interrupted"]


class Keeper:
    """Resumes a training run, keeps its checkpoints and metrics, and knows when it is over."""

    def __init__(
        self, work: job.Job, trainer: Trainer, progress: job.Progress, group: dist.ProcessGroup
    ) -> None:
        assert work.training is not None
        self.work, self.ask = work, work.training
        self.trainer, self.progress, self.group = trainer, progress, group
        self.rank = dist.get_rank()
        self.losses: list[float] = []
        self.step = 0
        """Steps done."""
        self.reason: Reason = "steps"
        """Why training ended, once it did."""
        self.writer: Writer | None = None
        self.metrics: Metrics | None = None

    # Before the first step.

    def resume(self, backward: Callable[[], object]) -> int:
        """Go on from the newest whole checkpoint, if any; returns the steps that are done.

        `backward` is as in `reader.load`.
        """
        attempt = int(os.environ.get(job.ATTEMPT, "0"))
        own = Path(self.ask.checkpoint) if self.ask.checkpoint is not None else None
        if own is not None and self.rank == 0:
            folder.sweep(own)
        if own is not None and self.work.ranks_per_node:
            self._check_shared(own)
        places: list[Path] = []
        if own is not None and (attempt > 0 or self.ask.resume is not None):
            places.append(own)
        if self.ask.resume is not None and Path(self.ask.resume) not in places:
            places.append(Path(self.ask.resume))
        found, warnings = reader.find(places, self.work.plan.model, self.group)
        for warning in warnings:
            self.progress.note(f"warning: {warning}")
        if found is not None:
            path, checkpoint = found
            for difference in differences(self._facts(), checkpoint):
                self.progress.note(f"note: {difference}")
            self.losses = reader.load(self.trainer, path, checkpoint, self.group, backward)
            self.step = checkpoint.step
        if own is not None:
            if self.rank == 0:
                folder.put_aside(own, self.step)
            self.writer = Writer(own, self._facts(), self.ask.keep, self.group)
            self.writer.last = self.step if found is not None and found[0].parent == own else None
        self._say_start(attempt, found is not None)
        self._open_metrics()
        return self.step

    def _check_shared(self, own: Path) -> None:
        """Raise InputError unless every node sees the folder that rank 0 writes into."""
        mark = own / f"{folder.PARTIAL}seen-by-all"
        if self.rank == 0:
            mark.mkdir(parents=True, exist_ok=True)
        dist.barrier(group=self.group)
        sees: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(sees, mark.exists(), group=self.group)
        if self.rank == 0:
            mark.rmdir()
        if not all(sees):
            problem = f"rank {sees.index(False)} does not see what rank 0 writes there"
            raise InputError("checkpoint", own, problem, "give a folder that all nodes share")

    def _say_start(self, attempt: int, resumed: bool) -> None:
        if attempt > 0:
            self.progress.note(f"warning: restart {attempt}: a rank was lost; "
                               f"going on from step {self.step}")  # fmt: skip
        elif resumed:
            self.progress.note(f"note: going on from step {self.step}")
        elif self.ask.resume is not None:
            self.progress.note(f"note: no checkpoint in {self.ask.resume} yet: starting at step 0")

    def _open_metrics(self) -> None:
        wanted = self.ask.metrics is not None or self.ask.tensorboard is not None
        if wanted and self.rank == 0:
            self.metrics = Metrics(
                Path(self.ask.metrics) if self.ask.metrics is not None else None,
                Path(self.ask.tensorboard) if self.ask.tensorboard is not None else None,
                self.step,
                self.progress.note,
            )

    def _facts(self) -> Checkpoint:
        work, plan = self.work, self.work.plan
        return Checkpoint(
            step=self.step,
            model=plan.model.name,
            model_digest=folder.model_digest(plan.model),
            plan_digest=plan_digest(plan),
            label=plan.label,
            seed=plan.workload.seed,
            seq_tokens=plan.phase.seq_tokens,
            global_batch_seqs=plan.workload.global_batch_seqs,
            learning_rate=plan.workload.learning_rate,
            precision=plan.phase.compute_dtype,
            data_digest=work.data_digest,
            torch=str(torch.__version__),
            date="",
        )

    @property
    def is_over(self) -> bool:
        """Whether all steps that were asked for are done."""
        return self.work.steps is not None and self.step >= self.work.steps

    # After every step.

    def after_step(
        self, step: int, loss: float, seconds: float, wishes: tuple[bool, bool]
    ) -> Reason | None:
        """Keep what is to be kept of a step that ended well; why it was the last, or None.

        `wishes` are those of any rank: to stop, and that the time is up.
        """
        self.step = step
        self.losses.append(loss)
        self._measure(step, loss, seconds)
        reason = self._reason(wishes)
        if self.writer is not None:
            outcomes = self.writer.finished()
            if reason is not None or step % self.ask.every == 0:
                outcomes += self.writer.save(self.trainer, step, self.losses)
            self._hear(outcomes)
        self.reason = reason or self.reason
        return reason

    def _reason(self, wishes: tuple[bool, bool]) -> Reason | None:
        if wishes[0]:
            return "interrupted"
        if self.is_over:
            return "steps"
        recent = self.losses[-job.LOSS_WINDOW :]
        if self.ask.until_loss is not None and len(recent) == job.LOSS_WINDOW:
            if sum(recent) / len(recent) <= self.ask.until_loss:
                return "loss"
        return "time" if wishes[1] else None

    def _measure(self, step: int, loss: float, seconds: float) -> None:
        if self.ask.metrics is None and self.ask.tensorboard is None:
            return
        figures = torch.tensor(
            [float(memory_bytes(self.trainer.device)), seconds],
            dtype=torch.float64,
            device=self.trainer.device,
        )
        dist.all_reduce(figures, op=dist.ReduceOp.MAX)
        if self.metrics is not None:
            fullest_bytes, step_s = figures.tolist()
            self.metrics.write({
                "step": step,
                "loss": loss,
                "step_s": step_s,
                "tokens_per_s": self.work.plan.workload.global_batch_tokens / step_s,
                "memory_bytes": int(fullest_bytes),
            })  # fmt: skip

    def _hear(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.problem:
                self.progress.note(f"warning: checkpoint of step {outcome.step} not written: "
                                   f"{outcome.problem}; {self._last()}")  # fmt: skip

    def _last(self) -> str:
        last = self.writer.last if self.writer is not None else None
        return f"the last checkpoint is of step {last}" if last else "there is no other checkpoint"

    def last_words(self) -> str:
        """What is left when a step goes wrong; waits for a checkpoint in the making."""
        if self.writer is None:
            return ""
        self._hear(self.writer.wait())
        return f"; {self._last()}"

    # After the last step.

    def finish(self) -> job.End:
        """Wait for the last checkpoint; RunFailed when it could not be written."""
        if self.metrics is not None:
            self.metrics.close()
        path: str | None = None
        if self.writer is not None:
            outcomes = self.writer.wait()
            self.writer.close()
            for outcome in outcomes:
                if outcome.problem:
                    raise RunFailed(f"checkpoint={self.ask.checkpoint}: step {outcome.step} not "
                                    f"written, {outcome.problem}; {self._last()}: free some "
                                    "space and add --resume")  # fmt: skip
            path = str(Path(self.ask.checkpoint or "") / folder.name_of(self.step))
        return job.End(reason=self.reason, step=self.step, checkpoint=path)


def differences(now: Checkpoint, then: Checkpoint) -> list[str]:
    """What makes the loss go on otherwise than in the run that wrote the checkpoint."""
    names = {
        "seed": "seed", "seq_tokens": "seq-len", "global_batch_seqs": "global-batch",
        "learning_rate": "learning rate", "precision": "precision",
    }  # fmt: skip
    found = [
        f"{word} is {getattr(now, name)}, and was {getattr(then, name)} in the checkpoint"
        for name, word in names.items()
        if getattr(now, name) != getattr(then, name)
    ]
    if now.data_digest != then.data_digest:
        found.append("the text is another than the one the checkpoint was trained on")
    return found


def memory_bytes(device: torch.device) -> int:
    """What this rank uses: the most that was allocated on the device, or what is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss
