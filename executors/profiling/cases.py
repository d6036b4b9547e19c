"""What an operator's bench is made of: a case of calls at one size, and its size axes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .timing import Buffers, Call, Ring

Sizes = tuple[int, ...]
BUILD_S = 0.05
"""Time to spend at most on building the graphs whose backward is measured."""


@dataclass(frozen=True, slots=True)
class Case:
    """An operator at one size; calls rotate over their buffers."""

    forward: Call
    backward: Callable[[], Call] | None = None
    """Builds the graphs and returns the call: built only after forward has been timed."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One operator: its size axes, how to prepare it, and its relative work at a size."""

    axes: tuple[str, ...]
    prepare: Callable[[Buffers, Sizes], Case]
    work: Callable[[Sizes], float]
    """Proportional to the time of large sizes; to skip those that would take too long."""

    engine: bool = True
    """Whether backward goes through autograd's engine (a linear's is two plain GEMMs)."""


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def through_autograd(
    function: Callable[..., Tensor],
    warm: tuple[Tensor, ...],
    rotating: list[tuple[Tensor, ...]],
    buffers: Buffers,
) -> Case:
    """Forward on warm inputs into a ring; backward of graphs over the rotating inputs."""
    if buffers.runtime == "compiled":
        function = torch.compile(function, dynamic=False)
    out = function(*warm)
    # An output keeps its graph alive: some three tensors of the size of the largest input.
    held = buffers.copies(3 * max(out.numel(), *(tensor.numel() for tensor in warm)))
    ring = Ring([torch.empty_like(out) for _ in range(held)])
    grad_out = torch.ones_like(out)

    def forward() -> None:
        ring.push(function(*warm))

    def build_backward() -> Call:
        ring.outputs.clear()
        graphs: list[tuple[Tensor, list[Tensor]]] = []
        deadline = time.perf_counter() + BUILD_S
        for inputs in rotating[:held]:
            graphs.append((function(*inputs), [t for t in inputs if t.requires_grad]))
            if len(graphs) >= 2 and time.perf_counter() > deadline:
                break
        turn = itertools.cycle(graphs)

        def backward() -> None:
            result, leaves = next(turn)
            torch.autograd.grad(result, leaves, grad_out, retain_graph=True)

        return backward

    return Case(forward, build_backward)
