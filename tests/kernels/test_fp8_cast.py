"""Casts to 8-bit floats: kernels equal the references bit for bit, and these do what they say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forerun.kernels import fp8_cast
from forerun.kernels.fp8_cast import E4M3, E5M2, cast, pack_groups, unpack_groups, unpack_tensor

SHAPES = [(5, 123), (64, 64), (130, 80)]
DTYPES = [torch.float32, torch.bfloat16]


def data(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of many sizes, with a run of zeros."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    x = x * torch.exp(2 * torch.randn(shape, generator=generator))
    x[0, :40] = 0.0
    return x.to(dtype)


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Lets a test send CPU tensors to the kernels, which the interpreter runs."""
    return monkeypatch


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, for exact comparison."""
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_references(
    shape: tuple[int, int], dtype: torch.dtype, on_kernels: pytest.MonkeyPatch
) -> None:
    x = data(shape, dtype)
    casts = [cast(x, kind, transposed=True) for kind in (E4M3, E5M2)]
    codes, scales = pack_groups(x)
    back = unpack_groups(codes, scales, dtype)
    on_kernels.setattr(fp8_cast, "on_triton", lambda _: True)
    for kind, expected in zip((E4M3, E5M2), casts, strict=True):
        found = cast(x, kind, transposed=True)
        assert torch.equal(found.scale, expected.scale)
        for ours, theirs in (
            (found.codes_MK, expected.codes_MK),
            (found.codes_KM, expected.codes_KM),
        ):
            assert ours is not None and theirs is not None
            assert torch.equal(bits(ours), bits(theirs))
    our_codes, our_scales = pack_groups(x)
    assert torch.equal(bits(our_codes), bits(codes))
    assert torch.equal(bits(our_scales), bits(scales))
    assert torch.equal(unpack_groups(codes, scales, dtype), back)  # a zero may lose its sign


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fused", [False, True])
def test_overflow_is_not_hidden(value: float, fused: bool, on_kernels: pytest.MonkeyPatch) -> None:
    """One value that is not finite spoils its group, or its tensor, and nothing else."""
    x = torch.ones(4, 64)
    x[1, 20] = value
    if fused:
        on_kernels.setattr(fp8_cast, "on_triton", lambda _: True)
    with pytest.warns(RuntimeWarning) if fused else _nothing():
        back = unpack_groups(*pack_groups(x), torch.float32)
        whole = cast(x, E4M3)
    bad = torch.zeros(4, 64, dtype=torch.bool)
    bad[1, 16:32] = True
    assert bool((back.isnan() == bad).all())
    torch.testing.assert_close(back[~bad], x[~bad], rtol=2.0**-8, atol=0.0)
    assert whole.codes_MK is not None
    assert bool(unpack_tensor(whole.codes_MK, whole.scale, torch.float32).isnan().all())


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_zeros_stay_zeros(kind: torch.dtype) -> None:
    x = torch.zeros(3, 20)
    found = cast(x, kind)
    assert found.codes_MK is not None
    assert torch.equal(unpack_tensor(found.codes_MK, found.scale, torch.float32), x)
    assert torch.equal(unpack_groups(*pack_groups(x), torch.float32), x)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 70),
    size=st.floats(-30, 30),
    seed=st.integers(0, 2**31 - 1),
)
def test_errors_are_within_half_a_unit_of_the_largest(
    rows: int, width: int, size: float, seed: int
) -> None:
    """E4M3 has 4 significant bits: 2^-4 of a value, 2^-4 of the group's largest at most, and the
    largest of a group keeps its place up to the rounding of its scale to bf16."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * 2.0**size
    back = unpack_groups(*pack_groups(x), torch.float32)
    top = x.abs().amax(1, keepdim=True)
    assert bool(((back - x).abs() <= 2.0**-4 * top * 1.01).all())
    close = x.abs() >= 2.0**-5 * top
    assert bool(((back - x).abs()[close] <= 0.0665 * x.abs()[close]).all())
    assert bool((torch.sign(back) * torch.sign(x) >= 0).all())


def test_bytes_are_a_ninth_more_than_one_per_element() -> None:
    codes, scales = pack_groups(data((32, 160), torch.bfloat16))
    assert codes.element_size() == 1 and scales.dtype is torch.bfloat16
    stored = codes.numel() + scales.numel() * scales.element_size()
    assert stored == 1.125 * 32 * 160


def test_groups_beat_one_scale_on_heavy_tails() -> None:
    """silu(g) u of Gaussians: relative Frobenius error 2.6e-2 per tensor, 1.6e-2 in groups of 16
    (measured)."""
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 256, 1024, generator=generator)
    x = torch.nn.functional.silu(gate) * up
    whole = cast(x, E4M3)
    assert whole.codes_MK is not None
    by_tensor = unpack_tensor(whole.codes_MK, whole.scale, torch.float32)
    by_group = unpack_groups(*pack_groups(x), torch.float32)
    errors = [float((back - x).norm() / x.norm()) for back in (by_tensor, by_group)]
    assert errors == pytest.approx([2.64e-2, 1.60e-2], rel=0.05)
