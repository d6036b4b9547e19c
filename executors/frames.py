"""What one run of a block keeps from forward to backward, and how it comes back.

A `Frame` stands around a block's forward as a pair of saved-tensor hooks. Autograd then holds
handles in the place of tensors; a handle leads to an `Entry`, which is one storage, however many
views of it were saved. An entry is *held* (its storage is there), *away* (a technique moved it and
brings it back) or *dropped*: made again by running operators of the block again.

Which entries are dropped says a `Policy`, read off the cost model's graph of the layer after its
recompute rewrite (`costmodel/techniques/recompute.py`): the tensors held, the operators that run
again, and whether all of them do when the first is needed. A dropped tensor is made again when a
backward asks for it, by the operators that made it, after whatever these read; each operator runs
again at most once, and what it makes goes with its last reader. So bytes and work are the graph's.

Names reach the frame through the block's `run`: arguments of an operator are known by their
storage, its results get the names of its outputs, and what it saves besides (the statistics of a
norm) is told apart by size. Parameters, and tensors from outside of the block such as rotary
tables, are left to autograd.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..costmodel.graph import Graph, Sizes
from ..costmodel.techniques.recompute import internals
from .marks import Marks
from .torch_compat import storage_key

INSIDE_LINEARS = "dequantize"
"""The kind of operators that run within the linear behind them, and are no calls of their own."""
Geometry = tuple[torch.Size, tuple[int, ...], int]
"""Size, stride and offset of a view of a storage, in elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What an operator makes: its outputs, and with their bytes the tensors that it alone keeps."""

    outputs: tuple[str, ...]
    inside: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a block holds between forward and backward."""

    boundary: str
    made: dict[str, Made]
    held: frozenset[str]
    again: tuple[str, ...]
    """Operators that run again, in forward order."""
    at_once: bool
    """Whether all of them do when the first is needed."""

    @staticmethod
    def of(graph: Graph, sizes: Sizes) -> Policy:
        """What a rewritten graph says; `sizes` are local."""
        kept = internals(graph)
        made: dict[str, Made] = {}
        for op in graph.operators:
            known = {t.name for t in (*op.inputs, *op.outputs)}
            inside = [t for t in op.needs if t.name not in known] if op.needs else kept[op.name]
            made[op.name] = Made(
                outputs=tuple(t.name for t in op.outputs),
                inside=tuple((t.name, int(t.num_bytes(sizes)[0])) for t in inside),
            )
        return Policy(
            boundary=graph.boundary.name,
            made=made,
            held=frozenset(t.name for op in graph.operators for t in op.saves),
            again=tuple(
                op.name for op in graph.operators if op.recomputed and op.kind != INSIDE_LINEARS
            ),
            at_once=not any(op.needs for op in graph.operators),
        )


@dataclass(slots=True, eq=False)
class Entry:
    """One storage that backward needs."""

    num_bytes: int
    shape: torch.Size
    """Of the tensor that it was first met as: (batch, tokens, ...) for what layers make."""
    tensor: Tensor | None = None
    """All of the storage, flat; None while it is away or dropped."""
    landing: Tensor | None = None
    """What becomes `tensor` once a copy into it is done."""
    names: set[str] = field(default_factory=set)
    """Edges that move nothing give one storage several names."""
    makers: list[str] = field(default_factory=list)
    """The operator that made it, and those that changed it in place."""
    handles: int = 0
    """Saved views that autograd holds."""
    readers: int = 0
    """Operators that are still to run again and read it."""


@dataclass(slots=True, eq=False)
class Handle:
    """What autograd holds in the place of a saved tensor; it goes once its node has run."""

    frame: Frame
    entry: Entry
    geometry: Geometry

    def __del__(self) -> None:
        self.entry.handles -= 1
        self.frame.release(self.entry)


@dataclass(frozen=True, slots=True)
class View:
    """An argument of an operator that is a view of an entry."""

    entry: Entry
    geometry: Geometry
    needs_grad: bool


