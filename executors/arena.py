"""A step's tensors out of one arena, at offsets that were solved for beforehand.

Steps of one plan ask for the same tensors in the same order. A step under a `StaticArena` is
recorded: which operators make new storages, how large they are, when each one dies. The memory
solver (`planner/memory_reuse`) finds offsets for all of them at once, and from then on an operator
that makes one tensor and has an `out=` form writes straight into its place. What has no such form
(a fused attention kernel, a collective), and what outlives forward and backward (gradients), comes
from the allocator as before. The arena is there from the begin of a step's forward to the end of
its backward.

Nothing rests on the recording being right. Every request is compared with the recorded one; where
operator or shapes differ the rest of the step goes to the allocator. Before a place is used, the
tensors that were put there before must be gone; where one is not, the request goes to the allocator
too. Both are counted. Tensors must be used on one stream, or be waited for before they are let go,
as collectives and copies here are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..planner.memory_reuse import Buffers, MemoryPlan, make_buffers, solve
from .measure.comm import is_wrapped, tensors_in
from .torch_compat import is_fake, out_form, storage_key, tensor_at

ALIGNMENT_BYTES = 512
SOLVER_S = 10.0
MOST_RECORDINGS = 3
"""Of a run: its first step makes tables that later ones use; steps of other shapes never end it."""


@dataclass(slots=True, eq=False)
class Request:
    """One new storage of the recorded step."""

    key: tuple[Any, ...]
    """Operator, and shapes and dtypes of what it reads."""
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    born: int
    dies: int | None = None
    """Moment of its death; None while it lives."""
    offset: int | None = None
    """In the arena; None where the allocator keeps it."""


@dataclass(slots=True)
class Use:
    """What a step did with the arena."""

    placed: int = 0
    placed_bytes: int = 0
    other: int = 0
    """New storages that came from the allocator."""
    other_bytes: int = 0
    occupied: int = 0
    """Requests whose place was not free."""
    differing: int = 0
    """Steps that asked for something else than the recorded one."""


@dataclass(slots=True)
class _Placed:
    start: int
    end: int
    storage: weakref.ref[torch.UntypedStorage]


@dataclass(slots=True)
class StaticArena:
    """The arena of one rank; `step` is entered around each forward and backward."""

    device: torch.device
    recordings: int = 0
    requests: list[Request] = field(default_factory=list)
    plan: MemoryPlan | None = None
    memory: Tensor | None = None
    use: Use = field(default_factory=Use)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record a step, or place its tensors; one that differs is recorded again next time."""
        if self.plan is None and self.recordings < MOST_RECORDINGS:
            recorder = _Recorder()
            with recorder:
                yield
            self._solve(recorder)
        elif self.plan is None:  # steps that never repeat
            yield
        else:
            self.memory = torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)
            replay = _Replay(self)
            with replay:
                yield
            self.memory = None
            if replay.differs:
                self.plan = None

    @property
    def num_bytes(self) -> int:
        """Of the arena."""
        return 0 if self.plan is None else self.plan.peak_bytes

    def _solve(self, recorder: _Recorder) -> None:
        self.recordings += 1
        self.requests = recorder.finish()
        placed = [r for r in self.requests if r.dies is not None and r.num_bytes > 0]
        if not placed:
            return
        self.plan = solve(lives(placed), time_limit_s=SOLVER_S)
        for request, offset in zip(placed, self.plan.offsets, strict=True):
            request.offset = int(offset)


def lives(requests: list[Request]) -> Buffers:
    """The requests as buffers, in whole units of the arena's alignment."""
    return make_buffers(
        [str(index) for index in range(len(requests))],
        [request.born for request in requests],
        [request.dies or request.born + 1 for request in requests],
        [-(-r.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for r in requests],
        [ALIGNMENT_BYTES] * len(requests),
    )


def _key(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    return (func, *((x.shape, x.dtype) for x in tensors_in((args, kwargs))))


def _makes_one(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether an operator with an `out=` form made one new, dense storage."""
    if not isinstance(out, Tensor) or out_form(func) is None:
        return False
    inputs = {storage_key(x.untyped_storage()) for x in tensors_in((args, kwargs))}
    storage = out.untyped_storage()
    dense = storage.nbytes() == out.numel() * out.element_size()
    return storage_key(storage) not in inputs and dense


class _Recorder(TorchDispatchMode):
    """Writes down every request, and when its storage dies."""

    def __init__(self) -> None:
        super().__init__()
        self.moment = 0
        self.requests: list[Request] = []
        self._references: list[weakref.ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_wrapped(types):
            return NotImplemented
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not any(is_fake(kind) for kind in types) and _makes_one(func, args, kwargs, out):
            self._record(_key(func, args, kwargs), out)
        return out

    def _record(self, key: tuple[Any, ...], out: Tensor) -> None:
        storage = out.untyped_storage()
        request = Request(key, out.size(), out.stride(), out.dtype, storage.nbytes(), self.moment)
        self.moment += 1
        self.requests.append(request)
        self._references.append(weakref.ref(storage, lambda _: self._died(request)))

    def _died(self, request: Request) -> None:
        request.dies = self.moment
        self.moment += 1

    def finish(self) -> list[Request]:
        """All requests; what lives on has no end."""
        self._references.clear()
        return self.requests


class _Replay(TorchDispatchMode):
    """Has operators write into the arena, request by request."""

    def __init__(self, arena: StaticArena) -> None:
        super().__init__()
        self.arena = arena
        self.next = 0
        self.placed: list[_Placed] = []
        self.differs = False
        arena.use = Use(differing=arena.use.differing)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_wrapped(types):
            return NotImplemented
        kwargs = kwargs or {}
        request = self._expected(func, args, kwargs)
        if request is not None and request.offset is not None:
            end = request.offset + request.num_bytes
            if self._is_free(request.offset, end):
                return self._place(request, end, func, args, kwargs)
            self.arena.use.occupied += 1
        out = func(*args, **kwargs)
        if request is not None:
            self.arena.use.other += 1
            self.arena.use.other_bytes += request.num_bytes
        return out

    def _expected(self, func: Any, args: Any, kwargs: Any) -> Request | None:
        """The next request, when this operator is the one that makes it."""
        requests = self.arena.requests
        if self.differs or self.next >= len(requests) or out_form(func) is None:
            return None
        request = requests[self.next]
        if request.key[0] is not func:
            return None if self._may_be_view(func) else self._stop()
        if request.key != _key(func, args, kwargs):
            return self._stop()
        self.next += 1
        return request

    @staticmethod
    def _may_be_view(func: Any) -> bool:
        """Operators that now and then return what they were given ask for nothing then."""
        return func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy)

    def _stop(self) -> None:
        self.differs = True
        self.arena.use.differing += 1

    def _is_free(self, start: int, end: int) -> bool:
        """Whether all that was placed there is gone; what is gone is forgotten."""
        left: list[_Placed] = []
        free = True
        for one in self.placed:
            if one.start < end and start < one.end:
                if one.storage() is None:
                    continue
                free = False
            left.append(one)
        self.placed = left
        return free

    def _place(self, request: Request, end: int, func: Any, args: Any, kwargs: Any) -> Tensor:
        memory, start = self.arena.memory, request.offset
        assert memory is not None and start is not None
        target = tensor_at(memory, start, request.dtype, request.size, request.stride)
        write, name = out_form(func) or (func, "out")
        out = write(*args, **kwargs, **{name: target})
        self.placed.append(_Placed(start, end, weakref.ref(out.untyped_storage())))
        self.arena.use.placed += 1
        self.arena.use.placed_bytes += request.num_bytes
        return out
