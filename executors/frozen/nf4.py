"""NF4 (Dettmers et al. 2023, QLoRA, arXiv 2305.14314): 4-bit codes of quantiles of the normal
distribution, a scale per 64 weights of an output, and these scales in 8 bits themselves.

A block's scale is the largest magnitude in it. Scales are positive: 255 steps of the largest one of
256 blocks that follow one another in the whole matrix, which is kept in fp32. Codes are taken by
the scale as it is kept, so that its rounding costs little. A cut of the matrix, by outputs or by
whole blocks of inputs, has the codes and scales of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from ...kernels.dequantize import BLOCK, GROUP, PER_STEP

STEPS = 255


def code_values() -> tuple[float, ...]:
    """The 16 values in [-1, 1], 0 among them: 8 above it and 7 below, equally likely each.

    The outermost quantile is the mean of those of 15 and 16 values (QLoRA, section 3: the two
    halves are made by themselves, and one of the zeros is dropped).
    """
    outer = 1 - (1 / 30 + 1 / 32) / 2
    normal = NormalDist().inv_cdf

    def half(count: int) -> list[float]:
        step = (outer - 0.5) / count
        return [normal(outer - i * step) for i in range(count)]

    top, bottom = half(8), half(7)
    return tuple(x / top[0] for x in (*(-x for x in bottom), 0.0, *reversed(top)))


VALUES = code_values()


@dataclass(frozen=True, slots=True)
class Nf4:
    """A matrix (R, K) as codes (R, K/2) and scales (R, K/64), bytes, and fp32 scales as bytes."""

    codes: Tensor
    scales: Tensor
    groups: Tensor

    @staticmethod
    def of(weight: Tensor) -> Nf4:
        """The nearest codes of a matrix whose rows are whole blocks."""
        blocks = weight.float().unflatten(-1, (-1, BLOCK))
        largest = blocks.abs().amax(-1)
        padded = torch.nn.functional.pad(largest.flatten(), (0, -largest.numel() % GROUP))
        tops = padded.view(-1, GROUP).amax(-1)
        by_block = _spread(tops, largest.shape)
        scales = (largest / _not_zero(by_block) * STEPS).round_()
        scales = torch.where(largest > 0, scales.clamp_(min=1.0), 0.0)
        kept = scales * by_block * PER_STEP
        table = torch.tensor(VALUES, device=weight.device)
        between = (table[1:] + table[:-1]) / 2
        codes = torch.bucketize(blocks / _not_zero(kept)[..., None], between).flatten(-2)
        even, odd = codes[..., 0::2], codes[..., 1::2]
        return Nf4((even | (odd << 4)).to(torch.uint8), scales.to(torch.uint8),
                   tops.view(torch.uint8).clone())  # fmt: skip

    def cut(self, rows: slice, columns: slice) -> Nf4:
        """A part of the matrix, by whole blocks of columns; the fp32 scales stay whole."""
        return Nf4(self.codes[rows, _over(columns, 2)], self.scales[rows, _over(columns, BLOCK)],
                   self.groups)  # fmt: skip


def shapes(rows: int, columns: int, whole: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Of the bytes of a (rows, columns) part of a matrix."""
    num_groups = math.ceil(whole[0] * whole[1] / BLOCK / GROUP)
    return {"codes": (rows, columns // 2), "scales": (rows, columns // BLOCK),
            "groups": (4 * num_groups,)}  # fmt: skip


@cache
def table(device: torch.device) -> Tensor:
    """The 16 values on a device."""
    return torch.tensor(VALUES, device=device)


def _spread(tops: Tensor, shape: torch.Size) -> Tensor:
    """The value of its group for every block (R, K/64)."""
    return tops.repeat_interleave(GROUP)[: shape.numel()].view(shape)


def _not_zero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)


def _over(part: slice, size: int) -> slice:
    return slice(part.start // size, part.stop // size)
