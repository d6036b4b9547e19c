"""Matmuls of several experts: each group of rows by the weight of its own expert.

    unequal groups   rows (R, in), sorted: one matmul per group on a CPU and in fp32, torch's
                     grouped kernel on a GPU in 16 bits, which needs no sizes on the host
    equal groups     rows (X, R/X, in): one batched matmul

Where a backward is split, the gradients of the weights wait like those of other products.

Weights are (X, out, in), as those of a linear layer. A group without rows gives zero gradients to
its weight, so that no expert is ever without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..split_backward import Later
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


class Kernel(Protocol):
    """A way to multiply each group of rows by its own matrix."""

    def outputs(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Each row times the weight (out, in) of its group."""
        ...

    def of_rows(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Gradients of rows from those of outputs."""
        ...

    def of_weight(self, grad: Tensor, rows: Tensor) -> Tensor:
        """The gradient of the weights, zeros where a group has no rows."""
        ...


@dataclass(frozen=True, slots=True)
class OneByOne:
    """One matmul per group, written into one output."""

    sizes: list[int]

    def outputs(self, rows: Tensor, weight: Tensor) -> Tensor:
        out = rows.new_empty(len(rows), weight.shape[1])
        parts = zip(rows.split(self.sizes), weight.unbind(0), out.split(self.sizes), strict=True)
        for own, matrix, part in parts:
            torch.mm(own, matrix.t(), out=part)
        return out

    def of_rows(self, grad: Tensor, weight: Tensor) -> Tensor:
        out = grad.new_empty(len(grad), weight.shape[2])
        parts = zip(grad.split(self.sizes), weight.unbind(0), out.split(self.sizes), strict=True)
        for own, matrix, part in parts:
            torch.mm(own, matrix, out=part)
        return out

    def of_weight(self, grad: Tensor, rows: Tensor) -> Tensor:
        out = rows.new_empty(len(self.sizes), grad.shape[1], rows.shape[1])
        parts = zip(grad.split(self.sizes), rows.split(self.sizes), out.unbind(0), strict=True)
        for own, own_rows, part in parts:
            torch.mm(own.t(), own_rows, out=part)  # of no rows: zeros
        return out


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Torch's grouped kernel.

    What it leaves of a weight's gradient where a group has no rows is not said: zeros.
    """

    ends_X: Tensor

    def outputs(self, rows: Tensor, weight: Tensor) -> Tensor:
        assert grouped_matmul is not None
        return grouped_matmul(rows, weight.transpose(1, 2), offs=self.ends_X)

    def of_rows(self, grad: Tensor, weight: Tensor) -> Tensor:
        assert grouped_matmul is not None
        return grouped_matmul(grad.contiguous(), weight, offs=self.ends_X)

    def of_weight(self, grad: Tensor, rows: Tensor) -> Tensor:
        assert grouped_matmul is not None
        out = grouped_matmul(grad.contiguous().t(), rows, offs=self.ends_X)
        empty_X = self.ends_X.diff(prepend=self.ends_X.new_zeros(1)) == 0
        return out.masked_fill_(empty_X[:, None, None], 0.0)


class Batched:
    """One batched matmul, for groups (X, R/X, in) of one size."""

    def outputs(self, rows: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(rows, weight.transpose(1, 2))

    def of_rows(self, grad: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(grad, weight)

    def of_weight(self, grad: Tensor, rows: Tensor) -> Tensor:
        return torch.bmm(grad.transpose(1, 2), rows)


class Products(torch.autograd.Function):
    """A kernel's products; the gradient of the weight may be put off."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, kernel: Kernel, later: Later | None
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.kernel, ctx.later = kernel, later
        ctx.owner = weight if later is not None else None
        return kernel.outputs(rows, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight = ctx.saved_tensors
        kernel, later = ctx.kernel, ctx.later
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = kernel.of_rows(grads[0], weight)
        if ctx.needs_input_grad[1]:
            if later is not None and later.putting_off:
                later.waiting.append((ctx.owner, partial(_owed, kernel, grads[0], rows)))
            else:
                grad_weight = kernel.of_weight(grads[0], rows)
        return grad_rows, grad_weight, None, None


def _owed(kernel: Kernel, grad: Tensor, rows: Tensor, there: Tensor | None) -> Tensor:
    """The gradient of a weight, added to the one there is."""
    made = kernel.of_weight(grad, rows)
    return made if there is None else there.add_(made)


class GroupedLinear(nn.Module):
    """The same linear layer of several experts, without biases."""

    def __init__(self, num_experts: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width_out, width_in))
        self.later: Later | None = None
        """Where gradients of the weight wait when a backward is split."""

    def forward(self, rows: Tensor, groups: Groups | None) -> Tensor:
        """Outputs of sorted rows (R, in), or without groups of equal ones (X, R/X, in)."""
        out: Any = Products.apply(rows, self.weight, self._kernel(rows, groups), self.later)
        return out

    def _kernel(self, rows: Tensor, groups: Groups | None) -> Kernel:
        if groups is None:
            return Batched()
        if grouped_matmul is not None and _has_kernel(rows, self.weight):
            return AtOnce(groups.ends_X)
        return OneByOne(groups.on_host())


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
