"""The dense MLP."""

from __future__ import annotations

from ...model import GATED, Layer
from ..graph import Operator, Tensor
from .parts import TOKENS, elementwise, enter, leave, linear, norm, part, whole


def dense_mlp(layer: Layer, x: Tensor, out: Tensor, *, sp: bool, fused: bool) -> list[Operator]:
    """Norm, matmuls and their edges; `x` and `out` lie outside the matmuls."""
    n2, n2g, partial = part("mlp_norm.out"), whole("mlp.in"), whole("mlp.partial")
    return [
        norm("mlp_norm", layer.norm, x, n2, fused=fused),
        enter("mlp.enter", n2, n2g, sp),
        *mlp_matmuls(layer, n2g, partial, bias=layer.bias),
        leave("mlp.leave", partial, out, sp),
    ]


def mlp_matmuls(
    layer: Layer, x: Tensor, partial: Tensor, *, bias: bool, ffn: str = "ffn", prefix: str = ""
) -> list[Operator]:
    """Up (and gate), activation, down, of width `ffn`; `partial` holds partial sums over tp."""

    def tensor(name: str) -> Tensor:
        return Tensor(name=prefix + name, axes=(*TOKENS, ffn))

    up, act, inner = tensor("up"), tensor("activation"), tensor("inner")
    if layer.mlp in GATED:
        gate = tensor("gate")
        ops = [
            linear(f"{prefix}gate", x, gate, ("hidden",), (ffn,), bias),
            linear(f"{prefix}up", x, up, ("hidden",), (ffn,), bias),
            elementwise(
                f"{prefix}{layer.mlp}", layer.mlp, (gate, up), act, saves=(gate, up, inner)
            ),
        ]
    else:
        saves = {"gelu": (up,), "relu": (act,)}.get(layer.mlp, (inner,))
        ops = [
            linear(f"{prefix}up", x, up, ("hidden",), (ffn,), bias),
            elementwise(f"{prefix}{layer.mlp}", layer.mlp, (up,), act, saves=saves),
        ]
    return [*ops, linear(f"{prefix}down", act, partial, (ffn,), ("hidden",), bias)]
