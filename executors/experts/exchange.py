"""Rows between ranks: to the ranks of their experts and back, over ep and over the cut of tp.

Every exchange has itself as its mirror image in backward:

    over ep        all-to-all of rows; its backward sends gradients the other way
    over tp        gather of rows for experts cut along their width; backward sums gradients onto
                   the rank of each row (and the other way round for the outputs)
    on the rank    rows by (source, expert) into rows by expert, and back

Without a capacity ranks send unequal numbers of rows: counts go first, in an all-to-all of their
own, and come to the host, which must know them to post the exchange. That is the one wait for a GPU
per layer and micro-batch. With a capacity every shape is known beforehand and nothing waits.

The gather of unequal parts over tp is an all-to-all in which every rank sends the same to all,
since gathers want equal parts; it moves the bytes of the gather.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..torch_compat import all_gather_single, reduce_scatter_single

Group = dist.ProcessGroup


def exchange(rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """What all ranks sent to this one, by rank; `send` and `receive` are rows per rank."""
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


class Exchange(torch.autograd.Function):
    """`exchange`; gradients go the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Group
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def gather_rows(rows: Tensor, parts: list[int], equal: bool, group: Group) -> Tensor:
    """The rows of all ranks of a group, in rank order; `parts` are rows per rank.

    `equal` says that these are equal by construction, whatever the data.
    """
    size = group.size()
    if equal:
        out = rows.new_empty(size * len(rows), *rows.shape[1:])
        all_gather_single(out, rows.contiguous(), group=group)
        return out
    copies = rows.expand(size, *rows.shape).flatten(0, 1)
    return exchange(copies, [len(rows)] * size, parts, group)


def scatter_rows(rows: Tensor, parts: list[int], equal: bool, group: Group) -> Tensor:
    """This rank's rows of the sum over a group; the mirror image of `gather_rows`."""
    size, own = group.size(), parts[group.rank()]
    if equal:
        out = rows.new_empty(own, *rows.shape[1:])
        reduce_scatter_single(out, rows.contiguous(), group=group)
        return out
    mine = exchange(rows, parts, [own] * size, group)
    return mine.view(size, own, *rows.shape[1:]).sum(dim=0)


class Gather(torch.autograd.Function):
    """`gather_rows`; gradients are summed onto the rank of each row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, parts: list[int], equal: bool, group: Group) -> Tensor:
        ctx.parts, ctx.equal, ctx.group = parts, equal, group
        return gather_rows(rows, parts, equal, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return scatter_rows(grads[0], ctx.parts, ctx.equal, ctx.group), None, None, None


class Scatter(torch.autograd.Function):
    """`scatter_rows`; gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, parts: list[int], equal: bool, group: Group) -> Tensor:
        ctx.parts, ctx.equal, ctx.group = parts, equal, group
        return scatter_rows(rows, parts, equal, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return gather_rows(grads[0], ctx.parts, ctx.equal, ctx.group), None, None, None


def regroup(rows: Tensor, sizes: list[list[int]]) -> Tensor:
    """Rows in runs of sizes (A, B), A outermost, with B outermost instead."""
    runs = iter(rows.split([size for row in sizes for size in row]))
    table = [[next(runs) for _ in row] for row in sizes]
    return torch.cat([run for column in zip(*table, strict=True) for run in column])


class Regroup(torch.autograd.Function):
    """`regroup`; backward puts the runs back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[list[int]]) -> Tensor:
        ctx.back = transposed(sizes)
        return regroup(rows, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return regroup(grads[0], ctx.back), None


def transposed(sizes: list[list[int]]) -> list[list[int]]:
    """A table of sizes with rows and columns exchanged."""
    return [list(column) for column in zip(*sizes, strict=True)]


def exchange_counts(counts: Tensor, group: Group) -> Tensor:
    """Rows that each rank of a group sends to each of this rank's slots, (ranks, slots) int64.

    `counts` (ranks * slots) are the rows that this rank sends to every slot of the group.
    """
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    return received.view(group.size(), -1)


def gather_counts(counts: Tensor, group: Group) -> Tensor:
    """The counts of all ranks of a group, stacked."""
    out = counts.new_empty(group.size() * len(counts), *counts.shape[1:])
    all_gather_single(out, counts.contiguous(), group=group)
    return out.view(group.size(), *counts.shape)
