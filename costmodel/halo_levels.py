"""What the recipes of HALO (`techniques/halo.py`) rotate, keep and gather, and what that moves.

Traffic of casts in bytes per element of 16 bits: 5 with the codes in one order, rotated or not (two
reads and a write, `forerun.kernels.hadamard`), 2 more for the other order, 4 for a rotation alone,
4 for a transposed copy. A product of int8 codes comes in int32 and is scaled by a kernel of its
own: 8 bytes per element of its result. The additions of a rotation, log2 K per element, hide behind
that traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .graph import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What a recipe rotates, keeps and gathers."""

    rotates: bool = True
    """Whether forward multiplies rotated operands."""
    tokens: bool = False
    """Whether the gradient of the input comes from one rotated along tokens."""
    low_weight: bool = False
    """Whether backward reads the weight's codes of forward."""
    low_x: bool = False
    """Whether the input is kept as its codes of forward."""
    gathers: bool = False
    """Whether FSDP gathers codes of the weights."""


LEVELS: dict[str, Level] = {
    "halo0": Level(rotates=False, low_weight=True, low_x=True),
    "halo1": Level(),
    "halo1-hq": Level(low_weight=True, gathers=True),
    "halo1-hq-xh": Level(low_weight=True, low_x=True, gathers=True),
    "halo2": Level(tokens=True),
    "halo2-xh": Level(tokens=True, low_weight=True, low_x=True),
    "halo2-hq-xh": Level(tokens=True, low_weight=True, low_x=True, gathers=True),
}


def cast_kind(recipe: str) -> str:
    """Operator kind of the casts of inputs and of output gradients."""
    return f"quantize_{recipe}"


def weight_kind(recipe: str, *, trainable: bool = True) -> str:
    """Operator kind of what each linear does besides: (tokens, out, in)."""
    return f"quantize_weight_{recipe}" + ("" if trainable else "_frozen")


def gradient_bytes(level: Level) -> float:
    """Of the casts of an output's gradient, per element: in both orders, and rotated along tokens
    behind a transposed copy, in one."""
    return 7.0 + ((4.0 + 5.0 + 2.0) if level.tokens else 0.0)


def beside_bytes(level: Level, sizes: Sequence[Array], trainable: bool) -> tuple[Array, Array]:
    """Traffic of one linear's casts of its weight, rotations back and scalings, forward and
    backward."""
    tokens, out, inner = sizes
    y, x, w = tokens * out, tokens * inner, out * inner
    there = 8.0 * y + (0.0 if level.gathers else 5.0 * w)
    back = 8.0 * x + (2.0 if level.low_weight else 7.0) * w
    if level.tokens:
        back = back + (4.0 + 4.0 + 4.0) * x
    if level.low_weight and level.rotates:
        back = back + 4.0 * x
    if trainable:
        back = back + 8.0 * w + (2.0 if level.low_x else 7.0) * x
        if level.low_x and level.rotates:
            back = back + 4.0 * w
    return there, back
