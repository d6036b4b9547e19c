"""Counting live tensors: the peak of one step, and what it was made of.

`LiveTensors` is entered for one step that is not timed. It sees every operator below autograd and
writes down each tensor storage once, whatever number of views lie on it, when it appears and when
it goes: a weak reference to the storage fires when the last owner lets go, be it Python or a saved
tensor in C++. FSDP2 empties and refills storages by `resize_`, which is no operator; that method is
wrapped while the counter is entered.

What a storage was for is known only later (a matrix product's result turns out to be a gradient),
so the counter keeps a log of (storage, change of bytes) and sorts it out at the end:

    gradients            a parameter's `.grad` when the backward was done; inputs of FSDP2's
                         reduce-scatter; what a backward leaves behind in a parameter's shape
                         (DDP's gradients before they move into its buckets)
    gathered_parameters  storages that FSDP2 refills
    logits_loss          tensors of (tokens, vocabulary) made between the final norm and the loss,
                         forward or backward
    activations          made in a forward (or in recomputation) and alive at its end
    comm_buffers         handed to a collective, and nothing of the above
    workspace            the rest: temporaries, gradients of activations, input tokens

Some storages are met first as an operator's input, because what made them works below the
counter: DDP's buckets, which are older than the step and outlive it, and buffers of collectives,
which come and go. Those that outlive the step count from its start, the others from where they
are met.

Limits: memory inside one operator (a library's scratch space) is not seen. A storage that is older
than the step and never touched by it is seen only when it is a parameter, a buffer, an optimiser
state or a gradient.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ..torch_compat import is_fake, storage_key
from .comm import collective_kind, is_wrapped, tensors_in

CATEGORIES = (
    "parameters", "gradients", "optimizer", "activations", "gathered_parameters",
    "comm_buffers", "logits_loss", "workspace",
)  # fmt: skip


@dataclass(slots=True, eq=False)
class Record:
    """One storage: its size now, and what is known of its use."""

    nbytes: int
    shape: tuple[int, ...]
    mark: str
    """The innermost mark in which it was made: forward, backward, ...; `before` the step."""
    mark_index: int
    known: str | None = None
    """A category that is certain."""
    refilled: bool = False
    communicated: bool = False
    outlived_mark: bool = False
    in_head: bool = False
    """Made between the final norm and the loss, or on the way back."""
    found: bool = False
    """Met first as an input of an operator."""
    lasting: bool = False
    """Still there when the step was over."""


def local_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors behind a wrapper (a DTensor's shard), or the tensor itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    inner = [getattr(tensor, name) for name in flatten()[0]]
    return [part for item in inner if isinstance(item, Tensor) for part in local_tensors(item)]


class LiveTensors(TorchDispatchMode):
    """Logs the life of every storage while entered; `begin`/`end` tell it the marks of the step."""

    def __init__(self, *, logits_shape: tuple[int, int] | None = None) -> None:
        """`logits_shape`: (tokens of a micro-batch, local vocabulary) of ranks with a head."""
        super().__init__()
        self.logits_shape = logits_shape
        self.log: list[tuple[Record, int]] = []
        self.before: list[tuple[Record, int]] = []
        self.marks: list[tuple[str, int]] = []
        self.num_marks = 0
        self.parameter_shapes: set[tuple[int, ...]] = set()
        self.in_head = False
        self._records: dict[int, Record] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._restore: Callable[[], None] | None = None
        self._started = False

    # What the step says of itself.

    def begin(self, name: str) -> None:
        """A mark opens: `forward`, `backward`, `recompute` or `optimizer`."""
        self.num_marks += 1
        self.marks.append((name, self.num_marks))
        self.in_head = name == "backward"

    def end(self, name: str) -> None:
        """The innermost mark closes; what it made and left alive outlives it."""
        opened, index = self.marks.pop()
        assert opened == name, f"mark {name} closed while {opened} was open"
        self.in_head = self.in_head and name == "recompute"
        for record in self._records.values():
            if record.mark_index == index:
                record.outlived_mark = True

    def watch_head(self, norm: nn.Module) -> RemovableHandle:
        """Know the head by the output of the norm before it, whose gradient ends it in backward."""

        def leave(_: Tensor) -> None:
            self.in_head = False

        def enter(module: nn.Module, args: Any, out: Tensor) -> None:
            self.in_head = True
            if out.requires_grad:
                out.register_hook(leave)

        return norm.register_forward_hook(enter)

    def hold(self, tensors: Iterable[Tensor], category: str) -> None:
        """Name the category of tensors, such as the parameters; new ones predate the step."""
        for tensor in tensors:
            for inner in local_tensors(tensor):
                if inner.device.type != "meta":
                    self._see(inner, "before").known = category
                    if category == "parameters":
                        self.parameter_shapes.add(tuple(inner.shape))

    # Watching.

    def __enter__(self) -> LiveTensors:
        gc.collect()
        self._restore = _wrap_resize(self._resized)
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for record in self._records.values():
            record.lasting = True
        if self._restore is not None:
            self._restore()
        self._references.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_wrapped(types):
            return NotImplemented
        kwargs = kwargs or {}
        if any(is_fake(kind) for kind in types):
            return func(*args, **kwargs)
        self._started = True
        for tensor in tensors_in((args, kwargs)):
            self._see(tensor, "before")
        out = func(*args, **kwargs)
        made_in = self.marks[-1][0] if self.marks else "none"
        for tensor in tensors_in(out):
            self._see(tensor, made_in)
        self._note_use(func, args, out)
        return out

    def _note_use(self, func: Any, args: Any, out: Any) -> None:
        if collective_kind(func) is not None:
            for tensor in tensors_in((args, out)):
                self._see(tensor, "before").communicated = True
        elif func.namespace == "fsdp":
            self._note_fsdp(str(func), args, out)

    def _note_fsdp(self, name: str, args: Any, out: Any) -> None:
        """FSDP2's copies into and out of its buffers; their results are in no other use."""
        if name.startswith("fsdp.chunk_cat"):
            for tensor in tensors_in(args):
                record = self._see(tensor, "before")
                if record.mark == "backward":
                    record.known = "gradients"
        elif name.startswith("fsdp.all_gather_copy_in"):
            for tensor in tensors_in(out):
                self._see(tensor, "before").communicated = True

    def _see(self, tensor: Tensor, mark: str) -> Record:
        """The record of a tensor's storage; a new one is logged as made in `mark`."""
        storage = tensor.untyped_storage()
        record = self._records.get(storage_key(storage))
        if record is None:
            record = self._new(storage, storage.nbytes(), tuple(tensor.shape), mark)
        elif record.nbytes != storage.nbytes():
            self._change(record, storage.nbytes())
        return record

    def _new(
        self, storage: torch.UntypedStorage, nbytes: int, shape: tuple[int, ...], mark: str
    ) -> Record:
        index = self.marks[-1][1] if self.marks and mark != "before" else 0
        record = Record(nbytes, shape, mark, index, in_head=self.in_head)
        key = storage_key(storage)
        self._records[key] = record
        self._references[key] = weakref.ref(storage, lambda _: self._gone(key))
        record.found = mark == "before" and self._started
        (self.log if record.found or mark != "before" else self.before).append((record, nbytes))
        return record

    def _gone(self, key: int) -> None:
        record = self._records.pop(key)
        del self._references[key]
        self._change(record, 0)

    def _change(self, record: Record, nbytes: int) -> None:
        self.log.append((record, nbytes - record.nbytes))
        record.nbytes = nbytes

    def _resized(self, storage: torch.UntypedStorage, nbytes_before: int) -> None:
        record = self._records.get(storage_key(storage))
        if record is None:
            record = self._new(storage, nbytes_before, (), "before")
        self._change(record, storage.nbytes())
        record.refilled = True

    # The answer.

    def category(self, record: Record) -> str:
        """What a storage was for, judged by its whole life."""
        if record.known is not None:
            return record.known
        if record.refilled:
            return "gathered_parameters"
        if record.in_head and self.logits_shape and _is_logits(record.shape, *self.logits_shape):
            return "logits_loss"
        left = record.outlived_mark and record.mark == "backward"
        if left and record.shape in self.parameter_shapes:
            return "gradients"
        if record.outlived_mark and record.mark in ("forward", "recompute"):
            return "activations"
        return "comm_buffers" if record.communicated else "workspace"

    def peak(self) -> dict[str, int]:
        """Bytes by category at the first moment of the highest total."""
        before, log = list(self.before), list[tuple[Record, int]]()
        met: set[int] = set()
        for record, change in self.log:
            first = id(record) not in met
            met.add(id(record))
            older = first and record.found and record.lasting
            (before if older else log).append((record, change))
        moment = _highest(sum(n for _, n in before), [change for _, change in log])
        totals: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        for record, change in before + log[:moment]:
            totals[self.category(record)] += change
        return totals


def _is_logits(shape: tuple[int, ...], tokens: int, vocab: int) -> bool:
    return len(shape) > 1 and shape[-1] == vocab and math.prod(shape[:-1]) == tokens


def _highest(start: int, changes: list[int]) -> int:
    """How many of the changes lead to the first highest running total.

    >>> _highest(5, [1, 3, -4, 4, -9])
    2
    """
    best, moment, total = start, 0, start
    for index, change in enumerate(changes, start=1):
        total += change
        if total > best:
            best, moment = total, index
    return moment


def _wrap_resize(tell: Callable[[torch.UntypedStorage, int], None]) -> Callable[[], None]:
    """Have every `UntypedStorage.resize_` told; returns what undoes it."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        nbytes_before = storage.nbytes()
        result = original(storage, size)
        tell(storage, nbytes_before)
        return result

    own = "resize_" in vars(torch.UntypedStorage)
    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]

    def restore() -> None:
        if own:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]
        else:
            del torch.UntypedStorage.resize_

    return restore
