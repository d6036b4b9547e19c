"""Codes of 2, 3 or 4 bits in bytes.

Codes lie one behind the other in the last dimension, the first in the lowest bits: so many codes
fill so many bytes, 4 in 1, 8 in 3 or 2 in 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES = {2: 4, 3: 8, 4: 2}
"""Codes of that many bits that fill whole bytes."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of so many codes; the last ones may be padding.

    >>> packed_bytes(64, 3), packed_bytes(3, 4)
    (24, 2)
    """
    codes = CODES[bits]
    return -(-count // codes) * codes * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., N) uint8 below 2^bits as bytes (..., `packed_bytes(N)`), padded with zeros."""
    count = codes.shape[-1]
    filled = torch.nn.functional.pad(codes, (0, -count % CODES[bits])).int()
    each = filled.unflatten(-1, (-1, CODES[bits]))
    word = (each << _steps(CODES[bits], bits, codes.device)).sum(-1, dtype=torch.int32)
    width = CODES[bits] * bits // 8
    split = word[..., None] >> _steps(width, 8, codes.device)
    return (split & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes (..., count), whole numbers, of bytes (..., B)."""
    width = CODES[bits] * bits // 8
    word = packed
    if width > 1:
        each = packed.unflatten(-1, (-1, width)).int()
        word = (each << _steps(width, 8, packed.device)).sum(-1, dtype=torch.int32)
    steps = _steps(CODES[bits], bits, packed.device).to(word.dtype)
    codes = (word[..., None] >> steps).bitwise_and_(2**bits - 1)
    return codes.flatten(-2)[..., :count]


def _steps(count: int, bits: int, device: torch.device) -> Tensor:
    """0, bits, 2 bits, ... to shift by."""
    return torch.arange(0, count * bits, bits, dtype=torch.int32, device=device)
