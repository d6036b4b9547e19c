"""Matmuls of several experts: each group of rows by the weight of its own expert.

    unequal groups   rows (R, in), sorted: one matmul per group on a CPU and in fp32, torch's
                     grouped kernel on a GPU in 16 bits, which needs no sizes on the host
    equal groups     rows (X, R/X, in): one batched matmul

Weights are (X, out, in), as those of a linear layer. A group without rows gives zero gradients to
its weight, so that no expert is ever without one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..torch_compat import grouped_matmul


class Groups:
    """Rows of each expert: sizes on the device, and on the host once somebody asks for them."""

    def __init__(self, sizes_X: Tensor, sizes: list[int] | None = None) -> None:
        self._sizes, self._sizes_X = sizes, sizes_X
        self.ends_X = sizes_X.cumsum(0).to(torch.int32)
        """Where each group ends."""

    def on_host(self) -> list[int]:
        """The sizes; on a GPU this waits for it, unless they are here already."""
        if self._sizes is None:
            self._sizes = self._sizes_X.tolist()
        return self._sizes


class GroupedMatmul(torch.autograd.Function):
    """One matmul per group, written into one output."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sizes = sizes
        out = rows.new_empty(len(rows), weight.shape[1])
        parts = zip(rows.split(sizes), weight.unbind(0), out.split(sizes), strict=True)
        for own, matrix, part in parts:
            torch.mm(own, matrix.t(), out=part)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        parts = grads[0].split(ctx.sizes)
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.empty_like(rows)
            own = zip(parts, weight.unbind(0), grad_rows.split(ctx.sizes), strict=True)
            for grad, matrix, out in own:
                torch.mm(grad, matrix, out=out)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            each = zip(parts, rows.split(ctx.sizes), grad_weight.unbind(0), strict=True)
            for grad, own_rows, out in each:
                torch.mm(grad.t(), own_rows, out=out)  # of no rows: zeros
        return grad_rows, grad_weight, None


class KernelMatmul(torch.autograd.Function):
    """The same by torch's grouped kernel, forward and both gradients.

    What the kernel leaves of a weight's gradient where a group has no rows is not said: zeros.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends_X: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends_X)
        assert grouped_matmul is not None
        return grouped_matmul(rows, weight.transpose(1, 2), offs=ends_X)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, ends_X = ctx.saved_tensors
        grad = grads[0].contiguous()
        assert grouped_matmul is not None
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = grouped_matmul(grad, weight, offs=ends_X)
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_matmul(grad.t(), rows, offs=ends_X)
            empty_X = ends_X.diff(prepend=ends_X.new_zeros(1)) == 0
            grad_weight = grad_weight.masked_fill_(empty_X[:, None, None], 0.0)
        return grad_rows, grad_weight, None


class GroupedLinear(nn.Module):
    """The same linear layer of several experts, without biases."""

    def __init__(self, num_experts: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width_out, width_in))

    def forward(self, rows: Tensor, groups: Groups | None) -> Tensor:
        """Outputs of sorted rows (R, in), or without groups of equal ones (X, R/X, in)."""
        if groups is None:
            return torch.bmm(rows, self.weight.transpose(1, 2))
        out: Any
        if grouped_matmul is not None and _has_kernel(rows, self.weight):
            out = KernelMatmul.apply(rows, self.weight, groups.ends_X)
        else:
            out = GroupedMatmul.apply(rows, self.weight, groups.on_host())
        return out


def _has_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped kernel is made for this: rows of whole 16 bytes on a GPU."""
    whole = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
    return rows.is_cuda and rows.dtype == torch.bfloat16 and whole and len(rows) > 0


class Gated(torch.autograd.Function):
    """act(gate) * up, of which backward keeps the two inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _activate(gate, kind).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        # the product is gone before the other gradient is made
        if ctx.kind == "swiglu":
            grad_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        else:
            grad_gate = torch.ops.aten.gelu_backward(grads[0] * up, gate)
        return grad_gate, _activate(gate, ctx.kind).mul_(grads[0]), None


def _activate(gate: Tensor, kind: str) -> Tensor:
    return F.silu(gate) if kind == "swiglu" else F.gelu(gate)
