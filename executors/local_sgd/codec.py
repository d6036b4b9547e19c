"""Numbers in 4 or 8 bits with a scale per block, as they are sent between replicas.

A block of `BLOCK` elements has the scale s, its largest magnitude. In 4 bits an element is a sign
and a power of two, s 2^-k with k = 0 to 6, or zero (the format E3M0 of Streaming DiLoCo, arXiv
2501.18512); in 8 bits a whole number of s / 127. What comes back is off by at most

    4 bits   max(|x| / 3, s / 128)
    8 bits   s / 254

Encoded rows are uint8: all codes of the row, then its scales in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...local_sgd import BLOCK, SCALE_BYTES

LEVELS = 7
"""Powers of two of the 4-bit format, beside zero."""
SIGN = 8
INT8_MAX = 127.0


def encode(x_RN: Tensor, bits: int) -> Tensor:
    """Each row of N elements, a multiple of `BLOCK`, as N bits / 8 + N / BLOCK * 4 bytes.

    A block with a number that is not finite comes back with none that is: nothing is hidden.
    """
    x_RKB = x_RN.unflatten(-1, (-1, BLOCK))
    scale_RK = x_RKB.abs().amax(dim=-1)
    unit_RKB = x_RKB / torch.where(scale_RK == 0, 1.0, scale_RK).unsqueeze(-1)
    codes_RN = (_powers(unit_RKB) if bits == 4 else _integers(unit_RKB)).flatten(1)
    return torch.cat([codes_RN, scale_RK.view(torch.uint8)], dim=1)


def decode(bytes_RC: Tensor, bits: int) -> Tensor:
    """What `encode` was given, as far as its codes tell."""
    num_blocks = bytes_RC.shape[1] // (BLOCK * bits // 8 + SCALE_BYTES)
    codes_RC, scale_RC = bytes_RC.split(
        [num_blocks * BLOCK * bits // 8, num_blocks * SCALE_BYTES], dim=1
    )
    scale_RK = scale_RC.contiguous().view(torch.float32)
    if bits == 4:
        table = _values(bytes_RC.device)
        both_RC2 = torch.stack([codes_RC & 15, codes_RC >> 4], dim=-1)
        unit_RN = table[both_RC2.flatten(1).int()]
    else:
        unit_RN = codes_RC.contiguous().view(torch.int8).float() / INT8_MAX
    return (unit_RN.unflatten(-1, (-1, BLOCK)) * scale_RK.unsqueeze(-1)).flatten(1)


def _powers(unit_RKB: Tensor) -> Tensor:
    """Codes of numbers in [-1, 1], two to a byte: 0 is zero, c is 2^(c - LEVELS)."""
    exponents = torch.arange(1 - LEVELS, 1, device=unit_RKB.device)
    nearest = 0.75 * torch.exp2(exponents)  # half way from the power below
    nearest[0] = torch.exp2(-torch.tensor(float(LEVELS)))  # half way from zero
    magnitude = torch.bucketize(unit_RKB.abs().contiguous(), nearest, out_int32=True)
    codes = (magnitude + SIGN * (unit_RKB < 0)).to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _values(device: torch.device) -> Tensor:
    """The number of each 4-bit code."""
    powers = torch.exp2(torch.arange(-LEVELS, 1, device=device, dtype=torch.float32))
    powers[0] = 0.0
    return torch.cat([powers, -powers])


def _integers(unit_RKB: Tensor) -> Tensor:
    """Codes of numbers in [-1, 1]."""
    return (unit_RKB * INT8_MAX).round().to(torch.int8).view(torch.uint8)
