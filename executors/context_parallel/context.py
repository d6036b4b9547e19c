"""Attention beyond one kernel call: how one is worked out, as an autograd function of q, k and v.

A `Method` is attention over all ranks that share a sequence, or over documents packed into it. A
`Context` goes with a micro-batch through the layers and says which method it takes, and which ranks
exchange heads before it; None in its place is plain causal attention of one rank.

What a method keeps for backward are q, k, v, the output and lse. A `Slot` can hold the last two
from a layer's forward to its recomputation, which then does not run the attention again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from . import varlen
from .chunks import Borders, blocks
from .flash import Partial, Rows, flash_takes


class Method(Protocol):
    """A way to work out attention: (B, H, S, D) queries on (B, G, S, D) keys and values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, H, S, D) and lse (B, H, S)."""
        ...

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        ...


@dataclass(frozen=True, slots=True)
class Local:
    """Causal attention of one rank that has all keys, document by document where there are any."""

    borders: Borders | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output and lse."""
        if self.borders is not None and flash_takes(q):
            return varlen.forward(q, k, v, self.borders)
        partial = Partial.of(q, k, v, blocks((0,), (0,), q.shape[2], self.borders))
        return partial.out, partial.lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        if self.borders is not None and flash_takes(q):
            return varlen.backward(grad_out, q, k, v, out, lse, self.borders)
        rows = Rows(q, out, lse, grad_out)
        # blocks of one rank share neither queries nor keys: nothing is summed
        return rows.start(k, v, blocks((0,), (0,), q.shape[2], self.borders), q.dtype)


@dataclass(frozen=True, slots=True)
class Context:
    """How the attention of one micro-batch works."""

    method: Method | None = None
    """None: one causal kernel."""
    ulysses: dist.ProcessGroup | None = None
    """Ranks that exchange heads for tokens before and after."""


@dataclass(slots=True)
class Slot:
    """Output and lse of one layer's attention, from its forward to its recomputation."""

    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, method: Method, slot: Slot | None
    ) -> Tensor:
        if slot is not None and slot.held:
            out, lse = slot.held.pop()
        else:
            out, lse = method.forward(q, k, v)
            if slot is not None:
                slot.held.append((out.detach(), lse))
        ctx.method = method
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        return *ctx.method.backward(grads[0], *ctx.saved_tensors), None, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, method: Method | None, slot: Slot | None = None
) -> Tensor:
    """Causal attention by a method (None: one rank, one document); takes its output from the slot
    where that has one, else leaves it there."""
    out: Any = _Attend.apply(q, k, v, method or Local(), slot)
    return out
