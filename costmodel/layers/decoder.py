"""One decoder layer: attention and MLP (or experts), each with its residual."""

from __future__ import annotations

from ...model import Layer, Model
from ..graph import Graph
from ..options import Options
from .attention import self_attention
from .experts import experts_mlp
from .latent import latent_attention
from .mlp import dense_mlp
from .parts import elementwise, part


def decoder_layer(
    model: Model,
    layer: Layer,
    *,
    sequence_parallel: bool,
    fused: bool,
    options: Options,
    counted: bool = False,
) -> Graph:
    """One decoder layer; `fused` says whether the device has fused norm kernels, `counted` whether
    the stack exchanges counts of rows between experts (`Stack.exchanges_counts`)."""
    sp = sequence_parallel
    x, a, x1, d, y = (part(n) for n in ("x", "attention.out", "x1", "mlp.out", "y"))
    if layer.latent is not None:
        ops = latent_attention(layer, layer.latent, x, a, sp=sp, fused=fused, options=options)
    else:
        ops = self_attention(model, layer, x, a, sp=sp, fused=fused, options=options)
    ops.append(elementwise("attention_residual", "add", (x, a), x1))
    if layer.experts is not None:
        ops += experts_mlp(
            layer, layer.experts, x1, d, sp=sp, fused=fused, balance=options.balance_loss,
            counted=counted,
        )  # fmt: skip
    else:
        ops += dense_mlp(layer, x1, d, sp=sp, fused=fused)
    ops.append(elementwise("mlp_residual", "add", (x1, d), y))
    return Graph(name="layer", operators=tuple(ops), boundary=x)
