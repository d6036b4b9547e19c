"""Linears on codes of rotated operands (HALO): the product, its two gradients, and what they keep.

    y = x W^T      dx = E W      dW = E^T x      E the gradient of y

Each is a product of codes with one scale per tensor. What is rotated, and along which dimension,
says the level of a recipe (`costmodel/halo_levels.py`); H is orthogonal, so that without codes all
recipes are the plain linear. Linears that read the same tensor share its cast. A weight comes as it
is, or as codes that FSDP gathered (`halo_gather.py`).

Operands of a product have the contracted dimension last. Codes of int8 are multiplied in int32,
those of fp6 and fp4, which no device has with one scale, in 16- or 32-bit floats that hold their
products exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..costmodel.halo_levels import Level
from ..kernels.fp8_cast import Cast
from ..kernels.hadamard import cast_low, rotate, turned
from .halo_gather import GatheredCodes
from .shared_casts import SharedCast
from .torch_compat import coded_matmul


@dataclass(frozen=True)
class How:
    """A format and a level."""

    name: str
    level: Level


class RotatedCast(SharedCast):
    """The codes of a tensor for the products of forward."""

    def __init__(self, readers: int, how: How) -> None:
        super().__init__(readers)
        self.how = how

    def make(self, x: Tensor) -> Cast:
        return cast_low(x.flatten(0, -2), self.how.name, rotated=self.how.level.rotates)


def product(shared: RotatedCast) -> Callable[..., Tensor]:
    """x, weight, bias -> x weight^T + bias with gradients, on codes that linears share."""

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        codes = shared.take(x)
        out: Any = HaloLinear.apply(x, weight, codes.codes_MK, codes.scale, shared.how)
        return out if bias is None else out + bias

    return multiply


class HaloLinear(torch.autograd.Function):
    """x (..., K), weight (N, K) -> (..., N); codes of x (M, K) come along."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, codes_MK: Tensor, scale: Tensor, how: How
    ) -> Tensor:
        level = how.level
        ctx.how, ctx.shape, ctx.dtype = how, x.shape, x.dtype
        w = _codes_of(weight, how)
        out_MN = coded_matmul(codes_MK, w.codes_MK, scale * w.scale, x.dtype)
        of_weight = ctx.needs_input_grad[1]
        kept_x = (codes_MK if level.low_x else x) if of_weight else None
        keeps_codes = level.low_weight and not isinstance(weight, GatheredCodes)
        kept_codes = w.codes_MK if keeps_codes else None
        ctx.save_for_backward(kept_x, scale, weight, kept_codes, w.scale)
        return out_MN.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight, codes, weight_scale = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[:2]
        how: How = ctx.how
        grad_MN = grads[0].flatten(0, -2).contiguous()
        plain = of_x and not how.level.tokens
        if of_weight or plain:
            g = cast_low(grad_MN, how.name, plain=plain, transposed=of_weight)
        else:
            g = None
        grad_x = grad_NK = None
        if of_x:
            w = _weight_KN(weight, codes, weight_scale, how)
            grad_x = _input_gradient(grad_MN, g, w, how).to(ctx.dtype).view(ctx.shape)
        if of_weight:
            assert g is not None and g.codes_KM is not None
            grad_NK = _weight_gradient(g, x, scale, weight.dtype, how)
        return grad_x, grad_NK, None, None, None


@dataclass(frozen=True)
class Operand:
    """Codes with the contracted dimension last."""

    codes_MK: Tensor
    scale: Tensor


def _codes_of(weight: Tensor, how: How) -> Operand:
    """A weight as forward multiplies it."""
    if isinstance(weight, GatheredCodes):
        return Operand(weight.codes, weight.scale)
    found = cast_low(weight, how.name, rotated=how.level.rotates)
    assert found.codes_MK is not None
    return Operand(found.codes_MK, found.scale)


def _weight_KN(weight: Tensor, codes: Tensor | None, scale: Tensor, how: How) -> Operand:
    """A weight as the gradient of the input is multiplied with it, rotated along K or not."""
    if isinstance(weight, GatheredCodes):
        return Operand(turned(weight.codes), scale)
    if codes is not None:
        return Operand(turned(codes), scale)
    found = cast_low(weight, how.name, plain=False, transposed=True)
    assert found.codes_KM is not None
    return Operand(found.codes_KM, found.scale)


def _input_gradient(grad_MN: Tensor, g: Cast | None, w_KN: Operand, how: How) -> Tensor:
    """The gradient (M, K) of the input."""
    level = how.level
    if level.tokens:
        along_NM = cast_low(grad_MN.t().contiguous(), how.name, rotated=True)
        assert along_NM.codes_MK is not None
        codes_MN, scale = turned(along_NM.codes_MK), along_NM.scale
    else:
        assert g is not None and g.codes_MK is not None
        codes_MN, scale = g.codes_MK, g.scale
    grad_MK = coded_matmul(codes_MN, w_KN.codes_MK, scale * w_KN.scale, grad_MN.dtype)
    if level.low_weight and level.rotates:
        grad_MK = rotate(grad_MK, back=True)
    if level.tokens:
        grad_MK = rotate(grad_MK.t(), back=True).t().contiguous()
    return grad_MK


def _weight_gradient(g: Cast, x: Tensor, scale: Tensor, dtype: torch.dtype, how: How) -> Tensor:
    """The gradient (N, K) of the weight; x as it was kept."""
    level = how.level
    assert g.codes_KM is not None
    if level.low_x:
        codes_KM = turned(x)
    else:
        cast_x = cast_low(x.flatten(0, -2), how.name, plain=False, transposed=True)
        assert cast_x.codes_KM is not None
        codes_KM, scale = cast_x.codes_KM, cast_x.scale
    grad_NK = coded_matmul(g.codes_KM, codes_KM, g.scale * scale, dtype)
    return rotate(grad_NK, back=True) if level.low_x and level.rotates else grad_NK
