"""Triton where it is installed, and the conversions of its values that all kernels here share.

Conversions to and from 8 and 16 bits are made on integers: one code path for every GPU (compute
capability 8.0 has no cast to E4M3), and the one that the interpreter runs in tests, whose own casts
round towards zero. A value is rounded to the nearest code, ties to even; what is beyond the largest
code becomes that code, NaN stays NaN.

No `from __future__ import annotations` here and in the kernels' modules: Triton reads annotations.
"""

import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

triton: Any
tl: Any
try:
    # a process without a GPU that is not here to interpret kernels saves their compiler's memory
    if torch.version.cuda is None and torch.version.hip is None and not INTERPRETED:
        raise ModuleNotFoundError("triton")
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # plain PyTorch references do without

    class Language:
        """Names that signatures need."""

        constexpr = int

    class Untranslated:
        """A decorator that leaves a kernel as it is; it cannot be launched."""

        @staticmethod
        def jit(function: Any) -> Any:
            return function

    tl, triton = Language, Untranslated
    AVAILABLE = False
else:
    AVAILABLE = True


def on_triton(x: torch.Tensor) -> bool:
    """Whether kernels run on a tensor's device: CUDA, with Triton installed."""
    return AVAILABLE and x.is_cuda


@triton.jit
def decode_e4m3(code):
    """fp32 of an E4M3 code (uint8)."""
    body = (code & 0x7F).to(tl.uint32)
    normal = ((body << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    size = tl.where(body < 8, body.to(tl.float32) * 0.001953125, normal)  # 2^-9
    size = tl.where(body == 0x7F, float("nan"), size)
    return tl.where(code > 0x7F, -size, size)


@triton.jit
def encode_e4m3(x):
    """E4M3 code (uint8) of fp32."""
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    of_size = size.to(tl.uint32, bitcast=True)
    normal = ((of_size + 0x7FFFF + ((of_size >> 20) & 1)) >> 20) - (120 << 3)
    # 2^14 + size has one unit of the subnormals, 2^-9, as its last place
    small = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def encode_e5m2(x):
    """E5M2 code (uint8) of fp32."""
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.minimum(tl.abs(x), 57344.0)
    of_size = size.to(tl.uint32, bitcast=True)
    normal = ((of_size + 0xFFFFF + ((of_size >> 21) & 1)) >> 21) - (112 << 2)
    small = (size + 128.0).to(tl.uint32, bitcast=True) - 0x43000000
    code = tl.where(size < 0.00006103515625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def bf16_bits(x):
    """Bits of bf16 (int16) nearest to fp32."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def from_bf16_bits(bits):
    """fp32 of bits of bf16 (int16)."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
