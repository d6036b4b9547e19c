"""Stored activations: what norms and activation functions keep for backward, in 8-bit floats.

Forward works on the tensors as they are. For backward an input or result is kept in E4M3 with a
16-bit scale per 16 neighbours, statistics of norms in fp32, and gradients follow from what comes
back. Linears keep their own operand (`fp8_linear.py`), attention keeps its tensors in 16 bits. The
counterpart in bytes is `costmodel/techniques/storage.py`: what autograd holds of a layer is equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.fp8_cast import pack_groups, unpack_groups
from ..decoder import Block, Mlp
from ..torch_compat import fused_rms_norm, fused_rms_norm_backward


def _unpacked(saved: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The values of one tensor's codes and scales."""
    codes, scales = saved
    return unpack_groups(codes, scales, dtype)


class StoredRmsNorm(torch.autograd.Function):
    """RMSNorm that keeps its input in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rstd = fused_rms_norm(x, weight, eps)
        ctx.save_for_backward(*pack_groups(x), rstd, weight)
        ctx.dtype = x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, rstd, weight = ctx.saved_tensors
        x = unpack_groups(codes, scales, ctx.dtype)
        return *fused_rms_norm_backward(grads[0].contiguous(), x, rstd, weight), None


class StoredLayerNorm(torch.autograd.Function):
    """LayerNorm that keeps its input in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x, list(weight.shape), weight, bias, eps)
        ctx.save_for_backward(*pack_groups(x), mean, rstd, weight, bias)
        ctx.dtype = x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, mean, rstd, weight, bias = ctx.saved_tensors
        x = unpack_groups(codes, scales, ctx.dtype)
        found = torch.ops.aten.native_layer_norm_backward(
            grads[0].contiguous(), x, list(weight.shape), mean, rstd, weight, bias,
            [True, True, True],
        )  # fmt: skip
        return *found, None


class StoredGated(torch.autograd.Function):
    """SwiGLU or GeGLU, f(gate) * up, that keeps gate, up and f(gate) in 8 bits."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        inner = F.silu(gate) if kind == "swiglu" else F.gelu(gate)
        ctx.save_for_backward(*pack_groups(gate), *pack_groups(up), *pack_groups(inner))
        ctx.kind, ctx.dtype = kind, gate.dtype
        return inner * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up, inner = (ctx.saved_tensors[i : i + 2] for i in (0, 2, 4))
        of_inner = _unpacked(up, ctx.dtype).mul_(grads[0])
        backward = torch.ops.aten.silu_backward
        if ctx.kind == "geglu":
            backward = torch.ops.aten.gelu_backward
        of_gate = backward(of_inner, _unpacked(gate, ctx.dtype))
        del of_inner
        return of_gate, _unpacked(inner, ctx.dtype).mul_(grads[0]), None


class StoredGelu(torch.autograd.Function):
    """GELU that keeps its input in 8 bits."""

    @staticmethod
    def forward(ctx: Any, up: Tensor) -> Tensor:
        ctx.save_for_backward(*pack_groups(up))
        ctx.dtype = up.dtype
        return F.gelu(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grads[0], _unpacked(ctx.saved_tensors, ctx.dtype))


class StoredSquaredRelu(torch.autograd.Function):
    """Squared ReLU that keeps the ReLU's result in 8 bits."""

    @staticmethod
    def forward(ctx: Any, up: Tensor) -> Tensor:
        inner = F.relu(up)
        ctx.save_for_backward(*pack_groups(inner))
        ctx.dtype = up.dtype
        return inner.square_()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _unpacked(ctx.saved_tensors, ctx.dtype).mul_(2).mul_(grads[0])


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    """A norm's forward, in the form that keeps 8 bits."""
    out: Any
    if isinstance(module, nn.LayerNorm):
        out = StoredLayerNorm.apply(x, module.weight, module.bias, module.eps)
    else:
        assert isinstance(module, nn.RMSNorm)
        out = StoredRmsNorm.apply(x, module.weight, module.eps)
    return out


def _gated(kind: str, gate: Tensor, up: Tensor) -> Any:
    return StoredGated.apply(gate, up, kind)


def _plain(function: type[torch.autograd.Function], up: Tensor) -> Any:
    return function.apply(up)


ACTIVATIONS: dict[str, Any] = {
    "swiglu": partial(_gated, "swiglu"),
    "geglu": partial(_gated, "geglu"),
    "gelu": partial(_plain, StoredGelu),
    "squared_relu": partial(_plain, StoredSquaredRelu),
}


def apply(block: Block) -> None:
    """Have a block's norms and its activation function keep 8 bits; its linears are precision's."""
    for norm in (block.attention_norm, block.mlp_norm):
        norm.forward = partial(_norm, norm)
    assert isinstance(block.mlp, Mlp)
    block.mlp.activation = ACTIVATIONS[block.mlp.kind]
