"""Bytes that a stack keeps per parameter, and whether matmuls read copies made unit by unit.

Per trained parameter there are the parameter itself, a gradient, an fp32 master copy where the
parameter has 16 bits, and the moments of its optimiser:

    stack                          parameter  gradient  master  moments (AdamW)
    fsdp (ours, torchtitan)            4          4        0       8
    megatron (mixed precision)         2        4 or 2     4       8
    16-bit throughout (torchtune)      2          2        0       4

Optimisers with other formats have other moments (`moment_bytes.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from numpy import bool_
from numpy.typing import NDArray

from ..cluster import DTYPE_BYTES
from ..stack import Stack
from .layout import Layouts
from .moment_bytes import moment_rate, moved_rate
from .options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """Bytes per parameter."""

    used: float
    """As the matmuls use it."""
    parameter: float
    gradient: float
    optimizer: float
    """Master copy and moments."""
    updated: float
    """Master copy and moments as an update moves them."""

    @property
    def update_share(self) -> float:
        """Traffic of an update relative to AdamW in fp32: parameters, master copies and moments are
        read and written, gradients read."""
        moved = 2 * self.parameter + self.gradient + 2 * self.updated
        return moved / (2 * 4.0 + 4.0 + 2 * 8.0)

    @staticmethod
    def of(stack: Stack, options: Options) -> StateBytes:
        """The bytes that a stack keeps under an optimiser."""
        used = DTYPE_BYTES[options.tensor_dtype]
        whole = stack.sharding == "megatron"
        own_parameter = used if whole else 4.0
        parameter = own_parameter if stack.parameter_bytes is None else stack.parameter_bytes
        own_master = 4.0 if whole and parameter < 4 else 0.0
        master = own_master if stack.master_bytes is None else stack.master_bytes
        return StateBytes(
            used=used,
            parameter=parameter,
            gradient=4.0 if stack.gradient_bytes is None else stack.gradient_bytes,
            optimizer=master + moment_rate(options.optimizer, stack),
            updated=master + moved_rate(options.optimizer, stack),
        )


def in_units(layouts: Layouts, options: Options, stack: Stack) -> NDArray[bool_]:
    """Whether parameters are used as copies made unit by unit: sharded ones, or ones that lie in
    another dtype."""
    if stack.sharding == "megatron":
        return layouts.zero >= 3
    states = StateBytes.of(stack, options)
    return (layouts.zero > 0) | (states.parameter != states.used)
