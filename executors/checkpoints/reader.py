"""Reads a checkpoint into a trainer of any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.parallel import DistributedDataParallel

from ...errors import InputError
from ...model import Model
from ..trainer import Trainer
from . import folder
from .folder import Checkpoint
from .planners import BOXES, BoxLoadPlanner, PlainReader, State
from .shards import (
    LOSSES,
    model_state,
    optimizer_state,
    outer_state,
    prepare_optimizer,
    whole,
)

Found = tuple[Path, Checkpoint]


def find(
    places: Sequence[Path], model: Model, group: dist.ProcessGroup
) -> tuple[Found | None, list[str]]:
    """The newest checkpoint whose files are whole, the first place that has any, and warnings.

    Ranks share the reading of the files and agree on the answer. None where no place holds a
    checkpoint; InputError where all that there are are damaged.
    """
    rank, warnings = dist.get_rank(group), list[str]()
    for place in places:
        listed = [folder.steps(place) if rank == 0 else []]
        dist.broadcast_object_list(listed, group=group, group_src=0)
        for step in listed[0]:
            path = place / folder.name_of(step)
            found, problem = _examine(path, model, group)
            if found is not None:
                return (path, found), warnings
            warnings.append(f"checkpoint {path} is damaged ({problem}): left out")
        if listed[0]:
            raise InputError("resume", place, f"no checkpoint is whole: {warnings[-1]}",
                             "give another folder, or start anew in one")  # fmt: skip
    return None, warnings


def _examine(path: Path, model: Model, group: dist.ProcessGroup) -> tuple[Checkpoint | None, str]:
    """The checkpoint at `path` if it is whole, else what is wrong with it; the same on all ranks.

    A checkpoint of another model or of a newer forerun is an InputError.
    """
    found: Checkpoint | None = None
    refused: InputError | None = None
    problem = ""
    try:
        found = folder.read(path)
        folder.check_model(path, found, model)
        problem = folder.damage(path, found, dist.get_rank(group), group.size())
    except InputError as error:
        if error.field in ("schema", "resume"):
            refused = error
        problem = f"{folder.DOCUMENT}: {error.problem}"
    everyone: list[tuple[str, InputError | None]] = [("", None)] * group.size()
    dist.all_gather_object(everyone, (problem, refused), group=group)
    for _, error in everyone:
        if error is not None:
            raise error
    problems = [text for text, _ in everyone if text]
    return (None, problems[0]) if problems else (found, "")


def load(
    trainer: Trainer,
    path: Path,
    found: Checkpoint,
    group: dist.ProcessGroup,
    backward: Callable[[], object],
) -> list[float]:
    """Parameters, buffers and optimiser states in place; the losses of the steps so far.

    `backward` runs a forward and backward whose gradients are dropped: DDP settles the order of its
    buckets in the first one, and sums of more than two ranks would otherwise round differently in
    the first step after a resumption.
    """
    if any(isinstance(module, DistributedDataParallel) for module in trainer.modules):
        backward()
        trainer.optimizer.zero_grad(set_to_none=True)
    prepare_optimizer(trainer.optimizer)
    if trainer.outer is not None:
        trainer.outer.resume_at(found.step)
    losses = torch.zeros(found.step, dtype=torch.float64)
    state: State = model_state(trainer) | optimizer_state(trainer) | outer_state(trainer)
    state[LOSSES] = whole(losses)
    try:
        with torch.no_grad():
            state_dict_loader.load(
                {BOXES: state},
                storage_reader=PlainReader(path),
                planner=BoxLoadPlanner(str(path)),
                process_group=group,
            )
    except CheckpointException as error:
        raise _cause(error, path) from error
    return losses.tolist()


def _cause(error: CheckpointException, path: Path) -> InputError:
    """What a rank found wrong, among what torch collected from all of them."""
    found = [cause for cause, _ in error.failures.values()]
    told = [cause for cause in found if isinstance(cause, InputError)]
    text = " ".join(str(found[0]).split())[:300] if found else str(error)
    return told[0] if told else InputError("resume", path, f"cannot be read ({text})",
                                           "give another checkpoint")  # fmt: skip
