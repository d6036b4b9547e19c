"""Attention within packed documents by one kernel for all of them, where torch has such a kernel.

Rows are laid one after the other, (B S, H, D), and the kernel is told where each document starts;
its lse has a form of its own, which only its backward needs to understand. 16 bits on CUDA.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .chunks import Borders
from .flash import no_random_state

aten: Any = torch.ops.aten


def starts(borders: Borders, device: torch.device) -> tuple[Tensor, int]:
    """Places of the first tokens of all documents and the end, int32, and the longest document."""
    ends = [0]
    longest = 1
    for row in borders:
        base = ends[-1]
        ends += [base + end for end in row[1:]]
        longest = max(longest, max(b - a for a, b in pairwise(row)))
    return torch.tensor(ends, dtype=torch.int32, device=device), longest


def forward(q: Tensor, k: Tensor, v: Tensor, borders: Borders) -> tuple[Tensor, Tensor]:
    """Output (B, H, S, D) and the kernel's lse."""
    places, longest = starts(borders, q.device)
    flat = [_flat(x) for x in (q, k, v)]
    out, lse, *_ = aten._flash_attention_forward(
        *flat, places, places, longest, longest, 0.0, True, False
    )
    return _rows(out, q.shape[0]), lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, borders: Borders
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    places, longest = starts(borders, q.device)
    flat = [_flat(x) for x in (grad_out, q, k, v, out)]
    grads = aten._flash_attention_backward(
        *flat, lse, places, places, longest, longest, 0.0, True, *no_random_state(q.device)
    )
    grad_q, grad_k, grad_v = (_rows(grad, q.shape[0]) for grad in grads)
    return grad_q, grad_k, grad_v


def _flat(x_BHSD: Tensor) -> Tensor:
    return x_BHSD.transpose(1, 2).flatten(0, 1).contiguous()


def _rows(x_THD: Tensor, batch: int) -> Tensor:
    return x_THD.unflatten(0, (batch, -1)).transpose(1, 2)
