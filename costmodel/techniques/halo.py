"""HALO: matmuls on int8 codes of Hadamard-rotated operands (and of fp6 and fp4, emulated).

A rotation is orthogonal, (X H)(W H)^T = X W^T, and spreads outliers over all columns, so that one
scale per tensor serves. Levels say which products see rotated operands; E is the gradient of the
output (Ashkboos et al. 2025, HALO, arXiv 2501.02625; their implementation's functions):

    recipe         Y             dX                     dW              kept
    halo0          q(X) q(W)^T   q(E) q(W)              q(E)^T q(X)     codes of X and W
    halo1          on X H, W H   as halo0               as halo0        X
    halo1-hq       on X H, W H   [q(E) q(W H)] H^T      q(E)^T q(X)     X
    halo1-hq-xh    on X H, W H   [q(E) q(W H)] H^T      [q(E)^T q(X H)] H^T   codes of X H
    halo2          on X H, W H   H [q(H^T E) q(W)]      q(E)^T q(X)     X       (H over tokens)
    halo2-xh       on X H, W H   H [q(H^T E) q(W H)] H^T  [q(E)^T q(X H)] H^T   codes of X H, W H
    halo2-hq-xh    the same                                             codes of X H

With hq FSDP gathers codes of W H with one scale, by a maximum over all shards, in place of 16-bit
weights: they are the working copy of a unit and not kept by layers. Without, weights are cast in
forward, and again in backward where their codes are not kept.

Rotating does nothing for fp8, whose relative error does not depend on size: there it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...errors import InputError
from ...hadamard import factor, near
from ...model import Layer, Model
from ..graph import Operator, Tensor
from ..halo_levels import LEVELS, cast_kind, weight_kind

__all__ = ["LEVELS", "cast_kind"]

COMPUTE = ("int8", "fp6", "fp4")
"""Formats of codes."""
EMULATED = ("fp6", "fp4")
"""Those that run in 16-bit matmuls: no device multiplies them with one scale per tensor."""
LINEARS = ("wq", "wk", "wv", "wo", "gate", "up", "down")


CODES = "int8"
"""Dtype of codes in ledgers: one byte in every format."""


def check(compute: str, recipe: str) -> None:
    """Raise InputError for a format and a recipe that do not go together."""
    if recipe in LEVELS and compute not in COMPUTE:
        if compute in ("fp8", "mxfp8", "nvfp4"):
            raise InputError("precision.recipe", recipe,
                             f"rotations gain nothing in {compute}: the relative error of floating-"
                             "point codes does not depend on size (3.8e-2 with and without, E4M3)",
                             "use recipe coat, tensorwise or rowwise, or compute int8")  # fmt: skip
        raise InputError("precision.recipe", recipe, f"all matmuls run in {compute}",
                         f"use compute {', '.join(COMPUTE)}, or leave it out")  # fmt: skip
    if compute in COMPUTE and recipe not in LEVELS:
        raise InputError("precision.recipe", recipe, f"does not scale {compute}",
                         f"use recipe {', '.join(LEVELS)}")  # fmt: skip


def lower(op: Operator, recipe: str, rate: str) -> Iterator[Operator]:
    """A linear on codes, behind the casts and rotations that are its own."""
    level, weight = LEVELS[recipe], op.weights[0]
    x = op.inputs[0]
    codes_of_x = replace(x, name=f"{x.name}.quantized", dtype=CODES)
    codes = replace(weight, name=f"{weight.name}.quantized", dtype=CODES)
    saves: list[Tensor] = []
    if weight.trainable:
        saves.append(codes_of_x if level.low_x else x)
    if level.low_weight and not level.gathers:
        saves.append(codes)
    if level.gathers:
        weight = replace(weight, dtype=CODES)
    yield Operator(
        name=f"{op.name}.quantize_weight",
        kind=weight_kind(recipe, trainable=weight.trainable),
        price_axes=op.price_axes,
        inputs=(weight,),
        outputs=(codes,),
        grad_inputs=False,
    )
    yield replace(op, compute=rate, saves=tuple(saves), weights=(weight, *op.weights[1:]))


def problem(
    model: Model, layer: Layer, recipe: str, linears: Sequence[str] | None, *, tp: int, tokens: int,
    shards: int,
) -> InputError | None:  # fmt: skip
    """Why the shapes of a layer cannot be rotated on a rank with this many tokens of a micro-batch,
    whose weights FSDP cuts into so many shards; None where they can."""
    level = LEVELS[recipe]
    if not model.is_decoder or layer.experts is not None or layer.latent is not None:
        return InputError("precision.recipe", recipe, f"{model.name} has layers that are no dense "
                          "decoder's", "use bf16, or another recipe")  # fmt: skip
    width, kv_width = layer.heads * layer.head_dim // tp, layer.kv_heads * layer.head_dim // tp
    ffn, hidden = layer.ffn_hidden // tp, model.hidden
    names = [name for name in linears or LINEARS if name in LINEARS]
    inner = {"wo": width, "down": ffn}
    out = {"wq": width, "wk": kv_width, "wv": kv_width, "gate": ffn, "up": ffn}
    for name in names if level.rotates else ():
        size = inner.get(name, hidden)
        if factor(size) is None:
            return _not_rotated(recipe, f"the input of {name} is {size} wide on a rank", size)
    if level.tokens and factor(tokens) is None:
        text = f"a rank's micro-batch has {tokens} tokens"
        return _not_rotated(recipe, text, tokens)
    for name in names if level.gathers else ():
        rows = out.get(name, hidden)
        if rows % shards:
            return InputError("precision.recipe", recipe, f"{shards} shards do not divide the "
                              f"{rows} rows of {name}", "change dp_shard or cp, or use a recipe "
                              "without hq")  # fmt: skip
    return None


def _not_rotated(recipe: str, text: str, size: int) -> InputError:
    below, above = near(size)
    return InputError("precision.recipe", recipe, f"{text}, which is no power of two times the "
                      f"order of a known Hadamard matrix (as {below} and {above} are)",
                      "change tp or the micro-batch, or use recipe halo0")  # fmt: skip
