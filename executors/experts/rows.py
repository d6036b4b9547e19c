"""Copies of tokens as rows in expert order, and back to weighted sums.

A token is copied to each of its experts' slots (a slot holds one expert, or one replica of it).
Rows are sorted by slot; within one they keep the order of tokens.

    dropless   T k rows, as many per slot as there are
    capacity   C rows per slot: surplus copies are dropped, missing ones are rows of zeros

Backward sums the copies of a token by looking their rows up, in a fixed order: no atomic additions,
so that a step repeats itself bit by bit.

Shape suffixes: T tokens, K copies per token, R rows, E hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...experts import Drop
from .routing import count_choices


class Places(NamedTuple):
    """Which row holds which copy."""

    row_TK: Tensor
    """int64, the row of each copy; one past the last for a dropped one."""
    token_R: Tensor
    """int64, the token of each row; one past the last for a row of zeros."""
    counts: Tensor
    """int64, rows of each slot."""
    padded: bool
    """Whether there may be dropped copies and rows of zeros."""


def sorted_places(slot_TK: Tensor, num_slots: int) -> Places:
    """Dropless: rows sorted by slot."""
    order_R = torch.argsort(slot_TK.flatten(), stable=True)
    row_TK = _inverse(order_R).view_as(slot_TK)
    counts = count_choices(slot_TK, num_slots)
    return Places(row_TK, order_R // slot_TK.shape[1], counts, padded=False)


def padded_places(
    slot_TK: Tensor, weights_TK: Tensor, num_slots: int, capacity: int, drop: Drop
) -> Places:
    """Capacity: `capacity` rows per slot; `drop` says which copies a full slot turns away."""
    num_tokens, top_k = slot_TK.shape
    slots = slot_TK.flatten()
    if drop == "probability":
        by_weight = torch.argsort(weights_TK.detach().flatten(), descending=True, stable=True)
        order = by_weight[torch.argsort(slots[by_weight], stable=True)]
    else:
        order = torch.argsort(slots, stable=True)
    counts = count_choices(slots, num_slots)
    place = _inverse(order) - (counts.cumsum(0) - counts)[slots]
    dropped = num_slots * capacity
    row = torch.where(place < capacity, slots * capacity + place, dropped)
    token = torch.arange(num_tokens, device=row.device).repeat_interleave(top_k)
    token_R = torch.full((dropped + 1,), num_tokens, dtype=torch.int64, device=row.device)
    token_R.scatter_(0, row, token)
    full = torch.full_like(counts, capacity)
    return Places(row.view_as(slot_TK), token_R[:dropped], full, padded=True)


def place_in_slot(expert_TK: Tensor, num_experts: int) -> Tensor:
    """The place (T, K) of each copy among all copies of its expert, in the order of tokens."""
    flat = expert_TK.flatten()
    counts = count_choices(flat, num_experts)
    first = counts.cumsum(0) - counts
    place = _inverse(torch.argsort(flat, stable=True)) - first[flat]
    return place.view_as(expert_TK)


def _inverse(order: Tensor) -> Tensor:
    """The place of each element in an order."""
    inverse = torch.empty_like(order)
    return inverse.scatter_(0, order, torch.arange(len(order), device=order.device))


class Permute(torch.autograd.Function):
    """Rows (R, E) of tokens (T, E)."""

    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, token_R: Tensor, row_TK: Tensor, padded: bool) -> Tensor:
        ctx.save_for_backward(row_TK)
        ctx.padded = padded
        return _look_up(x_TE, token_R, padded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (row_TK,) = ctx.saved_tensors
        first, *others = row_TK.unbind(1)
        grad_TE = _look_up(grads[0], first, ctx.padded)
        for row_T in others:
            grad_TE.add_(_look_up(grads[0], row_T, ctx.padded))
        return grad_TE, None, None, None


class Unpermute(torch.autograd.Function):
    """Sums (T, E) over the rows of each token, with its routing weights."""

    @staticmethod
    def forward(
        ctx: Any, rows_RE: Tensor, weights_TK: Tensor, row_TK: Tensor, padded: bool
    ) -> Tensor:
        ctx.save_for_backward(rows_RE, weights_TK, row_TK)
        ctx.padded = padded
        out_TE: Tensor | None = None
        for row_T, weight_T in zip(row_TK.unbind(1), weights_TK.unbind(1), strict=True):
            part_TE = _look_up(rows_RE, row_T, padded).mul_(weight_T[:, None])
            out_TE = part_TE if out_TE is None else out_TE.add_(part_TE)
        assert out_TE is not None
        return out_TE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_RE, weights_TK, row_TK = ctx.saved_tensors
        grad_TE = grads[0]
        num_rows = len(rows_RE)
        make = rows_RE.new_zeros if ctx.padded else rows_RE.new_empty
        grad_RE = make(num_rows + ctx.padded, rows_RE.shape[1])  # one more row takes what fell away
        grad_weights_TK = torch.empty_like(weights_TK)
        for k, row_T in enumerate(row_TK.unbind(1)):
            grad_RE.index_copy_(0, row_T, (grad_TE * weights_TK[:, k, None]).to(grad_RE.dtype))
            part_TE = _look_up(rows_RE, row_T, ctx.padded).mul_(grad_TE)
            grad_weights_TK[:, k] = part_TE.sum(dim=1, dtype=torch.float32)
        return grad_RE[:num_rows], grad_weights_TK, None, None


def _look_up(x: Tensor, index: Tensor, padded: bool) -> Tensor:
    """Rows of `x` by index; with `padded` an index past the last gives zeros."""
    if not padded:
        return x.index_select(0, index)
    found = x.index_select(0, index.clamp(max=len(x) - 1))
    return found.masked_fill_((index == len(x))[:, None], 0.0)
