"""AdamW whose moments, of all parameters or of some, wait on a tier and visit the device by
buckets.

A bucket is a run of parameters, or a part of a large one, of at most `BUCKET_ELEMENTS` elements:
the update is elementwise, so that where it is cut does not matter. While one bucket is updated the
moments of the next one come and those of the last one leave, so that two buckets' moments are on
the device at a time. The update itself is torch's fused one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..costmodel.copies import BUCKET_ELEMENTS
from .marks import Marks
from .optimizer import ADAMW
from .tiers import Store, Ticket
from .torch_compat import DTensor, adamw_update

MOMENTS = ("exp_avg", "exp_avg_sq")
Moments = dict[tuple[str, int], Tensor]
"""Of a bucket, by name in the store and first element."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements `start` to `end` of a parameter's local part."""

    index: int
    start: int
    end: int


def buckets(sizes: Iterable[int], most: int) -> list[list[Slice]]:
    """Elements of parameters in runs of at most `most`, in order.

    >>> [[part.index for part in bucket] for bucket in buckets([3, 5], 4)]
    [[0, 1], [1]]
    """
    found: list[list[Slice]] = []
    room = 0
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            if room == 0:
                found.append([])
                room = most
            end = min(size, start + room)
            found[-1].append(Slice(index, start, end))
            room -= end - start
            start = end
    return found


class TieredAdamW(torch.optim.AdamW):
    """AdamW with moments in a store; those of parameters that do not wait are torch's own."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        store: Store,
        marks: Marks,
        waits: Sequence[bool] | None = None,
        *,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        """`waits`: whose moments are in the store; None = all parameters'."""
        super().__init__(parameters, lr=learning_rate, fused=True, **ADAMW)
        self.store, self.marks = store, marks
        self.num_steps = 0
        self.parameters: list[nn.Parameter] = [p for g in self.param_groups for p in g["params"]]
        self.waits = list(waits) if waits is not None else [True] * len(self.parameters)
        sizes = [
            _local(p).numel() if there else 0
            for p, there in zip(self.parameters, self.waits, strict=True)
        ]
        for index, size in enumerate(sizes):
            for moment in MOMENTS:
                if size:
                    shape = _local(self.parameters[index]).shape
                    store.reserve(f"{index}.{moment}", shape, torch.float32)
        self.buckets = buckets(sizes, bucket_elements)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None
        self._update_others()
        work = [b for b in map(self._with_gradient, self.buckets) if b]
        self.num_steps += 1
        staged = self._fetch(work[0]) if work else None
        leaving: tuple[Moments, Ticket] | None = None
        for index, bucket in enumerate(work):
            assert staged is not None
            moments, coming = staged
            if leaving is not None:  # its buffers are there until then
                self._wait(leaving[1])
                leaving = None
            staged = self._fetch(work[index + 1]) if index + 1 < len(work) else None
            self._wait(coming)
            self._update(bucket, moments)
            leaving = (moments, self.store.write(moments))
        if leaving is not None:
            self._wait(leaving[1])

    def _update_others(self) -> None:
        """The update of parameters whose moments are here: the others' gradients are put aside."""
        if all(self.waits):
            return
        waiting = [p for p, there in zip(self.parameters, self.waits, strict=True) if there]
        gradients = [p.grad for p in waiting]
        for p in waiting:
            p.grad = None
        super().step()
        for p, gradient in zip(waiting, gradients, strict=True):
            p.grad = gradient

    def _with_gradient(self, bucket: list[Slice]) -> list[Slice]:
        return [part for part in bucket if self.parameters[part.index].grad is not None]

    def _fetch(self, bucket: list[Slice]) -> tuple[Moments, Ticket]:
        """Buffers for a bucket's moments, and the ticket of their copies."""
        moments = {
            (f"{part.index}.{moment}", part.start): torch.empty(
                part.end - part.start, device=_local(self.parameters[part.index]).device
            )
            for moment in MOMENTS
            for part in bucket
        }
        return moments, self.store.fetch(moments)

    def _update(self, bucket: list[Slice], moments: Moments) -> None:
        group = self.param_groups[0]
        parameters, gradients = (
            [_flat(of(self.parameters[part.index]))[part.start : part.end] for part in bucket]
            for of in (_local, _local_gradient)
        )
        first, second = (
            [moments[f"{part.index}.{moment}", part.start] for part in bucket] for moment in MOMENTS
        )
        done = float(self.num_steps - 1)
        adamw_update(
            parameters, gradients, first, second, [],
            [torch.full((), done, device=p.device) for p in parameters],
            fused=True, amsgrad=False, maximize=False, lr=group["lr"], eps=group["eps"],
            beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
        )  # fmt: skip

    def _wait(self, ticket: Ticket) -> None:
        with self.marks.mark("exposed.copy"):
            ticket.wait()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """As that of torch's AdamW, with every moment brought to its parameter's device."""
        found = super().state_dict()
        found["state"] |= {
            index: {"step": torch.tensor(float(self.num_steps))}
            | {moment: self._moment(index, moment) for moment in MOMENTS}
            for index, there in enumerate(self.waits)
            if there and self.num_steps
        }
        return found

    def _moment(self, index: int, moment: str) -> Tensor:
        parameter = self.parameters[index]
        local = _local(parameter)
        whole = torch.empty_like(local, dtype=torch.float32)
        if local.numel():
            whole = self.store.get(f"{index}.{moment}", local.device)
        if isinstance(parameter, DTensor):
            return DTensor.from_local(
                whole, parameter.device_mesh, parameter.placements, run_check=False,
                shape=parameter.shape, stride=parameter.stride(),
            )  # fmt: skip
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the states of a TieredAdamW or of torch's AdamW."""
        states = dict(state_dict["state"])
        waiting = {index: states.pop(index) for index in list(states) if self.waits[index]}
        super().load_state_dict({**state_dict, "state": states})
        for index, state in waiting.items():
            self.num_steps = int(state["step"])
            for moment in MOMENTS:
                local = _local(state[moment])
                if local.numel():
                    self.store.put(f"{index}.{moment}", local.float())


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return _local(parameter.grad)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1)
