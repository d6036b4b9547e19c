"""Bytes of an optimiser's moments, tensor by tensor.

Of AdamW per trained tensor of n local elements in r rows, both moments together; torchao's formats
hold where n >= 4096 and the block divides n:

    adamw             8 n
    adamw8bit         2 n + 2 (4 n / 256) + 2 tables of 256 fp32 numbers     torchao
    adamw4bit           n + 2 (4 n / 128) + 2 tables of 16                   torchao
    adamw_fp8_block   2 n + 2 (4 n / 256)                                    torchao
    adamw_fp8         2 n + 2 (12 r ceil(n / r / 128)), rows of 128 or more  COAT, `kernels/`
    adamw_offload     nothing on the device where n >= 4096                  torchao
    sgd               nothing (without momentum)

What keeps no other format has moments in the parameter's dtype: 8 n in fp32. Layouts: torchao
0.18.0, optim/adam.py, subclass_8bit.py, subclass_4bit.py, subclass_fp8.py and cpu_offload.py; COAT
(arXiv 2410.19313).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..stack import Stack
from .graph import Array

FP32_MOMENTS = 8.0
LEAST_ELEMENTS = 4096
"""Of a tensor in torchao's formats, and of one that its offload takes from the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How moments are stored, both together."""

    codes: float
    """Bytes per element."""
    group: int = 1
    """Elements that share constants."""
    constants: float = 0.0
    """Bytes per group."""
    table: float = 0.0
    """Bytes per tensor."""
    least: int = LEAST_ELEMENTS
    """Elements of a local tensor, or of a row where groups lie within rows."""
    by_row: bool = False

    @property
    def rate(self) -> float:
        """Bytes per element of a large tensor."""
        return self.codes + self.constants / self.group


FORMATS: dict[str, Format] = {
    "adamw8bit": Format(codes=2, group=256, constants=2 * 4, table=2 * 256 * 4),
    "adamw4bit": Format(codes=1, group=128, constants=2 * 4, table=2 * 16 * 4),
    "adamw_fp8_block": Format(codes=2, group=256, constants=2 * 4),
    "adamw_fp8": Format(codes=2, group=128, constants=2 * 3 * 4, least=128, by_row=True),
    "adamw_offload": Format(codes=0),
}


def moment_rate(optimizer: str, stack: Stack) -> float:
    """Bytes per element of both moments at rest, but for rounding, tables and small tensors."""
    if optimizer == "sgd":
        return 0.0
    return FORMATS[optimizer].rate if optimizer in FORMATS else stack.moment_bytes


def moved_rate(optimizer: str, stack: Stack) -> float:
    """Bytes per element of both moments that a step reads, and writes again.

    One kernel moves them as they are stored; a stack without such kernels unpacks them in memory on
    the way, which moves what it saves.
    """
    if optimizer == "sgd":
        return 0.0
    packed = optimizer in FORMATS and stack.packed_updates
    return moment_rate(optimizer, stack) if packed else stack.moment_bytes


def moment_bytes(
    optimizer: str,
    rows: Array,
    columns: Array,
    *,
    is_matrix: bool = True,
    plain: float = FP32_MOMENTS,
) -> Array:
    """Bytes of both moments of one local tensor of (rows, columns).

    `plain` is what an element of a tensor takes that keeps no format.

    >>> float(moment_bytes("adamw_fp8", np.array([4096.0]), np.array([4096.0]))[0]) / 4096**2
    2.1875
    >>> float(moment_bytes("adamw8bit", np.array([64.0]), np.array([60.0]))[0]) / (64 * 60)
    8.0
    """
    elements = rows * columns
    if optimizer == "sgd":
        return 0.0 * elements
    if optimizer not in FORMATS:
        return plain * elements
    form = FORMATS[optimizer]
    if form.by_row:
        groups = rows * np.ceil(columns / form.group)
        has = (columns >= form.least) & is_matrix
    else:
        groups = elements / form.group
        first = np.ceil(rows) * columns  # of the first rank, where ranks share rows unevenly
        has = (first >= form.least) & (first % form.group == 0)
    stored = form.codes * elements + form.constants * groups + form.table
    return np.where(has, stored, plain * elements)