@dataclass(slots=True)
class Call:
    """An operator as it ran, so that it can run again."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    """Each a `View`, or the object itself; of an operator that runs once, none."""
    saved: list[Entry] = field(default_factory=list)
    """What autograd saved of it, in order."""
    results: list[Entry] = field(default_factory=list)
    inside: bool = False
    """Whether it is to run again and saved something that is neither argument nor result."""


class Frame:
    """One run of a block, from its forward to the end of its backward."""

    def __init__(self, block: nn.Module, policy: Policy | None, marks: Marks) -> None:
        """Without a policy everything is held, and operators need no names."""
        self.policy, self.marks = policy, marks
        self.kept: list[Entry] = []
        """The entries held, in the order in which they were met."""
        self._block = block
        self._constants: set[int] = set()
        self._outside = self._not_ours()
        self._known: dict[int, Entry] = {}
        """Entries by storage, while these are alive; during the forward."""
        self._references: list[weakref.ref[torch.UntypedStorage]] = []
        self._calls: dict[str, Call] = {}
        self._again = set(policy.again) if policy is not None else set[str]()
        self._pending: list[tuple[Entry, Tensor]] | None = None
        """What the operator that runs has saved so far."""
        made = policy.made.values() if policy is not None else ()
        self._outputs = {name for one in made for name in one.outputs}
        self._sealed = False

    def forward(self, function: Callable[..., Any], x: Tensor, *constants: Any) -> Any:
        """The block's result; `x` is its input, other arguments come from outside."""
        self._constants = {storage_key(x.untyped_storage()) for x in _tensors(constants)}
        self._outside = self._not_ours()
        if self.policy is not None:
            self._name(self._entry(x), self.policy.boundary, x)
        with saved_tensors_hooks(self._pack, self._unpack):
            result = function(x, *constants)
        self._seal()
        return result

    def run(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Run a named operator of the forward; what it reads, makes and saves is noted."""
        assert self.policy is not None
        read = tuple(map(self._argument, args))
        call = Call(function, read if name in self._again else ())
        versions = [(arg, arg._version) for arg in _tensors(args)]
        self._pending = []
        result = function(*args)
        pending, self._pending = self._pending, None
        made = self.policy.made[name]
        changed = {storage_key(arg.untyped_storage()) for arg, n in versions if arg._version != n}
        known = {id(entry) for entry in _entries(read)}
        for output, tensor in zip(made.outputs, _tensors(result), strict=True):
            entry = self._entry(tensor)
            if id(entry) not in known or storage_key(tensor.untyped_storage()) in changed:
                entry.makers.append(name)
                call.results.append(entry)
            self._name(entry, output, tensor)
        sizes = list(made.inside)
        for entry, tensor in pending:
            if not entry.names:
                entry.makers.append(name)
                inside = _of_size(sizes, entry.num_bytes) or f"{name}.{len(call.saved)}"
                self._name(entry, inside, tensor)
                call.inside = name in self._again
            elif entry.tensor is None and not self._remakes(entry):
                self._hold(entry, tensor)
            call.saved.append(entry)
        self._calls[name] = call
        return result

    def remake_tokens(self, first: int, part_tokens: int) -> None:
        """Run the operators again that the policy names, on the tokens from `first` of each part of
        `part_tokens` tokens on; what they make goes into the storages of what they made before.

        Every tensor that these operators read has the tokens in its second dimension.
        """
        assert self.policy is not None
        which = slice(first, None)
        made: dict[int, Tensor] = {}
        again = [name for name in self.policy.again if name in self._again]
        readers = Counter(id(e) for name in again for e in _entries(self._calls[name].args))

        def argument(arg: Any) -> Any:
            if isinstance(arg, View):
                size = arg.geometry[0]
                if id(arg.entry) in made:
                    return made[id(arg.entry)].reshape(size[0], -1, *size[2:])
                assert arg.entry.tensor is not None
                return _tokens(_view(arg.entry.tensor, arg.geometry), part_tokens, which)
            return _tokens(arg, part_tokens, which) if isinstance(arg, Tensor) else arg

        for name in again if first < part_tokens else ():
            call, captured = self._calls[name], list[Tensor]()
            with self.marks.mark("recompute"), self._capturing(call, captured) as before:
                result = call.function(*[before(argument(arg), arg) for arg in call.args])
            made |= {
                id(entry): tensor.detach()
                for entry, tensor in zip(call.results, _tensors(result), strict=True)
            }
            pairs = [*zip(call.results, _tensors(result), strict=True)]
            pairs += zip(call.saved, captured, strict=True) if call.inside else ()
            for entry, tensor in pairs:
                if entry.handles and entry.tensor is not None and name in entry.makers:
                    target = self.tokens_of(entry, part_tokens, which, entry.tensor)
                    target.copy_(tensor.detach().reshape(target.shape))
            del result, captured, pairs
            readers.subtract(id(entry) for entry in _entries(call.args))
            made = {key: tensor for key, tensor in made.items() if readers[key] > 0}
        self.settle()

    def settle(self) -> None:
        """Nothing runs again any more."""
        for name in self._again & self._calls.keys():
            for entry in _entries(self._calls[name].args):
                entry.readers -= 1
                self.release(entry)
        self._again.clear()

    @staticmethod
    def tokens_of(entry: Entry, part_tokens: int, which: slice, whole: Tensor) -> Tensor:
        """Some tokens of each part of an entry, (batch, parts, tokens, rest), in a flat storage."""
        batch, tokens = entry.shape[:2]
        return whole.view(batch, tokens // part_tokens, part_tokens, -1)[:, :, which]

    def release(self, entry: Entry) -> None:
        """Let go of an entry that nobody reads any more."""
        if self._sealed and entry.handles == 0 and entry.readers == 0:
            entry.tensor = None

    def _not_ours(self) -> set[int]:
        """Storages that are left to autograd; those of parameters change as they are gathered."""
        own = (*self._block.parameters(), *self._block.buffers())
        return self._constants | {storage_key(x.untyped_storage()) for x in own}

    # Forward.

    def _argument(self, arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        entry = self._known.get(storage_key(arg.untyped_storage()))
        return arg if entry is None else View(entry, _geometry(arg), arg.requires_grad)

    def _entry(self, tensor: Tensor) -> Entry:
        """The entry of a tensor's storage, which may be new."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        entry = self._known.get(key)
        if entry is None:
            entry = self._known[key] = Entry(storage.nbytes(), tensor.shape)
            self._references.append(weakref.ref(storage, lambda _: self._known.pop(key, None)))
        return entry

    def _name(self, entry: Entry, name: str, tensor: Tensor) -> None:
        """Give an entry a name, or a further one, and hold it where the policy says so."""
        assert self.policy is not None
        entry.names.add(name)
        inside = name not in self._outputs and name != self.policy.boundary
        if name in self.policy.held or (inside and not self._remakes(entry)):
            self._hold(entry, tensor)

    def _hold(self, entry: Entry, tensor: Tensor) -> None:
        if entry.tensor is None:
            entry.tensor = _whole(tensor)
            self.kept.append(entry)

    def runs_again(self, entry: Entry) -> bool:
        """Whether all that made an entry is to run again."""
        return bool(entry.makers) and self._again.issuperset(entry.makers)

    def _remakes(self, entry: Entry) -> bool:
        """Whether an entry comes back by running operators again."""
        return entry.tensor is None and self.runs_again(entry)

    def _pack(self, tensor: Tensor) -> Any:
        if storage_key(tensor.untyped_storage()) in self._outside:
            return tensor
        entry = self._entry(tensor)
        if self._pending is not None:
            self._pending.append((entry, tensor))
        elif not self._remakes(entry):
            self._hold(entry, tensor)
        entry.handles += 1
        return Handle(self, entry, _geometry(tensor))

    def _seal(self) -> None:
        """The forward is over: storages are no longer told apart, readers are known."""
        self._known.clear()
        self._references.clear()
        for name in self._again & self._calls.keys():
            if not self._calls[name].results and not self._calls[name].inside:
                self._again.discard(name)  # an edge that hands its input on
                continue
            for entry in _entries(self._calls[name].args):
                entry.readers += 1
        self._sealed = True

    # Backward.

    def _unpack(self, handle: Handle | Tensor) -> Tensor:
        if isinstance(handle, Tensor):
            return handle
        return _view(self._need(handle.entry), handle.geometry)

    def _need(self, entry: Entry) -> Tensor:
        """The storage of an entry, made again where it is not there."""
        if entry.tensor is None:
            with self.marks.mark("recompute"):
                self._remake(entry)
        assert entry.tensor is not None, f"{entry.names} is gone: backward runs once per forward"
        return entry.tensor

    def _remake(self, entry: Entry) -> None:
        assert self.policy is not None
        names = self.policy.again if self.policy.at_once else entry.makers
        for name in names:
            if name in self._again:
                self._run_again(name)

    @contextmanager
    def _capturing(self, call: Call, captured: list[Tensor]) -> Iterator[Callable[..., Any]]:
        """A context to run a call again in: what autograd would save of it is listed.

        Only what is neither argument nor result is of interest; without any there is no graph. What
        it yields gives an argument the gradient need that it had.
        """
        outside = self._not_ours() if call.inside else set[int]()

        def capture(tensor: Tensor) -> None:
            if storage_key(tensor.untyped_storage()) not in outside:
                captured.append(tensor.detach())

        def again(arg: Any, before: Any) -> Any:
            if not isinstance(before, View):
                return arg
            return arg.detach().requires_grad_(call.inside and before.needs_grad)

        with saved_tensors_hooks(capture, _never), torch.set_grad_enabled(call.inside):
            yield again

    def _run_again(self, name: str) -> None:
        """Run an operator again, after what it reads; it does so once."""
        self._again.discard(name)
        call = self._calls[name]
        for entry in _entries(call.args):
            if entry.tensor is None:
                self._remake(entry)
        captured: list[Tensor] = []
        with self._capturing(call, captured) as again:
            result = call.function(*[again(_argument_again(arg), arg) for arg in call.args])
        pairs = [*zip(call.results, _tensors(result), strict=True)]
        if call.inside:
            pairs += zip(call.saved, captured, strict=True)
        for entry, tensor in pairs:
            if entry.tensor is None and (entry.handles or entry.readers):
                entry.tensor = _whole(tensor.detach())
        del result, captured, pairs
        for entry in _entries(call.args):
            entry.readers -= 1
            self.release(entry)


def _argument_again(arg: Any) -> Any:
    """An argument as it was; of an entry, which is there, a view."""
    if not isinstance(arg, View):
        return arg
    assert arg.entry.tensor is not None
    return _view(arg.entry.tensor, arg.geometry)


def _tokens(tensor: Tensor, part_tokens: int, which: slice) -> Tensor:
    """Some tokens of every part of a tensor with tokens in its second dimension."""
    parts = tensor.unflatten(1, (-1, part_tokens))[:, :, which]
    return parts.flatten(1, 2)


def _never(_: object) -> Tensor:
    raise AssertionError("what runs again in backward has no backward of its own")


def _entries(args: Iterable[Any]) -> list[Entry]:
    """The distinct entries that some arguments are views of."""
    return list({id(arg.entry): arg.entry for arg in args if isinstance(arg, View)}.values())


def _tensors(value: Any) -> list[Tensor]:
    found = value if isinstance(value, tuple) else (value,)
    return [item for item in found if isinstance(item, Tensor)]


def _geometry(tensor: Tensor) -> Geometry:
    return tensor.size(), tensor.stride(), int(tensor.storage_offset())


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor's storage, flat, in its dtype."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((count,), (1,), 0)


def _view(whole: Tensor, geometry: Geometry) -> Tensor:
    """A view as it was of a storage, which may now lie within a larger one."""
    size, stride, offset = geometry
    return whole.as_strided(size, stride, whole.storage_offset() + offset)


def _of_size(sizes: list[tuple[str, int]], num_bytes: int) -> str | None:
    """The first name of that size, which is taken off the list."""
    for index, (name, size) in enumerate(sizes):
        if size == num_bytes:
            del sizes[index]
            return name
    return None
