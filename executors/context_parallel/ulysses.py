"""All-to-alls between a part of the sequence with all heads and a longer part with some heads.

Rank u of U holds tokens (B, s, H, D) of its part; for attention it gets (B, U s, H / U, D), all
tokens of the group with the u-th part of the heads. Q, K and V go one by one, each as soon as it is
there, so that it is under way while the next is projected, and so do their gradients; the output
comes back before its projection. Keys and values with fewer heads than ranks are repeated first, so
that each rank gets those that its queries ask for.

On the wire a tensor lies as (U, s, B, H / U, D): what arrives is looked at as (B, U s, H / U, D)
without a copy.

Source: Jacobs et al. 2023 (DeepSpeed-Ulysses).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .peers import Flight

Group = dist.ProcessGroup


class Exchange:
    """One tensor's way to the ranks of its heads; its gradient comes the same way back."""

    def __init__(self, group: Group) -> None:
        self.group, self.flight = group, Flight()
        self.ranks = group.size()

    def start(self, x_BSHD: Tensor) -> Tensor:
        """(B, U s, H / U, D) of tokens (B, s, H, D), under way: `finish` before it is read."""
        out: Any = _Depart.apply(x_BSHD, self)
        return out

    def finish(self, x_BSHD: Tensor) -> Tensor:
        """What `start` returned, arrived."""
        out: Any = _Arrive.apply(x_BSHD, self)
        return out


def to_tokens(x_BSHD: Tensor, group: Group) -> Tensor:
    """(B, s, H, D) of (B, U s, H / U, D)."""
    out: Any = _Return.apply(x_BSHD, group)
    return out


def repeated(x_BSGD: Tensor, ranks: int) -> Tensor:
    """Keys or values with at least as many heads as there are ranks, each as often as it takes."""
    heads = x_BSGD.shape[2]
    return x_BSGD if heads >= ranks else x_BSGD.repeat_interleave(ranks // heads, dim=2)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        parts = _by_heads(x_BSHD, exchange.ranks)
        received, exchange.flight = _all_to_all(parts, exchange.group)
        return _as_sequence(received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.flight.land()
        return _as_heads(_parts(grads[0], ctx.exchange.ranks)), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.flight.land()
        return x_BSHD.view_as(x_BSHD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        parts = _parts(grads[0], exchange.ranks).contiguous()
        received, exchange.flight = _all_to_all(parts, exchange.group)
        return _as_sequence(received), None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHD: Tensor, group: Group) -> Tensor:
        ctx.group = group
        received, flight = _all_to_all(_parts(x_BSHD, group.size()).contiguous(), group)
        flight.land()
        return _as_heads(received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        received, flight = _all_to_all(_by_heads(grads[0], ctx.group.size()), ctx.group)
        flight.land()
        return _as_sequence(received), None


def _all_to_all(parts: Tensor, group: Group) -> tuple[Tensor, Flight]:
    """Part u of every rank at rank u, under way."""
    received = torch.empty_like(parts)
    work = dist.all_to_all_single(received, parts, group=group, async_op=True)
    return received, Flight([work], [parts, received])


def _by_heads(x_BSHD: Tensor, ranks: int) -> Tensor:
    """All tokens cut by heads: (U, s, B, H / U, D), contiguous."""
    return x_BSHD.unflatten(2, (ranks, -1)).permute(2, 1, 0, 3, 4).contiguous()


def _as_heads(parts_USBHD: Tensor) -> Tensor:
    """Parts of the heads put together: (B, s, H, D)."""
    return parts_USBHD.permute(2, 1, 0, 3, 4).flatten(2, 3)


def _parts(x_BSHD: Tensor, ranks: int) -> Tensor:
    """A sequence cut into equal parts: (U, s, B, H / U, D)."""
    return x_BSHD.unflatten(1, (ranks, -1)).permute(1, 2, 0, 3, 4)


def _as_sequence(parts_USBHD: Tensor) -> Tensor:
    """Parts of the sequence one after the other: (B, U s, H / U, D), in the same memory."""
    return parts_USBHD.flatten(0, 1).transpose(0, 1)
