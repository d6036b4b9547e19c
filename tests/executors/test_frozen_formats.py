"""Formats of frozen weights, and GPTQ against rounding to nearest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from forerun.errors import InputError
from forerun.executors.frozen import nf4
from forerun.executors.frozen.gptq import Moments, quantize
from forerun.executors.frozen.grid import Format, round_to_nearest
from forerun.executors.frozen.stored import Stored
from forerun.kernels import bits as packing


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(bits=st.sampled_from([2, 3, 4]), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_codes_come_back_from_their_bytes(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (3, count), generator=generator).to(torch.uint8)
    packed = packing.pack(codes, bits)
    assert packed.shape == (3, packing.packed_bytes(count, bits))
    assert torch.equal(packing.unpack(packed, bits, count).to(torch.uint8), codes)


def stored(base: str, weight: Tensor) -> Stored:
    """All of a matrix in a format."""
    rows, columns = weight.shape
    found = Stored(base, rows, columns, (rows, columns), (0, 0)).to_empty(device="cpu")
    for name, part in found.bytes_of(weight).items():
        found.get_parameter(name).copy_(part)
    return found


def test_codes_of_nf4_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, section 3: 16 values from -1 to 1 with an exact zero, 7 below it and 8 above."""
    values = nf4.VALUES
    assert values[0] == -1.0 and values[7] == 0.0 and values[15] == 1.0
    assert list(values) == sorted(values)
    weights = normal(1, 64 * 2000)
    blocks = weights.view(-1, 64)
    codes = torch.bucketize(
        blocks / blocks.abs().amax(1, keepdim=True),
        torch.tensor([(a + b) / 2 for a, b in zip(values[1:], values, strict=False)]),
    )
    share = torch.bincount(codes.flatten(), minlength=16) / codes.numel()
    assert float(share[1:15].min()) > 0.03 and float(share.max()) < 0.1  # 1/16 each, about


def test_nf4_is_closer_than_even_steps() -> None:
    """Of normal weights scaled by the largest of 64: the mean square is less than with 15 even
    steps, although scales have 8 bits."""
    weight = normal(256, 512)
    error = float((stored("nf4", weight).weight(torch.float32) - weight).square().mean())
    step = weight.unflatten(1, (-1, 64)).abs().amax(-1).repeat_interleave(64, 1) / 7
    even = float(((weight / step).round() * step - weight).square().mean())
    assert error < 0.85 * even


@given(rows=st.integers(1, 40), blocks=st.integers(1, 12), seed=st.integers(0, 99))
def test_parts_of_nf4_are_those_of_the_whole(rows: int, blocks: int, seed: int) -> None:
    weight = normal(2 * rows, 64 * 2 * blocks, seed=seed)
    shape = (2 * rows, 64 * 2 * blocks)
    whole = stored("nf4", weight).weight(torch.float32)
    for first, size in (((rows, 0), (rows, shape[1])), ((0, 64 * blocks), (shape[0], 64 * blocks))):
        part = Stored("nf4", *size, shape, first).to_empty(device="cpu")
        for name, found in part.bytes_of(weight).items():
            part.get_parameter(name).copy_(found)
        expected = whole[first[0] : first[0] + size[0], first[1] : first[1] + size[1]]
        assert torch.equal(part.weight(torch.float32), expected)


@pytest.mark.parametrize("base", ["nf4", "gptq4_g32", "gptq3_g32", "gptq2_g64"])
def test_zeros_and_small_weights_keep_their_place(base: str) -> None:
    """Blocks of zeros come back as zeros, beside a block 2^20 times smaller than another."""
    weight = normal(4, 256)
    weight[0] = 0.0
    weight[1, :64], weight[2, 64:128] = 0.0, weight[2, 64:128] * 2.0**-20
    found = stored(base, weight).weight(torch.float32)
    assert float(found[0].abs().max()) == 0.0 and float(found[1, :64].abs().max()) == 0.0
    assert bool(torch.isfinite(found).all())
    if base.startswith("gptq4"):
        small = slice(64, 128)
        assert float((found - weight)[2, small].abs().max()) < float(weight[2, small].abs().max())


@pytest.mark.parametrize("base", ["gptq4_g64", "gptq3_g32", "gptq2_g32"])
def test_rounding_is_within_half_a_step(base: str) -> None:
    form, weight = Format.of(base), normal(24, 128)
    found = round_to_nearest(weight, form)
    step = found.grids.scale.repeat_interleave(form.group, 1)
    assert bool(((found.values() - weight).abs() <= 0.5 * step * (1 + 2e-3) + 1e-6).all())
    assert torch.equal(stored(base, weight).weight(torch.float32), found.values())


