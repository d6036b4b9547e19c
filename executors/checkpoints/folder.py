"""The folder of a run's checkpoints: which are complete, and whether their files are whole.

    DIR/step-00000040/            a complete checkpoint; nothing else has this form of name
        checkpoint.json           what it is (`Checkpoint`), with size and digest of every file
        .metadata, __R_0.distcp   torch's distributed checkpoint, one file per writing rank
    DIR/.partial-00000050/        one being written, renamed once every file is on disk

A checkpoint that is there is therefore complete; digests tell when a disk or a copy damaged it
afterwards. No torch here: the parent of a run looks before any rank starts.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from ... import document
from ...document import Document, Value
from ...errors import InputError
from ...model import Model
from ...traced import TracedOperator

DOCUMENT = "checkpoint.json"
STEP = re.compile(r"step-(\d{8,})")
PARTIAL = ".partial-"
LOCK = ".lock"


class File(Value, frozen=True, kw_only=True):
    """What a file of a checkpoint must be."""

    bytes: int
    sha256: str


class Checkpoint(Document, frozen=True, kw_only=True):
    """What a checkpoint holds, and of which training."""

    SCHEMA: ClassVar[str] = "forerun.checkpoint/1"

    schema: str = "forerun.checkpoint/1"
    step: int
    """Optimiser steps done. The data position as well: a batch depends on (seed, step) alone."""
    model: str
    model_digest: str
    plan_digest: str
    label: str
    """The layout that wrote it; any other may read it."""
    seed: int
    seq_tokens: int
    global_batch_seqs: int
    learning_rate: float
    precision: str
    data_digest: str
    """Of the text that was trained on; empty where a module makes its own batches."""
    torch: str
    date: str
    files: dict[str, File] = {}


def name_of(step: int) -> str:
    """The name of a complete checkpoint.

    >>> name_of(40)
    'step-00000040'
    """
    return f"step-{step:08d}"


def partial(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is complete."""
    return folder / f"{PARTIAL}{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, newest first; none without a folder."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError("checkpoint", folder, error.strerror or str(error),
                         "give a folder that you may read") from error  # fmt: skip
    found = [STEP.fullmatch(name) for name in names]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def read(path: Path) -> Checkpoint:
    """What the checkpoint at `path` says of itself; damage of any kind is an InputError.

    That of a newer forerun is one as well: to go on from an older one would lose work.
    """
    return document.read(Checkpoint, path / DOCUMENT)


def digest(path: Path) -> File:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return File(bytes=os.fstat(file.fileno()).st_size,
                    sha256=hashlib.file_digest(file, "sha256").hexdigest())  # fmt: skip


def damage(path: Path, checkpoint: Checkpoint, part: int = 0, parts: int = 1) -> str:
    """What is wrong with every `parts`-th of a checkpoint's files; empty when nothing is."""
    for name in sorted(checkpoint.files)[part::parts]:
        expected = checkpoint.files[name]
        try:
            size = (path / name).stat().st_size
            if size != expected.bytes:
                return f"{name} has {size} bytes of {expected.bytes}"
            if digest(path / name) != expected:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return ""


def complete(written: Path, checkpoint: Checkpoint) -> Path:
    """Turn a partial checkpoint whose files are on disk into a complete one, by one rename."""
    document.write(written / DOCUMENT, checkpoint)
    sync(written)
    target = written.parent / name_of(checkpoint.step)
    if target.exists():  # a damaged one of the same step, which was not resumed from
        shutil.rmtree(target)
    written.rename(target)
    sync(written.parent)
    return target


