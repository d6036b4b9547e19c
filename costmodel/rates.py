"""Rates of matmuls and attention in FLOP/s from the constants of a device and a software stack.

A GEMM of (M, N, K) runs at

    peak * sustained * clock * efficiency * K / (K + K0) * fill(M, N)^w

with what the device sustains, its clock under a power limit, the efficiency of the dtype, K0 the
inner dimension of half the rate, and `fill` the part of the device that its tiles occupy: output
tiles are padded to whole tiles and come in waves of one tile per streaming multiprocessor, so that
a last wave that is nearly empty takes as long as a full one. The library picks the tile, hence the
best of a few.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..cluster import DTYPE_BYTES, Device, Pool
from ..stack import Stack
from .graph import Array

TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9))
"""(rows, columns, relative rate): the large tiles of vendor libraries; the smaller one reuses less
of what it loads."""
TILE_ROWS, TILE_COLUMNS, TILE_RATE = (column[:, None] for column in np.array(TILES).T)
LOW_PRECISION = ("fp8", "fp4", "int8")
HEAD_REFERENCE = 128.0
ALIGNED_BYTES = 16
"""Rows of a matrix that start at multiples of this are loaded in whole vectors (NVIDIA, Matrix
Multiplication Background: requirements to use tensor cores)."""
ONE = np.ones(1)


def is_matmul(kind: str) -> bool:
    """Whether an operator kind is a GEMM: linears, grouped ones of experts, convolutions."""
    return kind.startswith(("linear", "grouped", "conv"))


def is_compute(kind: str) -> bool:
    """Whether an operator kind does FLOPs that count: GEMMs and attention."""
    return is_matmul(kind) or kind.startswith("attention")


def rates(kind: str, sizes: Sequence[Array], dtype: str, pool: Pool) -> tuple[Array, Array]:
    """FLOP/s of a matmul's or an attention's forward and backward; `sizes` as in `KINDS`."""
    device, stack = pool.device, pool.stack
    peak = peak_flops_per_s(device, dtype) * device.sustained_fraction * device.clock_fraction
    if is_matmul(kind):
        rate = peak * _efficiency(stack, dtype)
        if kind.startswith("grouped"):
            rate = rate * stack.expert_efficiency
        half = _half_k(stack, dtype)
        tokens, out, inner = sizes[0], sizes[1], sizes[2]
        if device.num_sms is not None and not kind.startswith("conv"):
            whole = _aligned(out, dtype) & _aligned(inner, dtype)
            rate = rate * np.where(whole, 1.0, stack.misaligned)
        if kind.endswith("_wgrad"):
            return rate * gemm_factor(out, inner, tokens, half, stack, device), rate + 0.0 * tokens
        groups = sizes[3] if kind.startswith("grouped") else np.ones(1)
        forward = gemm_factor(tokens, out, inner, half, stack, device, groups)
        backward = gemm_factor(tokens, inner, out, half, stack, device, groups)
        return rate * forward, rate * backward
    if kind.startswith("attention_unfused"):
        shape = np.minimum(1.0, sizes[-1] / HEAD_REFERENCE) ** 0.3
        rate = peak * stack.unfused_attention_efficiency * shape
        return rate, rate
    shape = np.minimum(1.0, sizes[2] / HEAD_REFERENCE) ** stack.attention_head_exponent
    rate = peak * shape
    return rate * stack.attention_forward_efficiency, rate * stack.attention_backward_efficiency


def peak_flops_per_s(device: Device, dtype: str) -> float:
    """The device's dense peak for a dtype; for one that it lacks, its fastest 16-bit or any."""
    peaks = device.peak_flops_per_s
    return peaks.get(dtype) or peaks.get("bf16") or peaks.get("fp16") or max(peaks.values())


def _efficiency(stack: Stack, dtype: str) -> float:
    if dtype == "int8" and dtype not in stack.gemm_efficiency:
        dtype = "fp8"  # assumed: the same tiles and the same bytes
    return stack.gemm_efficiency.get(dtype, 0.7)


def _half_k(stack: Stack, dtype: str) -> float:
    if dtype in LOW_PRECISION and stack.low_precision_half_k is not None:
        return stack.low_precision_half_k
    return stack.gemm_half_k


def _aligned(width: Array, dtype: str) -> NDArray[np.bool_]:
    """Whether rows of so many elements start at whole vectors; parts of a number that ranks do not
    divide are taken as aligned, since whoever divides it pads it."""
    element_bytes = 2.0 ** np.floor(np.log2(DTYPE_BYTES[dtype]))  # without its scales
    return (width % (ALIGNED_BYTES / element_bytes) == 0) | (width % 1 != 0)


def gemm_factor(
    m: Array,
    n: Array,
    k: Array,
    half_k: float,
    stack: Stack,
    device: Device,
    groups: Array = ONE,
) -> Array:
    """Rate of a GEMM relative to an endless one; `m` rows in all, in `groups` equal GEMMs."""
    depth = k / (k + half_k)
    if stack.tile_quantisation == 0.0 or device.num_sms is None:
        return depth
    return depth * fill(m, n, device.num_sms, groups) ** stack.tile_quantisation


def fill(m: Array, n: Array, num_sms: int, groups: Array = ONE) -> Array:
    """Part of the device that the output tiles of an (m, n) GEMM occupy, with the best tile.

    With several groups of m / groups rows each, all tiles share the waves.

    >>> fill(np.array([128.0 * 108]), np.array([256.0]), 108).round(6).tolist()
    [1.0]
    """
    down, across = groups * np.ceil(m / groups / TILE_ROWS), np.ceil(n / TILE_COLUMNS)
    tiles = down * across
    padded = (m / TILE_ROWS / down) * (n / TILE_COLUMNS / across)
    waves = np.ceil(tiles / num_sms)
    return np.max(TILE_RATE * padded * tiles / (waves * num_sms), axis=0)
