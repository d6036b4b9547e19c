"""Linears on 8-bit operands: the product of a linear, its two gradients, and what they keep.

    y = x W^T        x and W in E4M3, one scale each
    dx = dy W        dy in E5M2
    dW = dy^T x

Scales follow the largest value of each tensor at each use. Products are accumulated in fp32 and
rounded once to the dtype around them. Either half can be had alone:

    low      the three matmuls run on 8-bit operands; else they run in the dtype of x
    stored   x is kept for backward as its 8-bit operand; else as it is, and cast again

The weight is cast at every use and only its scale is kept, so that nothing 8-bit stands beside the
parameters. Linears that read the same tensor share its cast.

On Hopper both operands of a matmul have the contracted dimension last: x is kept transposed, and W
and dy are cast in a second order, where they are contracted along the other dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.fp8_cast import E4M3, E5M2, Cast, cast, unpack_tensor
from .shared_casts import SharedCast
from .torch_compat import scaled_matmul


class Operands(SharedCast):
    """The cast of a tensor that `readers` linears read one after the other, made once.

    `low` says whether any of their matmuls takes 8-bit operands.
    """

    def __init__(self, readers: int, *, low: bool, stored: bool) -> None:
        super().__init__(readers)
        self.low, self.stored = low, stored

    def make(self, x: Tensor) -> Cast:
        kept_transposed = needs_copies(x) and self.low and self.stored
        plain = self.low or not kept_transposed
        return cast(_matrix(x), E4M3, plain=plain, transposed=kept_transposed)


def needs_copies(x: Tensor) -> bool:
    """Whether matmuls want the contracted dimension last in memory; elsewhere a view will do."""
    return x.is_cuda


def product(operands: Operands, low: bool) -> Callable[..., Tensor]:
    """x, weight, bias -> x weight^T + bias with gradients, on operands that a group of linears
    shares."""

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = operands.take(x)
        out: Any = LowLinear.apply(
            x, weight, found.codes_MK, found.codes_KM, found.scale, low, operands.stored
        )
        return out if bias is None else out + bias

    return multiply


def _matrix(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


class LowLinear(torch.autograd.Function):
    """x (..., K), weight (N, K) -> (..., N); codes of x come along, whatever of them there are."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, codes_MK: Tensor | None, codes_KM: Tensor | None,
        scale: Tensor, low: bool, stored: bool,
    ) -> Tensor:  # fmt: skip
        ctx.low, ctx.stored, ctx.transposed = low, stored, codes_KM is not None
        ctx.shape, ctx.dtype = x.shape, x.dtype
        weight_scale = None
        if low:
            assert codes_MK is not None
            w = cast(weight, E4M3)
            assert w.codes_MK is not None
            weight_scale = w.scale
            out_MN = scaled_matmul(codes_MK, w.codes_MK, scale * w.scale, x.dtype, fast=True)
        else:
            out_MN = _matrix(x) @ weight.t()
        codes = codes_KM if codes_KM is not None else codes_MK
        ctx.save_for_backward(codes if stored else x, scale, weight, weight_scale)
        return out_MN.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, scale, weight, weight_scale = ctx.saved_tensors
        grad_MN = _matrix(grads[0]).contiguous()
        run = _low_gradients if ctx.low else _wide_gradients
        grad_MK, grad_NK = run(ctx, grad_MN, kept, scale, weight, weight_scale)
        grad_x = grad_MK.view(ctx.shape) if grad_MK is not None else None
        return grad_x, grad_NK, None, None, None, None, None


Gradients = tuple[Tensor | None, Tensor | None]


def _wide_gradients(
    ctx: Any, grad_MN: Tensor, codes: Tensor, scale: Tensor, weight: Tensor, _: Tensor | None
) -> Gradients:
    """Matmuls in the dtype of x, which comes back from its codes."""
    grad_MK = grad_MN @ weight if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return grad_MK, None
    x = unpack_tensor(codes, scale, ctx.dtype)
    return grad_MK, (grad_MN.t() @ (x.t() if ctx.transposed else x)).to(weight.dtype)


def _low_gradients(
    ctx: Any, grad_MN: Tensor, kept: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor
) -> Gradients:
    """Matmuls on 8-bit operands."""
    copies = needs_copies(grad_MN)
    of_x, of_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    g = cast(grad_MN, E5M2, transposed=copies and of_weight)
    assert g.codes_MK is not None
    grad_MK = grad_NK = None
    if of_x:
        w = cast(weight, E4M3, weight_scale, plain=not copies, transposed=copies)
        grad_MK = scaled_matmul(
            g.codes_MK, _turned(w), g.scale * w.scale, grad_MN.dtype, fast=False
        )
    if of_weight:
        if ctx.stored:
            x_KM = kept if ctx.transposed else kept.t()
        else:
            x_KM = _turned(cast(_matrix(kept), E4M3, scale, plain=not copies, transposed=copies))
        grad_NK = scaled_matmul(_turned(g), x_KM, g.scale * scale, weight.dtype, fast=False)
    return grad_MK, grad_NK


def _turned(made: Cast) -> Tensor:
    """The codes in the other order."""
    if made.codes_KM is not None:
        return made.codes_KM
    assert made.codes_MK is not None
    return made.codes_MK.t()