def sync(folder: Path) -> None:
    """Have the names in a folder on disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for step in steps(folder)[keep:]:
        remove(folder / name_of(step))


def remove(path: Path) -> None:
    """Remove a checkpoint; its name goes first, so that no half of one is ever found."""
    gone = path.parent / f"{PARTIAL}{path.name}"
    try:
        path.rename(gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def put_aside(folder: Path, step: int) -> None:
    """Rename checkpoints beyond a step, which were found damaged, so that they are not counted."""
    for later in steps(folder):
        if later > step:
            aside = folder / f"damaged-{name_of(later)}"
            shutil.rmtree(aside, ignore_errors=True)
            (folder / name_of(later)).rename(aside)


def sweep(folder: Path) -> None:
    """Remove what earlier runs left half written."""
    for path in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs from writing into a folder, which is made when it is not there.

    The system lets go of the lock when the process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise InputError("checkpoint", folder, error.strerror or str(error),
                         "give a folder that you may write to") from error  # fmt: skip
    with file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError("checkpoint", folder, "another run writes into it",
                                 "wait for it, or give another folder") from error  # fmt: skip
            except OSError:
                pass  # a network file system without locks
        yield


def model_digest(model: Model) -> str:
    """What two models have in common exactly when the parameters of one fit the other.

    Names and sources of models do not count; of a traced module the names and sizes of its
    parameters do, and not the operators, which change with the sequence length.
    """

    def weights(operators: tuple[TracedOperator, ...]) -> list[Any]:
        return sorted((w.name, w.elements, w.trainable) for op in operators for w in op.weights)

    raw = document.to_raw(msgspec.structs.replace(model, name="", source="", traced=None))
    if model.traced is not None:
        raw = [
            weights(model.traced.prefix),
            [(layer.repeat, weights(layer.operators)) for layer in model.layers],
            weights(model.traced.suffix),
        ]
    return hashlib.sha256(msgspec.json.encode(raw, order="deterministic")).hexdigest()


def check_resumable(folder: Path, model: Model) -> int:
    """The newest step to resume from, 0 when there is none; raises InputError when it cannot be.

    Looks at the newest readable one only: whether its files are whole, the ranks find out.
    """
    for step in steps(folder):
        try:
            found = read(folder / name_of(step))
        except InputError as error:
            if error.field == "schema":
                raise
            continue  # damaged: the ranks say so and take the one before
        check_model(folder / name_of(step), found, model)
        return step
    return 0


def check_model(path: Path, found: Checkpoint, model: Model, field: str = "resume") -> None:
    """Raise InputError unless a checkpoint is of this model."""
    if found.model_digest != model_digest(model):
        raise InputError(field, path, f"is a checkpoint of {found.model}, the plan trains "
                         f"{model.name}", "give the folder of this model, or plan that one"
                         if found.model != model.name else
                         "its sizes differ: plan the model as it was")  # fmt: skip


def newest_base(place: Path, model: Model) -> Path:
    """The newest checkpoint in a folder, as the weights that adapters of a model train beside."""
    found = steps(place)
    if not found:
        raise InputError("base", place, "holds no checkpoint",
                         "give the folder of run --checkpoint, or of quantize -o")  # fmt: skip
    path = place / name_of(found[0])
    check_model(path, read(path), model, "base")
    return path


def check_base(place: Path, model: Model) -> None:
    """Raise InputError unless the newest checkpoint in a folder is whole and of this model."""
    path = newest_base(place, model)
    problem = damage(path, read(path))
    if problem:
        raise InputError("base", path, f"is damaged ({problem})", "give another checkpoint")


def check_fresh(folder: Path) -> None:
    """Raise InputError when a folder holds checkpoints that a new training would mix with."""
    found = steps(folder)
    if found:
        raise InputError("checkpoint", folder, f"holds checkpoints up to step {found[0]}",
                         "add --resume to go on from there, or give another folder")  # fmt: skip


def disk_problem(error: BaseException, folder: Path) -> str:
    """What a failed write says, in a few words."""
    text = " ".join(str(error).split())
    if "No space left" in text or "Disk quota" in text:
        free = shutil.disk_usage(folder).free
        return f"the disk is full ({free} bytes free in {folder})"
    return text[:300]