# GPTQ.


def correlated(columns: int = 96, rows: int = 4096) -> Tensor:
    """Inputs (rows, columns) that a few directions share, of unequal sizes."""
    mixed = normal(rows, 24, seed=1) @ normal(24, columns, seed=2)
    sizes = torch.linspace(0.2, 3.0, columns)[torch.randperm(columns, generator=torch.Generator()
                                                             .manual_seed(3))]  # fmt: skip
    return (mixed + 0.3 * normal(rows, columns, seed=4)) * sizes


def moments_of(x: Tensor) -> Tensor:
    found = Moments(x.shape[1], x.device)
    for part in x.chunk(3):
        found.add(part)
    return found.matrix


def output_error(x: Tensor, weight: Tensor, values: Tensor) -> float:
    return float((x @ (values - weight).T).square().sum() / (x @ weight.T).square().sum())


WEIGHT = normal(48, 96)


def test_moments_are_twice_the_mean_of_outer_products() -> None:
    x = correlated()
    assert torch.allclose(moments_of(x), 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(
    "options", [{}, {"act_order": True}, {"act_order": True, "static_groups": True}], ids=str
)
def test_error_is_a_fifth_less_than_of_rounding(bits: int, options: dict[str, bool]) -> None:
    x = correlated()
    found = quantize("w", WEIGHT, moments_of(x), bits, 32, **options)
    nearest = round_to_nearest(WEIGHT, Format(bits=bits, group=32)).values()
    assert output_error(x, WEIGHT, found.values) < 0.8 * output_error(x, WEIGHT, nearest)


def test_with_unrelated_inputs_it_rounds_to_nearest() -> None:
    found = quantize("w", WEIGHT, torch.eye(96), 4, 32)
    nearest = round_to_nearest(WEIGHT, Format(bits=4, group=32))
    assert torch.equal(found.codes, nearest.codes)
    assert torch.allclose(found.values, nearest.values(), atol=1e-6)


@pytest.mark.parametrize("group", [None, 32])
def test_blocks_change_nothing(group: int | None) -> None:
    h = moments_of(correlated())
    one, many = (quantize("w", WEIGHT, h, 4, group, block=size).values for size in (1, 128))
    assert float((one - many).norm() / many.norm()) < 1e-5


@pytest.mark.parametrize("static", [False, True])
def test_the_order_of_columns_is_undone(static: bool) -> None:
    """Columns that are shuffled, and inputs with them, give shuffled codes."""
    h = moments_of(correlated())
    shuffle = torch.randperm(96, generator=torch.Generator().manual_seed(5))
    plain = quantize("w", WEIGHT, h, 4, act_order=True, static_groups=static)
    mixed = quantize("w", WEIGHT[:, shuffle], h[shuffle][:, shuffle], 4, act_order=True,
                     static_groups=static)  # fmt: skip
    assert float((plain.values[:, shuffle] - mixed.values).norm() / mixed.values.norm()) < 1e-5
    scale = plain.grids.scale[:, plain.group_of]
    zero = plain.grids.zero[:, plain.group_of]
    assert torch.allclose((plain.codes - zero) * scale, plain.values)


def test_inputs_that_are_always_zero_have_no_weight() -> None:
    x = correlated()
    x[:, [3, 40]] = 0.0
    found = quantize("w", WEIGHT, moments_of(x), 4, 32)
    assert float(found.values[:, [3, 40]].abs().max()) == 0.0
    assert bool(torch.isfinite(found.values).all())


def test_few_samples_are_enough() -> None:
    """Moments of 5 samples have rank 5: damping makes them positive."""
    found = quantize("w", WEIGHT, moments_of(correlated(rows=5)), 4, 32)
    assert bool(torch.isfinite(found.values).all())


def test_bad_input_is_told() -> None:
    h = moments_of(correlated())
    with pytest.raises(InputError, match=r"^group=36: does not divide the 96 inputs of wq \(48 x"):
        quantize("wq", WEIGHT, h, 4, 36)
    broken = WEIGHT.clone()
    broken[1, 2] = math.nan
    with pytest.raises(InputError, match=r"^base=wq: has weights that are not finite"):
        quantize("wq", broken, h, 4, 32)
    h[0, 0] = math.inf
    with pytest.raises(InputError, match=r"^data=wq: has inputs on the calibration text"):
        quantize("wq", WEIGHT, h, 4, 32)
