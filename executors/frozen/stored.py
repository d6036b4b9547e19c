"""A frozen matrix in few bits: its parameters are bytes, and it is converted at each use.

Bytes are sharded, gathered and kept in checkpoints like any parameter. The product keeps nothing
for backward: there the matrix is converted again (`kernels/dequantize.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...kernels import dequantize
from . import grid, nf4

NF4 = "nf4"
STORED = ".stored."
"""In the names of its parameters."""


def checked(name: str, weight: Tensor) -> Tensor:
    """A matrix that is to be stored; InputError where it is not all numbers."""
    if not bool(torch.isfinite(weight).all()):
        raise InputError("base", name, "holds values that are not finite, which have no code",
                         "give the weights of a training that did not diverge")  # fmt: skip
    return weight


class Stored(nn.Module):
    """Rows `first[0]`... and columns `first[1]`... of a frozen matrix (`whole`) in a format."""

    def __init__(
        self, base: str, rows: int, columns: int, whole: tuple[int, int], first: tuple[int, int]
    ) -> None:
        super().__init__()
        self.base, self.rows, self.columns = base, rows, columns
        self.whole, self.first = whole, first
        self.form = None if base == NF4 else grid.Format.of(base)
        for name, shape in self._shapes(rows, columns).items():
            there = torch.empty(shape, dtype=torch.uint8, device="meta")
            self.register_parameter(name, nn.Parameter(there, requires_grad=False))

    def _shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        if self.form is None:
            return nf4.shapes(rows, columns, self.whole)
        return grid.shapes(rows, columns, self.form)

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the bytes of the whole matrix."""
        return self._shapes(*self.whole)

    def bytes_of(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters of this part by name, for a whole matrix, rounded to nearest."""
        rows = slice(self.first[0], self.first[0] + self.rows)
        columns = slice(self.first[1], self.first[1] + self.columns)
        if self.form is None:
            found = nf4.Nf4.of(weight).cut(rows, columns)
            return {"codes": found.codes, "scales": found.scales, "groups": found.groups}
        return grid.packed(grid.round_to_nearest(weight, self.form).cut(rows, columns), self.form)

    def part_of(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of this part by name, from those of the whole matrix on a grid."""
        assert self.form is not None
        rows = slice(self.first[0], self.first[0] + self.rows)
        columns = slice(self.first[1], self.first[1] + self.columns)
        found = grid.unpacked(parts, *self.whole, self.form)
        return grid.packed(found.cut(rows, columns), self.form)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The matrix (rows, columns)."""
        parts = {name: part.detach() for name, part in self.named_parameters()}
        codes = parts["codes"]
        if self.form is not None:
            scales = parts["scales"].view(torch.float16)
            bits, group = self.form.bits, self.form.group
            return dequantize.grid(codes, scales, parts["zeros"], bits, group, self.columns, dtype)
        return dequantize.nf4(
            codes, parts["scales"], parts["groups"].view(torch.float32), nf4.table(codes.device),
            self.whole[1] // nf4.BLOCK, (self.first[0], self.first[1] // nf4.BLOCK), dtype,
        )  # fmt: skip


class StoredProduct(torch.autograd.Function):
    """x (..., K) -> x W^T + b (..., N) of a stored W; nothing is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, stored: Stored) -> Tensor:
        ctx.stored = stored
        return F.linear(x, stored.weight(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return grads[0] @ ctx.stored.weight(grads[0].dtype), None, None
