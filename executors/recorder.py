"""Records one forward and backward of a module on fake tensors, operator by operator.

A storage is noted once, whatever number of views lie on it; operators that only make views are left
out. An operator of the backward belongs to the forward operator whose autograd node calls it: both
know the node's sequence number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import aten
from .torch_compat import backward_node, operator_name, sequence_number, storage_key

ENGINE_NODES = ("AccumulateGrad", "torch::autograd::AccumulateGrad")
SUMS = ("add", "add_")
"""In backward: sums over the consumers of a tensor, which the cost model knows from the graph."""


@dataclass(slots=True)
class Call:
    """One operator of the forward."""

    name: str
    module: str | None
    """Path of the submodule that called it; None outside of the module (the loss)."""
    kind: str
    sizes: tuple[int, ...]
    sequence: int
    inputs: list[int]
    """Storages that need a gradient, parameters apart."""
    outputs: list[int]
    weights: list[str]
    backward: list[aten.Priced] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)
    collectives: list[Exchange] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A collective of the tensor-parallel group at this place."""

    kind: Literal["all_reduce", "all_gather"]
    elements: int
    """Of the full logical buffer."""
    backward: bool = False
    dtype: Literal["compute", "fp32"] = "compute"


@dataclass(slots=True)
class Storage:
    """A storage: its bytes and the dtype of the tensor it was met as; held so that it stays one."""

    nbytes: int
    dtype: torch.dtype
    held: Any


class Recorder(TorchDispatchMode):
    """Entered for a forward and, after `start_backward`, for its backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.storages: list[Storage] = []
        self.entered: Counter[str] = Counter()
        """How often each submodule was called."""
        self.failed_at = ""
        """The operator that raised, if one did."""
        self.log_softmax_widths: dict[int, int] = {}
        """Length of the axis of every log-softmax, by its result."""
        self._index: dict[int, int] = {}
        self._stack: list[str] = []
        self._saved: list[tuple[int, int]] = []
        self._starts: list[int] = []
        self._in_backward = False
        self._module = module
        self.parameters = {self._see(p): name for name, p in module.named_parameters()}
        self._buffers = {self._see(buffer) for buffer in module.buffers()}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Submodules tell when they are called, autograd what it keeps, torch every operator."""
        hooks = []
        for path, child in self._module.named_modules():
            hooks.append(child.register_forward_pre_hook(self._enter(path)))
            hooks.append(child.register_forward_hook(self._leave, always_call=True))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._save, lambda kept: kept), self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def start_backward(self) -> None:
        """What is called from here on belongs to the backward."""
        self._in_backward = True
        self._starts = [call.sequence for call in self.calls]

    def finish(self) -> None:
        """Give every saved storage to the operators that saved it."""
        for storage, sequence in self._saved:
            call = self._call_at(sequence)
            if call is not None and storage not in call.saves:
                call.saves.append(storage)

    @property
    def saved_bytes(self) -> int:
        """Bytes that autograd kept, each storage once, parameters and buffers apart."""
        return sum(self.storages[i].nbytes for i in {storage for storage, _ in self._saved})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except Exception:
            self.failed_at = self.failed_at or operator_name(func)
            raise
        if self._in_backward:
            self._note_backward(func, args, out)
        else:
            self._note_forward(func, args, kwargs, out)
        return out

    def _note_forward(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        given = aten.tensors_of((*args, *kwargs.values()))
        made = aten.tensors_of(out)
        if not made or _is_view(func, given, made):
            return
        name = operator_name(func)
        kind, sizes = aten.forward(name, args, kwargs, out)
        ids = [self._see(t) for t in given]
        needed = [i for i, t in zip(ids, given, strict=True) if t.requires_grad]
        if name == "_log_softmax":
            self.log_softmax_widths[self._see(out)] = args[0].shape[args[1]]
        outputs = sorted({self._see(t) for t in made}, key=lambda i: self.storages[i].nbytes)
        self.calls.append(
            Call(
                name=name,
                module=self._stack[-1] if self._stack else None,
                kind=kind,
                sizes=sizes,
                sequence=sequence_number() - 1,
                inputs=list(dict.fromkeys(i for i in needed if i not in self.parameters)),
                outputs=outputs,
                weights=[self.parameters[i] for i in ids if i in self.parameters],
            )
        )

    def _note_backward(self, func: Any, args: Any, out: Any) -> None:
        given, made = aten.tensors_of(args), aten.tensors_of(out)
        node = backward_node()
        if node is None or node.name() in ENGINE_NODES or not made or _is_view(func, given, made):
            return
        name = operator_name(func)
        call = self._call_at(node._sequence_nr())
        if call is not None and name not in SUMS:
            call.backward.extend(aten.backward(name, args, out))

    def exchange(self, *exchanges: Exchange) -> None:
        """Note collectives between the operators before and after."""
        self.calls.append(
            Call(
                name="edge",
                module=self._stack[-1] if self._stack else None,
                kind="edge",
                sizes=(),
                sequence=sequence_number() - 1,
                inputs=[],
                outputs=[],
                weights=[],
                collectives=list(exchanges),
            )
        )

    def _call_at(self, sequence: int) -> Call | None:
        """The forward operator of an autograd node; of a view's node the one before it."""
        place = bisect_right(self._starts, sequence)
        if place == 0:
            return None
        first = place - 1
        while first > 0 and self._starts[first - 1] == self._starts[place - 1]:
            first -= 1
        return self.calls[first]

    def _save(self, tensor: Tensor) -> Tensor:
        index = self._see(tensor)
        if index not in self.parameters and index not in self._buffers:
            self._saved.append((index, sequence_number() - 1))
        return tensor

    def _see(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in self._index:
            self._index[key] = len(self.storages)
            self.storages.append(Storage(storage.nbytes(), tensor.dtype, storage))
        return self._index[key]

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.entered[path] += 1
            self._stack.append(path)

        return hook

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._stack.pop()


def _is_view(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether an operator makes no storage and changes none."""
    if func._schema.is_mutable:
        return False
    known = {storage_key(t.untyped_storage()) for t in given}
    return all(storage_key(t.untyped_storage()) in known for t in made)
