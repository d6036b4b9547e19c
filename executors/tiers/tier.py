"""A tier: memory off the device, in places that are made once and used again.

    MappedTier   on CPUs the host's memory: a file mapped into this process
    PinnedTier   on CUDA the host's memory: page-locked, so that copies run beside compute
    DiskTier     a file, written and read

Files are reserved before they are written to, so that a full disk is told when a place is made and
never while it is filled, and unlinked as soon as they are open, so that nothing of them outlives
the process. All places together stay within the tier's budget.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import InputError, RunFailed
from ...units import format_bytes

PAGE_BYTES = mmap.ALLOCATIONGRANULARITY


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Some bytes of a tier."""

    num_bytes: int
    start: int = 0
    """In the tier's file."""
    memory: Tensor | None = None
    """uint8, where the tier is memory."""


class Tier(Protocol):
    """Memory off the device. `write` and `read` run wherever a copier runs them."""

    name: str
    made_bytes: int
    """Of all places made."""

    def make(self, num_bytes: int) -> Place:
        """A new place, of zeros; raises RunFailed where budget or disk have no room for it."""
        ...

    def write(self, place: Place, at: int, source: Tensor) -> None:
        """Put a tensor of any form into a place, from byte `at` on."""
        ...

    def read(self, place: Place, at: int, target: Tensor) -> None:
        """Fill a tensor from a place."""
        ...


class Budget:
    """Bytes that all places of a tier share."""

    def __init__(self, name: str, budget_bytes: float) -> None:
        self.name, self.budget_bytes = name, budget_bytes
        self.made_bytes = 0

    def spend(self, num_bytes: int) -> None:
        """Count a new place; raises RunFailed beyond the budget."""
        over = self.made_bytes + num_bytes - self.budget_bytes
        if over > 0:
            raise RunFailed(
                f"{self.name}-memory={format_bytes(self.budget_bytes)}: offload needs "
                f"{format_bytes(over)} more on this rank; offload less, or raise the budget"
            )
        self.made_bytes += num_bytes


class PinnedTier(Budget):
    """Page-locked memory of the host."""

    def make(self, num_bytes: int) -> Place:
        self.spend(num_bytes)
        return Place(num_bytes, memory=torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True))

    def write(self, place: Place, at: int, source: Tensor) -> None:
        _within(place, at, source).copy_(source, non_blocking=True)

    def read(self, place: Place, at: int, target: Tensor) -> None:
        target.copy_(_within(place, at, target), non_blocking=True)


def _within(place: Place, at: int, like: Tensor) -> Tensor:
    """The part of a place's memory that holds a tensor of that form, contiguous."""
    assert place.memory is not None
    num_bytes = like.numel() * like.element_size()
    return place.memory[at : at + num_bytes].view(like.dtype).view(like.shape)


class _File(Budget):
    """A file of no name that grows by whole pages."""

    def __init__(self, name: str, budget_bytes: float, folder: Path) -> None:
        super().__init__(name, budget_bytes)
        self.folder = folder
        try:
            self.descriptor, path = tempfile.mkstemp(prefix=f"forerun-{name}-", dir=folder)
            os.unlink(path)
        except OSError as error:
            problem = f"cannot write there ({error.strerror})"
            remedy = "give --offload-dir a folder that can be written to"
            raise InputError("offload-dir", str(folder), problem, remedy) from error
        self.length = 0

    def extend(self, num_bytes: int) -> int:
        """Reserve more of the file; the byte where it starts. Nothing changes where it fails."""
        start, whole = self.length, -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        self.spend(num_bytes)
        try:
            os.posix_fallocate(self.descriptor, start, whole)
        except OSError as error:
            self.made_bytes -= num_bytes
            os.ftruncate(self.descriptor, start)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = os.fstatvfs(self.descriptor)
            left = free.f_bavail * free.f_frsize
            raise RunFailed(
                f"offload-dir={self.folder}: the disk is full: {format_bytes(whole)} more are "
                f"needed, {format_bytes(left)} are free; free some, or give another folder"
            ) from error
        self.length = start + whole
        return start

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class MappedTier(_File):
    """A file mapped into this process: on CPUs the stand-in for the memory of a host."""

    def make(self, num_bytes: int) -> Place:
        start = self.extend(num_bytes)
        mapped = mmap.mmap(self.descriptor, max(1, num_bytes), offset=start)
        memory = torch.frombuffer(mapped, dtype=torch.uint8, count=num_bytes)
        return Place(num_bytes, start, memory)

    def write(self, place: Place, at: int, source: Tensor) -> None:
        _within(place, at, source).copy_(source)

    def read(self, place: Place, at: int, target: Tensor) -> None:
        target.copy_(_within(place, at, target))


class DiskTier(_File):
    """A file that is written to and read from; on CUDA through page-locked memory."""

    def make(self, num_bytes: int) -> Place:
        return Place(num_bytes, self.extend(num_bytes))

    def write(self, place: Place, at: int, source: Tensor) -> None:
        staged = source.contiguous()
        if source.is_cuda:
            staged = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            staged.copy_(source, non_blocking=True)
            torch.cuda.current_stream(source.device).synchronize()
        view = _memory(staged)
        done = 0
        while done < len(view):
            done += os.pwrite(self.descriptor, view[done:], place.start + at + done)

    def read(self, place: Place, at: int, target: Tensor) -> None:
        direct = target.is_contiguous() and not target.is_cuda
        staged = target if direct else torch.empty(
            target.shape, dtype=target.dtype, pin_memory=target.is_cuda
        )  # fmt: skip
        view = _memory(staged)
        done = 0
        while done < len(view):
            got = os.preadv(self.descriptor, [view[done:]], place.start + at + done)
            if got == 0:
                raise RunFailed(f"offload-dir={self.folder}: the file of offloaded tensors ends "
                                "early; the disk failed")  # fmt: skip
            done += got
        if not direct:
            target.copy_(staged, non_blocking=True)
            if target.is_cuda:
                torch.cuda.current_stream(target.device).synchronize()


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    flat = tensor.detach().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0)
    return flat.numpy().data.cast("B")


def make_tier(
    name: str, device: torch.device, *, folder: Path, budget_bytes: float | None = None
) -> Tier:
    """The tier of that name (host, disk) for tensors of a device."""
    budget = math.inf if budget_bytes is None else budget_bytes
    if name == "disk":
        return DiskTier(name, budget, folder)
    if device.type == "cuda":
        return PinnedTier(name, budget)
    return MappedTier(name, budget, folder)
