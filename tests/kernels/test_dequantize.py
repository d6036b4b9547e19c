"""Frozen weights of few bits: kernels equal the references bit for bit."""

import pytest
import torch
from torch import Tensor

from forerun.kernels import bits as packing
from forerun.kernels import dequantize

DTYPES = [torch.float32, torch.bfloat16]


def random(high: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=generator).to(torch.uint8)


def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends CPU tensors to the kernels, which the interpreter runs."""
    monkeypatch.setattr(dequantize, "on_triton", lambda _: True)
    monkeypatch.setattr(dequantize, "PROGRAM", 256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "blocks", "whole", "first"),
                         [(5, 3, 3, (0, 0)), (7, 2, 6, (130, 3))])  # fmt: skip
def test_nf4_kernel_equals_the_reference(
    rows: int, blocks: int, whole: int, first: tuple[int, int], dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    codes, scales = random(256, rows, 32 * blocks), random(256, rows, blocks, seed=1)
    tops = torch.rand(4, generator=torch.Generator().manual_seed(2)) * 3
    table = torch.linspace(-1.0, 1.0, 16)
    expected = dequantize.nf4(codes, scales, tops, table, whole, first, dtype)
    on_kernels(monkeypatch)
    assert torch.equal(dequantize.nf4(codes, scales, tops, table, whole, first, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grid_kernel_equals_the_reference(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, groups, group = 13, 3, 32
    columns = groups * group
    codes = random(2**bits, rows, columns)
    zero = random(2**bits, rows, groups, seed=1)
    scale = torch.rand(rows, groups, generator=torch.Generator().manual_seed(2)).half()
    zeros = packing.pack(zero.t().contiguous(), bits).t().contiguous()
    args = (packing.pack(codes, bits), scale, zeros, bits, group, columns, dtype)
    expected = dequantize.grid(*args)
    exact = (codes.float() - zero.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
    assert torch.equal(expected, exact.to(dtype))
    on_kernels(monkeypatch)
    assert torch.equal(dequantize.grid(*args), expected)
