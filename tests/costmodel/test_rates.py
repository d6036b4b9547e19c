"""Rates of matmuls and attention: tiles, waves, inner dimensions, head sizes, kernel versions."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.catalogs import load_hardware
from forerun.catalogs.loader import load_stack
from forerun.cluster import Pool
from forerun.costmodel.rates import fill, rates
from forerun.stack import Stack


def pool(stack: Stack | None = None) -> Pool:
    hardware = load_hardware("A100-SXM-80GB")
    return Pool(
        name="a100",
        device=hardware.device,
        devices_per_node=8,
        intra_node=hardware.intra_node,
        stack=stack or load_stack("megatron-a100"),
    )


def shape(*sizes: float) -> list[np.ndarray]:
    return [np.array([float(size)]) for size in sizes]


def test_one_tile_too_many_takes_another_wave() -> None:
    """108 tiles of 128 x 256 fill an A100 once; the 109th waits for a wave of its own."""
    full, more = (
        fill(np.array([128.0 * 108]), np.array([256.0]), 108),
        fill(np.array([128.0 * 109]), np.array([256.0]), 108),
    )
    assert full[0] == 1.0
    assert more[0] == pytest.approx(max(109 / 216, 0.9 * 218 / 324))


@given(m=st.integers(1, 20000), n=st.integers(1, 20000), sms=st.sampled_from([80, 108, 132]))
def test_fill_is_a_fraction(m: int, n: int, sms: int) -> None:
    assert 0 < fill(np.array([float(m)]), np.array([float(n)]), sms)[0] <= 1


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 8), ("fp32", 4), ("fp8", 16)])
def test_weights_whose_rows_are_no_whole_vectors_are_slow(dtype: str, width: int) -> None:
    """A vocabulary of 50,257; what ranks do not divide is padded by whoever divides it."""
    whole = 50_304
    assert whole % width == 0

    def rate(out: float, inner: float) -> float:
        return float(rates("linear", shape(4096, out, inner), dtype, pool())[0][0])

    slow = pool().stack.misaligned
    assert rate(whole + 1, 4096) == pytest.approx(slow * rate(whole, 4096), rel=0.01)
    assert rate(4096, whole + 1) == pytest.approx(slow * rate(4096, whole), rel=0.01)
    assert rate(whole + 0.25, 4096) == pytest.approx(rate(whole, 4096), rel=0.01)


def test_half_of_the_rate_at_the_half_dimension() -> None:
    stack = msgspec.structs.replace(load_stack("megatron-a100"), tile_quantisation=0.0)
    half = stack.gemm_half_k
    there, _ = rates("linear", shape(8192, 8192, half), "bf16", pool(stack))
    endless, _ = rates("linear", shape(8192, 8192, 1e9), "bf16", pool(stack))
    assert there[0] / endless[0] == pytest.approx(0.5, rel=1e-5)
    # the weight gradient sums over tokens
    wgrad, _ = rates("linear_wgrad", shape(half, 8192, 8192), "bf16", pool(stack))
    assert wgrad[0] / endless[0] == pytest.approx(0.5, rel=1e-5)


def test_a_capped_device_is_slower_in_matmuls_and_attention_alike() -> None:
    whole = pool()
    capped = msgspec.structs.replace(
        whole, device=msgspec.structs.replace(whole.device, sustained_fraction=0.8)
    )
    for kind, sizes in (("linear", (4096, 4096, 4096)), ("attention", (32, 2048, 128))):
        fast, slow = (rates(kind, shape(*sizes), "bf16", p)[0][0] for p in (whole, capped))
        assert slow / fast == pytest.approx(0.8)


def test_small_heads_slow_attention() -> None:
    wide = rates("attention", shape(32, 2048, 128), "bf16", pool())[0][0]
    narrow = rates("attention", shape(32, 2048, 64), "bf16", pool())[0][0]
    assert narrow / wide == pytest.approx(0.5 ** pool().stack.attention_head_exponent)


def test_grouped_matmuls_pad_every_group() -> None:
    """64 experts with 32 rows each use a quarter of their tiles' rows."""
    one, _ = rates("linear", shape(2048, 1024, 4096), "bf16", pool())
    many, _ = rates("grouped_linear", shape(2048, 1024, 4096, 64), "bf16", pool())
    stack = pool().stack
    assert many[0] < one[0] * stack.expert_efficiency
