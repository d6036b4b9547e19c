# pyright: reportInvalidTypeForm=false
"""Hadamard rotations, and casts of rotated matrices to 8 bits and below with one scale per tensor.

    rotate(x) = x H / sqrt(n)     along the last dimension, H H^T = n I      (`forerun.hadamard`)
    scale = max |x| / largest,    code = round(x / scale) to the nearest code, ties to even

with codes of int8 (up to 127), and of fp6 (E2M3, up to 7.5) and fp4 (E2M1, up to 6), which no
device here multiplies: their codes are held in E4M3, which has every one of them exactly. Codes of
zeros are zeros. One value that is not finite makes the scale NaN, and so all that is decoded:
nothing hides an overflow.

A rotation along n = 2^m p is a product with the block H_p, then m butterflies in fp32 (in the
references products with several of them). As a cast it
reads its input twice, for the maximum and for the codes, and never writes what it rotated: 5 bytes
per 16-bit element, as without rotation.

On CUDA kernels run, one program per row (int8, and rotations whose 2^m is 16 or more where p > 1);
elsewhere the plain references.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import InputError
from ..hadamard import block, factor, near
from .compat import INTERPRETED, bf16_bits, on_triton, tl, triton
from .fp8_cast import E4M3, LEAST_SCALE, Cast, chunks, largest


@dataclass(frozen=True)
class Format:
    """Codes with one scale."""

    largest: float
    mantissa: int
    """Bits after the leading one, of floats."""
    least_exponent: int
    """Of normal floats: below, codes are equally far apart."""

    @property
    def codes(self) -> torch.dtype:
        """What holds them."""
        return E4M3 if self.mantissa else torch.int8


FORMATS: dict[str, Format] = {
    "int8": Format(largest=127.0, mantissa=0, least_exponent=0),
    "fp6": Format(largest=7.5, mantissa=3, least_exponent=0),
    "fp4": Format(largest=6.0, mantissa=1, least_exponent=0),
}


def rotate(x: Tensor, *, back: bool = False) -> Tensor:
    """x H / sqrt(n) along the last dimension, in the dtype of x; `back` undoes it."""
    flat = x.contiguous().view(-1, x.shape[-1])
    out = torch.empty_like(flat)
    if _fused(flat):
        _launch(flat, back, VALUES, out=out)
    else:
        for rows in chunks(*flat.shape):
            out[rows] = _rotated(flat[rows], back).to(x.dtype)
    return out.view(x.shape)


def top(x_MK: Tensor, *, rotated: bool) -> Tensor:
    """The largest |value| of a matrix, or of the rotated one: 0-dim fp32, NaN where one is not
    finite."""
    if rotated and _fused(x_MK):
        tops = torch.empty(x_MK.shape[0], dtype=torch.float32, device=x_MK.device)
        _launch(x_MK.contiguous(), False, TOP, tops=tops)
    elif rotated:
        parts = [_rotated(x_MK[rows], False).abs().amax() for rows in chunks(*x_MK.shape)]
        tops = torch.stack(parts)
    else:
        tops = largest(x_MK)
    found = tops.amax()
    return torch.where(found.isfinite(), found, torch.nan)


def scale_of(found: Tensor, name: str) -> Tensor:
    """The scale of a tensor by its largest value."""
    limit = FORMATS[name].largest
    return found.clamp(min=LEAST_SCALE * limit) / limit


def cast_low(
    x_MK: Tensor, name: str, scale: Tensor | None = None, *, rotated: bool = False,
    plain: bool = True, transposed: bool = False,
) -> Cast:  # fmt: skip
    """A matrix, rotated along its last dimension where so asked, as codes of a format.

    The scale is that of its largest value unless given. `transposed` asks for the codes in the
    other order as well, `plain` for them as they lie.
    """
    if scale is None:
        scale = scale_of(top(x_MK, rotated=rotated), name)
    if name == "int8" and (_fused(x_MK) if rotated else on_triton(x_MK)):
        codes_MK = torch.empty(x_MK.shape, dtype=torch.int8, device=x_MK.device)
        if rotated:
            _launch(x_MK.contiguous(), False, CODES, scale=scale, codes=codes_MK)
        else:
            _launch_cast(x_MK.contiguous(), scale, codes_MK)
    else:
        codes_MK = _cast_reference(x_MK, FORMATS[name], scale, rotated)
    codes_KM = turned(codes_MK) if transposed else None
    return Cast(codes_MK if plain else None, codes_KM, scale)


def turned(codes_MK: Tensor) -> Tensor:
    """Codes in the other order; bytes are copied, because few operators know 8-bit floats."""
    return codes_MK.view(torch.uint8).t().contiguous().view(codes_MK.dtype)


def values_of(codes: Tensor, scale: Tensor) -> Tensor:
    """fp32 that codes and a scale stand for."""
    return codes.float() * scale


def _cast_reference(x_MK: Tensor, kind: Format, scale: Tensor, rotated: bool) -> Tensor:
    codes = torch.empty(x_MK.shape, dtype=kind.codes, device=x_MK.device)
    to_code = _rounded(kind)
    for rows in chunks(*x_MK.shape):
        x = _rotated(x_MK[rows], False) if rotated else x_MK[rows].float()
        x = (x / scale).nan_to_num_(0.0, 0.0, 0.0).clamp_(-kind.largest, kind.largest)
        codes[rows] = to_code(x).to(kind.codes)
    return codes


def _rounded(kind: Format) -> Callable[[Tensor], Tensor]:
    """To the nearest code, ties to even, of values that are in range."""
    if not kind.mantissa:
        return torch.round

    def to_code(x: Tensor) -> Tensor:
        exponent = torch.frexp(x).exponent - 1
        step = torch.exp2(exponent.clamp(min=kind.least_exponent).float() - kind.mantissa)
        return torch.round(x / step) * step

    return to_code


@lru_cache(maxsize=64)
def matrix(order: int, back: bool, device: torch.device) -> Tensor:
    """The block of an order, fp32; transposed on the way back."""
    found = torch.tensor(block(order), dtype=torch.float32, device=device)
    return found.t().contiguous() if back else found


MOST_AT_ONCE = 64
"""Power of two that the reference rotates by one product."""


@lru_cache(maxsize=16)
def powers(size: int, device: torch.device) -> Tensor:
    """The matrix of a power of two, fp32."""
    found = torch.ones(1, 1, device=device)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device)
    while len(found) < size:
        found = torch.kron(pair, found)
    return found


def sizes(size: int) -> tuple[int, int]:
    """The block's order and the power of two of a size; raises InputError where there is none."""
    found = factor(size)
    if found is None:
        below, above = near(size)
        raise InputError("hadamard", size, "is no power of two times the order of a known matrix",
                         f"use a size such as {below} or {above}, or recipe halo0")  # fmt: skip
    return found


