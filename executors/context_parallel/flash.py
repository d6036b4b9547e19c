"""Attention of one block of queries on one block of keys, with what it takes to add blocks up.

A kernel returns its output and the log of its softmax's denominator, lse_i = log sum_j exp(s_ij).
Outputs over disjoint sets of keys add up by their denominators:

    lse = log(exp(lse_a) + exp(lse_b)),    out = out_a + w (out_b - out_a),    w = exp(lse_b - lse)

The backward of a block takes the output and lse of the whole row: probabilities exp(s_ij - lse_i)
are then the right ones, and so is the row's term sum(out . grad_out).

16-bit tensors on CUDA and all dtypes on a CPU go through torch's flash kernels. What those do not
take (fp32 on CUDA, head sizes that are no multiple of eight) is computed from scores held for some
hundred queries at a time.

Shapes: q, out (B, H, S, D); k, v (B, G, T, D) with G dividing H; lse (B, H, S) fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chunks import Block

aten: Any = torch.ops.aten
QUERIES_AT_ONCE = 512
"""Queries whose scores the plain kernel holds at a time."""


def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and lse of queries on keys; `causal` wants as many keys as queries."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    if flash_takes(q):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
        return out, lse
    return _plain_forward(q, k, v, causal)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `out` and `lse` are those over all keys of the row."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal
        )
    if flash_takes(q):
        return aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2],
            0.0, causal, *no_random_state(q.device),
        )  # fmt: skip
    return _plain_backward(grad_out, q, k, v, out, lse, causal)


def flash_takes(q: Tensor) -> bool:
    """Whether torch's flash kernels on CUDA take these queries."""
    on_cuda = q.device.type == "cuda"
    return on_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0


def no_random_state(device: torch.device) -> tuple[Tensor, Tensor]:
    """What a flash backward takes in place of its forward's random state: it draws nothing."""
    state = torch.zeros(2, dtype=torch.uint64, device=device)
    return state, torch.zeros((), dtype=torch.uint64, device=device)


def _spans(num: int) -> list[slice]:
    starts = range(0, num, QUERIES_AT_ONCE)
    return [slice(start, min(start + QUERIES_AT_ONCE, num)) for start in starts]


def _scores(q: Tensor, k: Tensor, rows: slice, causal: bool) -> Tensor:
    """Scaled scores of some queries in fp32, (B, H, rows, T)."""
    scores = q[:, :, rows].float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        at = torch.arange(rows.start, rows.stop, device=q.device)
        later = at[:, None] < torch.arange(k.shape[2], device=q.device)
        scores.masked_fill_(later, -math.inf)
    return scores


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1).float()
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for rows in _spans(q.shape[2]):
        scores = _scores(q, k, rows, causal)
        lse[:, :, rows] = scores.logsumexp(-1)
        out[:, :, rows] = (scores.softmax(-1) @ v).to(q.dtype)
    return out, lse


def _plain_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, groups, length, dim = k.shape
    repeats = q.shape[1] // groups
    keys, values = k.repeat_interleave(repeats, 1).float(), v.repeat_interleave(repeats, 1).float()
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
    for rows in _spans(q.shape[2]):
        given = grad_out[:, :, rows].float()
        weights = torch.exp(_scores(q, keys, rows, causal) - lse[:, :, rows, None])
        grad_v += weights.transpose(-1, -2) @ given
        own = (out[:, :, rows].float() * given).sum(-1, keepdim=True)
        grad_scores = weights * (given @ values.transpose(-1, -2) - own) / math.sqrt(dim)
        grad_q[:, :, rows] = (grad_scores @ keys).to(q.dtype)
        grad_k += grad_scores.transpose(-1, -2) @ q[:, :, rows].float()
    shape = (batch, groups, repeats, length, dim)
    return grad_q, grad_k.view(shape).sum(2).to(k.dtype), grad_v.view(shape).sum(2).to(v.dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over blocks are held in: fp32 beside 16-bit tensors."""
    return torch.float32 if dtype.itemsize < 4 else dtype


@dataclass(slots=True)
class Partial:
    """Output and lse of queries over the keys seen so far."""

    out: Tensor
    lse: Tensor

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]) -> Partial:
        """Over the first keys; queries that see none of them have out = 0 and lse = -inf."""
        if len(blocks) == 1 and blocks[0].covers(q.shape[2]):
            return Partial(*forward(q, *blocks[0].keys(k, v), causal=blocks[0].causal))
        batch, heads, length, _ = q.shape
        lse = q.new_full((batch, length, heads), -math.inf, dtype=lse_dtype(q))
        here = Partial(zeros_like(q), lse.transpose(1, 2))
        for block in blocks:
            if block.causal:  # triangles share no queries
                part, part_lse = forward(*block.queries(q), *block.keys(k, v), causal=True)
                block.queries(here.out)[0].copy_(part)
                block.queries(here.lse)[0].copy_(part_lse)
        here.see(q, k, v, [block for block in blocks if not block.causal])
        return here

    def see(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]) -> None:
        """Take in further keys."""
        for block in blocks:
            part = forward(*block.queries(q), *block.keys(k, v), causal=block.causal)
            self.add(block, *part)

    def add(self, block: Block, out: Tensor, lse: Tensor) -> None:
        """Take in the output of some queries over further keys."""
        self.out = self.out.to(sum_dtype(self.out.dtype))
        own, own_lse = block.queries(self.out, self.lse)
        weight = torch.sigmoid(lse - own_lse)[..., None]
        own.lerp_(out.to(own.dtype), weight)
        torch.logaddexp(own_lse, lse, out=own_lse)


def zeros_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros of the form of (B, H, S, D) that lie as (B, S, H, D), as kernels return them."""
    batch, heads, length, dim = x.shape
    zeros = x.new_zeros((batch, length, heads, dim), dtype=dtype or x.dtype)
    return zeros.transpose(1, 2)


def lse_dtype(q: Tensor) -> torch.dtype:
    """fp32, or fp64 beside it."""
    return torch.float64 if q.dtype is torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class Rows:
    """Queries with all that the backward of any block of their keys takes."""

    q: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor

    def gradients(self, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Of the block's part of q, k and v, over this block."""
        q, out, lse, grad_out = block.queries(self.q, self.out, self.lse, self.grad_out)
        seen_k, seen_v = block.keys(k, v)
        return backward(grad_out, q, seen_k, seen_v, out, lse, causal=block.causal)

    def start(
        self, k: Tensor, v: Tensor, blocks: Sequence[Block], dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the gradients of q, k and v that further blocks can be added to."""
        dtype = dtype or sum_dtype(self.q.dtype)
        if len(blocks) == 1 and blocks[0].covers(self.q.shape[2]):
            grad_q, grad_k, grad_v = self.gradients(k, v, blocks[0])
            return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)
        grad_q, grad_k, grad_v = (zeros_like(x, dtype) for x in (self.q, k, v))
        self.add(k, v, blocks, grad_q, grad_k, grad_v)
        return grad_q, grad_k, grad_v

    def add(
        self, k: Tensor, v: Tensor, blocks: Sequence[Block],
        grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
    ) -> None:  # fmt: skip
        """Add the gradients over some blocks to sums of the form of q, k and v."""
        for block in blocks:
            own_q, own_k, own_v = self.gradients(k, v, block)
            block.queries(grad_q)[0].add_(own_q)
            for total, part in zip(block.keys(grad_k, grad_v), (own_k, own_v), strict=True):
                total.add_(part)
