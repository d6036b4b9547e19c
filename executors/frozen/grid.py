"""Matrices on uniform grids: B bits per weight, a scale and a zero per G inputs of an output.

    w = (q - zero) scale        0 <= q, zero < 2^B

Grids run from the least to the largest weight of their group, 0 among them, so that zeros stay
zeros. Scales are kept in fp16, and codes are taken by the scale as it is kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.bits import pack, packed_bytes, unpack

LEAST_SCALE = 2.0**-24
"""The smallest number in fp16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """`gptqB_gG` in numbers."""

    bits: int
    group: int

    @staticmethod
    def of(base: str) -> Format:
        """The format of a storage of frozen weights.

        >>> Format.of("gptq3_g64")
        Format(bits=3, group=64)
        """
        match = re.fullmatch(r"gptq(\d)_g(\d+)", base)
        assert match is not None, base
        return Format(bits=int(match[1]), group=int(match[2]))


@dataclass(frozen=True, slots=True)
class Grids:
    """Scale and zero of every group, (R, K/G), both fp32."""

    scale: Tensor
    zero: Tensor

    @staticmethod
    def of(groups: Tensor, bits: int) -> Grids:
        """The grids of groups of weights (..., G)."""
        low = groups.amin(-1).clamp(max=0.0)
        high = groups.amax(-1).clamp(min=0.0)
        empty = high == low
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        steps = 2**bits - 1
        scale = ((high - low) / steps).clamp(min=LEAST_SCALE).half().float()
        return Grids(scale, (-low / scale).round().clamp(0, steps))

    def codes(self, weight: Tensor, bits: int) -> Tensor:
        """The nearest codes of weights of the shape of the grids."""
        return (weight / self.scale + self.zero).round().clamp(0, 2**bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes of the shape of the grids stand for."""
        return (codes - self.zero) * self.scale


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix by codes (R, K), uint8, and its grids."""

    codes: Tensor
    grids: Grids

    def values(self) -> Tensor:
        """The matrix (R, K), fp32."""
        size = self.codes.shape[1] // self.grids.scale.shape[1]
        scale, zero = (x.repeat_interleave(size, 1) for x in (self.grids.scale, self.grids.zero))
        return (self.codes - zero) * scale

    def cut(self, rows: slice, columns: slice) -> Quantized:
        """A part of the matrix, by whole groups of columns."""
        size = self.codes.shape[1] // self.grids.scale.shape[1]
        groups = slice(columns.start // size, columns.stop // size)
        scale, zero = (x[rows, groups] for x in (self.grids.scale, self.grids.zero))
        return Quantized(self.codes[rows, columns], Grids(scale, zero))


def round_to_nearest(weight: Tensor, form: Format) -> Quantized:
    """Every weight on the nearest point of its group's grid."""
    groups = weight.float().unflatten(-1, (-1, form.group))
    grids = Grids.of(groups, form.bits)
    wide = Grids(grids.scale[..., None], grids.zero[..., None])
    return Quantized(wide.codes(groups, form.bits).flatten(-2).to(torch.uint8), grids)


def shapes(rows: int, columns: int, form: Format) -> dict[str, tuple[int, ...]]:
    """Of the bytes of a matrix: zeros are packed along the outputs."""
    groups = columns // form.group
    return {"codes": (rows, packed_bytes(columns, form.bits)), "scales": (rows, 2 * groups),
            "zeros": (packed_bytes(rows, form.bits), groups)}  # fmt: skip


def packed(found: Quantized, form: Format) -> dict[str, Tensor]:
    """The bytes."""
    zeros = found.grids.zero.to(torch.uint8).t().contiguous()
    return {
        "codes": pack(found.codes, form.bits),
        "scales": found.grids.scale.half().contiguous().view(torch.uint8),
        "zeros": pack(zeros, form.bits).t().contiguous(),
    }


def unpacked(parts: dict[str, Tensor], rows: int, columns: int, form: Format) -> Quantized:
    """The matrix of its bytes."""
    codes = unpack(parts["codes"], form.bits, columns).to(torch.uint8)
    zeros = unpack(parts["zeros"].t(), form.bits, rows).t().float()
    return Quantized(codes, Grids(parts["scales"].view(torch.float16).float(), zeros))