def _rotated(x_RK: Tensor, back: bool) -> Tensor:
    """The rotated rows in fp32: the block, then the powers of two some at a time, as products."""
    order, rest = sizes(x_RK.shape[1])
    x = x_RK.float()
    if order > 1:
        x = matrix(order, back, x.device).t() @ x.view(-1, order, rest)
    outer, inner = rest, 1
    while outer > 1:
        some = min(outer, MOST_AT_ONCE)
        outer //= some
        turn = powers(some, x.device)
        if inner == 1:
            x = x.reshape(-1, some) @ turn
        else:
            x = turn @ x.reshape(-1, some, inner)
        inner *= some
    return (x * (order * rest) ** -0.5).view(x_RK.shape)


# Kernels: a program holds one row, as (order, 2^m) with the order filled up to a power of two.

VALUES, TOP, CODES = 0, 1, 2
CAST_BLOCK = 4096
MOST_COLUMNS = 32768
"""Of a row that a program holds."""


def _fused(x_RK: Tensor) -> bool:
    """Whether a kernel rotates these rows."""
    if not on_triton(x_RK):
        return False
    order, rest = sizes(x_RK.shape[1])
    return ((order == 1 and rest >= 2) or rest >= 16) and x_RK.shape[1] <= MOST_COLUMNS


