# pyright: reportInvalidTypeForm=false
"""Conversions to 8 and 16 bits in kernels: bit for bit those of torch, in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from forerun.kernels import compat
from forerun.kernels.compat import tl, triton

SPECIAL = [
    0.0, -0.0, 448.0, -448.0, 464.0, 465.0, 480.0, 1e30, 57344.0, 61440.0, 2.0**-9, 2.0**-10,
    1.5 * 2.0**-10, 2.0**-16, 2.0**-17, 1.5 * 2.0**-17, 2.0**-6, float("nan"), float("-inf"),
    float("inf"),
]  # fmt: skip


@triton.jit
def _encode_kernel(x_ptr, out_ptr, COUNT: tl.constexpr, KIND: tl.constexpr):
    at = tl.arange(0, COUNT)
    x = tl.load(x_ptr + at)
    if KIND == 0:
        tl.store(out_ptr + at, compat.encode_e4m3(x))
    elif KIND == 1:
        tl.store(out_ptr + at, compat.encode_e5m2(x))
    else:
        tl.store(out_ptr + at, compat.bf16_bits(x))


@triton.jit
def _decode_kernel(code_ptr, out_ptr, COUNT: tl.constexpr, IS_BF16: tl.constexpr):
    at = tl.arange(0, COUNT)
    code = tl.load(code_ptr + at)
    tl.store(out_ptr + at, compat.from_bf16_bits(code) if IS_BF16 else compat.decode_e4m3(code))


def values() -> Tensor:
    """2^17 numbers of every size that matters, and the special ones."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(2**17, generator=generator) * 2.0 ** torch.randint(
        -20, 18, (2**17,), generator=generator
    )
    spread[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return spread


@pytest.mark.parametrize(
    ("kind", "dtype", "largest"),
    [(0, torch.float8_e4m3fn, 448.0), (1, torch.float8_e5m2, 57344.0)],
)
def test_encoding_is_torchs(kind: int, dtype: torch.dtype, largest: float) -> None:
    """Beyond the largest number torch gives E5M2 infinities: here they saturate, as E4M3's do."""
    x = values()
    out = torch.empty(x.shape, dtype=torch.uint8)
    _encode_kernel[(1,)](x, out, COUNT=x.numel(), KIND=kind)
    expected = x.clamp(-largest, largest).to(dtype).view(torch.uint8)
    same = (out == expected) | (x.isnan() & (out & 0x7F == 0x7F))
    assert bool(same.all()), (x[~same][:5], out[~same][:5], expected[~same][:5])


def test_rounding_to_bf16_is_torchs() -> None:
    x = values()
    out = torch.empty(x.shape, dtype=torch.int16)
    _encode_kernel[(1,)](x, out, COUNT=x.numel(), KIND=2)
    expected = x.to(torch.bfloat16)
    same = (out == expected.view(torch.int16)) | (x.isnan() & out.view(torch.bfloat16).isnan())
    assert bool(same.all())


def test_every_code_decodes_as_in_torch() -> None:
    codes = torch.arange(256).to(torch.uint8)
    out = torch.empty(256)
    _decode_kernel[(1,)](codes, out, COUNT=256, IS_BF16=False)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_every_bf16_pattern_decodes_as_in_torch() -> None:
    bits = torch.arange(2**16).to(torch.int32).sub(2**15).to(torch.int16)
    out = torch.empty(bits.shape)
    _decode_kernel[(1,)](bits, out, COUNT=2**16, IS_BF16=True)
    expected = bits.view(torch.bfloat16).float()
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