def _launch(
    x_RK: Tensor, back: bool, what: int, out: Tensor | None = None, tops: Tensor | None = None,
    scale: Tensor | None = None, codes: Tensor | None = None,
) -> None:  # fmt: skip
    """One of: rotated values, the largest of each row, codes by a scale."""
    rows, columns = x_RK.shape
    order, rest = sizes(columns)
    block_of = matrix(order, back, x_RK.device)
    whole = triton.next_power_of_2(order) if order > 1 else 1
    is_bf16 = out is not None and out.dtype == torch.bfloat16
    if is_bf16 and out is not None:
        out = out.view(torch.int16)
    _rotate_kernel[(rows,)](
        x_RK, block_of, x_RK if out is None else out, block_of if tops is None else tops,
        block_of if scale is None else scale, x_RK if codes is None else codes,
        order, float(columns) ** -0.5,
        WHAT=what, IS_BF16=is_bf16, WHOLE=whole, REST=rest, STEPS=rest.bit_length() - 1,
        WIDE=INTERPRETED or x_RK.dtype == torch.float32, SOME=min(whole, 32),
        num_warps=8 if columns > 4096 else 4,
    )  # fmt: skip


@triton.jit
def _to_int8(x):
    """Codes of fp32, nearest, ties to even; NaN is 0."""
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -127.0), 127.0), 0.0)
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23 leaves no fraction


@triton.jit
def _rotate_kernel(
    x_ptr, block_ptr, out_ptr, tops_ptr, scale_ptr, codes_ptr, order, shrink,
    WHAT: tl.constexpr, IS_BF16: tl.constexpr, WHOLE: tl.constexpr, REST: tl.constexpr,
    STEPS: tl.constexpr, WIDE: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, WHOLE)
    at = row * order * REST + part[:, None] * REST + tl.arange(0, REST)[None, :]
    inside = (part < order)[:, None]
    if WHOLE == 1:
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    else:  # the block, some of its rows at a time: shared memory does not hold the largest whole
        x = tl.zeros((WHOLE, REST), dtype=tl.float32)
        for first in tl.static_range(0, WHOLE, SOME):
            some = first + tl.arange(0, SOME)
            known = (part < order)[:, None] & (some < order)[None, :]
            turn = tl.load(block_ptr + some[None, :] * order + part[:, None], mask=known, other=0.0)
            from_row = row * order * REST + some[:, None] * REST + tl.arange(0, REST)[None, :]
            own = tl.load(x_ptr + from_row, mask=(some < order)[:, None], other=0.0)
            if WIDE:
                x += tl.dot(turn, own.to(tl.float32), input_precision="ieee")
            else:  # both are exact in 16 bits
                x += tl.dot(turn.to(tl.bfloat16), own.to(tl.bfloat16))
    for _ in tl.static_range(STEPS):
        low, high = tl.split(tl.reshape(x, (WHOLE, REST // 2, 2)))
        both = tl.join(low + high, low - high)
        x = tl.reshape(tl.permute(both, (0, 2, 1)), (WHOLE, REST))
    x = x * shrink
    if WHAT == 0:
        tl.store(out_ptr + at, bf16_bits(x) if IS_BF16 else x, mask=inside)
    if WHAT == 1:
        size = tl.where(inside, tl.where(x != x, float("inf"), tl.abs(x)), 0.0)
        tl.store(tops_ptr + row, tl.max(tl.max(size, axis=1), axis=0))
    if WHAT == 2:
        tl.store(codes_ptr + at, _to_int8(tl.div_rn(x, tl.load(scale_ptr))), mask=inside)


def _launch_cast(x: Tensor, scale: Tensor, codes: Tensor) -> None:
    _cast_kernel[(triton.cdiv(x.numel(), CAST_BLOCK),)](
        x, scale, codes, x.numel(), BLOCK=CAST_BLOCK, num_warps=8
    )


@triton.jit
def _cast_kernel(x_ptr, scale_ptr, codes_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(codes_ptr + at, _to_int8(tl.div_rn(x, tl.load(scale_ptr))), mask=at < count)
