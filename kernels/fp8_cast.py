# pyright: reportInvalidTypeForm=false
"""Casts to 8-bit floats: with one scale per tensor for matmuls, one per 16 neighbours for storage.

    per tensor   scale = max |x| / largest,   code = fp8(x / scale)         fp32 scale
    per group    the same over 16 neighbours of the last dimension          bf16 scale

`largest` is 448 for E4M3 and 57344 for E5M2. Groups may be incomplete at the end of a row. Codes of
zeros are zeros. One value that is not finite makes its whole tensor (or group) decode to NaN, so
that nothing hides an overflow. 1.125 bytes per element with groups, as in COAT (Xi et al. 2024,
arXiv 2410.19313), 1 with one scale.

Matmuls on Hopper want both operands with the contracted dimension last, so that an operand of two
matmuls is needed in two orders: `cast` writes either or both in one pass over its input.

On CUDA kernels run, each value read once after the maximum is known; elsewhere the plain
references.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat import (
    bf16_bits,
    decode_e4m3,
    encode_e4m3,
    encode_e5m2,
    from_bf16_bits,
    on_triton,
    tl,
    triton,
)

GROUP = 16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
LEAST_SCALE = 2.0**-100
"""Of what is zero throughout, so that nothing is divided by zero; bf16 has it exactly."""


@dataclass(frozen=True)
class Cast:
    """A matrix (M, K) in 8 bits: its codes in one or both orders, and its scale (0-dim fp32)."""

    codes_MK: Tensor | None
    codes_KM: Tensor | None
    scale: Tensor


def largest(x: Tensor) -> Tensor:
    """The largest |value| of a tensor, 0-dim fp32; not finite where one is not."""
    return _top_kernel_run(x) if on_triton(x) else x.abs().amax().float()


def tensor_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of a whole tensor, 0-dim fp32."""
    return largest(x).clamp(min=LEAST_SCALE * LARGEST[dtype]) / LARGEST[dtype]


def cast(
    x_MK: Tensor, dtype: torch.dtype, scale: Tensor | None = None, *, plain: bool = True,
    transposed: bool = False,
) -> Cast:  # fmt: skip
    """A matrix with one scale, which is that of its largest value unless given."""
    if scale is None:
        scale = tensor_scale(x_MK, dtype)
    run = _cast_fused if on_triton(x_MK) else _cast_reference
    return run(x_MK, dtype, scale, plain, transposed)


CHUNK_ELEMENTS = 1 << 15
"""What a reference works on at a time, so that its fp32 temporaries stay small."""


def chunks(rows: int, columns: int, elements: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Slices of so many rows as make a chunk."""
    each = max(1, elements // max(columns, 1))
    return (slice(start, start + each) for start in range(0, rows, each))


def _cast_reference(
    x_MK: Tensor, dtype: torch.dtype, scale: Tensor, plain: bool, transposed: bool
) -> Cast:
    top = LARGEST[dtype]
    codes_MK = torch.empty(x_MK.shape, dtype=dtype, device=x_MK.device)
    for rows in chunks(*x_MK.shape):
        codes_MK[rows] = (x_MK[rows].float() / scale).clamp_(-top, top).to(dtype)
    # bytes are copied, because few operators know 8-bit floats
    codes_KM = codes_MK.view(torch.uint8).t().contiguous().view(dtype) if transposed else None
    return Cast(codes_MK if plain else None, codes_KM, scale)


def num_groups(width: int) -> int:
    """Groups of a row."""
    return -(-width // GROUP)


def pack_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., C) of E4M3 and scales (..., ceil(C / 16)) bf16."""
    x = x.contiguous()
    width = x.shape[-1]
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scales = torch.empty(*x.shape[:-1], num_groups(width), dtype=torch.bfloat16, device=x.device)
    run = _pack_fused if on_triton(x) else _pack_reference
    run(x.view(-1, width), codes.view(-1, width), scales.view(-1, scales.shape[-1]))
    return codes, scales


def _pack_reference(x_RC: Tensor, codes_RC: Tensor, scales_RG: Tensor) -> None:
    width = x_RC.shape[1]
    missing = scales_RG.shape[1] * GROUP - width
    for rows in chunks(*x_RC.shape):
        x_RGN = F.pad(x_RC[rows].float(), (0, missing)).unflatten(1, (-1, GROUP))
        top_RG = x_RGN.abs().amax(-1)
        scales = (top_RG.clamp_(min=LEAST_SCALE * 448.0) / 448.0).to(torch.bfloat16)
        codes = (x_RGN / scales.float()[..., None]).clamp_(-448.0, 448.0)
        codes_RC[rows] = codes.flatten(1)[:, :width].to(E4M3)
        scales_RG[rows] = scales


def unpack_groups(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that codes and scales stand for."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    width = codes.shape[-1]
    run = _unpack_fused if on_triton(codes) else _unpack_reference
    run(codes.view(-1, width), scales.view(-1, scales.shape[-1]), out.view(-1, width))
    return out


def _unpack_reference(codes_RC: Tensor, scales_RG: Tensor, out_RC: Tensor) -> None:
    width = codes_RC.shape[1]
    for rows in chunks(*codes_RC.shape):
        wide = scales_RG[rows].float().repeat_interleave(GROUP, -1)[:, :width]
        out_RC[rows] = wide.mul_(codes_RC[rows].float()).to(out_RC.dtype)


def unpack_tensor(codes_RC: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that codes with one scale stand for."""
    if codes_RC.is_cuda:
        return (codes_RC.float() * scale).to(dtype)
    out_RC = torch.empty(codes_RC.shape, dtype=dtype)
    for rows in chunks(*codes_RC.shape):
        out_RC[rows] = codes_RC[rows].float().mul_(scale).to(dtype)
    return out_RC


# Kernels. Tiles of 64 x 64 for casts, of 64 groups for storage.

TILE = 64
BLOCK_GROUPS = 64
TOP_BLOCK = 4096


def _top_kernel_run(x: Tensor) -> Tensor:
    """The largest |x|; NaN where there is one. Maxima of blocks first, then theirs."""
    flat = x.contiguous().view(-1)
    blocks = triton.cdiv(flat.numel(), TOP_BLOCK)
    tops = torch.empty(blocks, dtype=torch.float32, device=x.device)
    _top_kernel[(blocks,)](flat, tops, flat.numel(), BLOCK=TOP_BLOCK, num_warps=8)
    return tops.amax()


@triton.jit
def _top_kernel(x_ptr, tops_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    top = tl.max(tl.where(x != x, float("inf"), tl.abs(x)), axis=0)
    tl.store(tops_ptr + tl.program_id(0), top)


def _cast_fused(
    x_MK: Tensor, dtype: torch.dtype, scale: Tensor, plain: bool, transposed: bool
) -> Cast:
    x_MK = x_MK.contiguous()
    rows, columns = x_MK.shape
    codes_MK = torch.empty(rows, columns, dtype=dtype, device=x_MK.device) if plain else None
    codes_KM = torch.empty(columns, rows, dtype=dtype, device=x_MK.device) if transposed else None
    some = codes_MK if codes_MK is not None else codes_KM
    assert some is not None, "a cast in no order"
    grid = (triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))
    _cast_kernel[grid](
        x_MK, scale, (codes_MK if codes_MK is not None else some).view(torch.uint8),
        (codes_KM if codes_KM is not None else some).view(torch.uint8), rows, columns,
        PLAIN=plain, TRANSPOSED=transposed, IS_E4M3=dtype == E4M3, TILE=TILE, num_warps=4,
    )  # fmt: skip
    return Cast(codes_MK, codes_KM, scale)


@triton.jit
def _cast_kernel(
    x_ptr, scale_ptr, codes_ptr, transposed_ptr, rows, columns,
    PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr, IS_E4M3: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.div_rn(x, tl.load(scale_ptr))
    codes = encode_e4m3(x) if IS_E4M3 else encode_e5m2(x)
    if PLAIN:
        tl.store(codes_ptr + at, codes, mask=inside)
    if TRANSPOSED:
        at = column[:, None] * rows + row[None, :]
        inside = (column < columns)[:, None] & (row < rows)[None, :]
        tl.store(transposed_ptr + at, tl.trans(codes), mask=inside)


def _pack_fused(x_RC: Tensor, codes_RC: Tensor, scales_RG: Tensor) -> None:
    _pack_kernel[(triton.cdiv(scales_RG.numel(), BLOCK_GROUPS),)](
        x_RC, codes_RC.view(torch.uint8), scales_RG.view(torch.int16), scales_RG.numel(),
        x_RC.shape[1], scales_RG.shape[1],
        LEAST=LEAST_SCALE * 448.0, BLOCK=BLOCK_GROUPS, GROUP=GROUP, num_warps=4,
    )  # fmt: skip


@triton.jit
def _pack_kernel(
    x_ptr, codes_ptr, scales_ptr, num_groups, width, per_row,
    LEAST: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = group < num_groups
    column = (group % per_row)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = exists[:, None] & (column < width)
    at = (group // per_row)[:, None] * width + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    top = tl.max(tl.where(x != x, float("inf"), tl.abs(x)), axis=1)
    bits = bf16_bits(tl.div_rn(tl.maximum(top, LEAST), 448.0))
    codes = encode_e4m3(tl.div_rn(x, from_bf16_bits(bits)[:, None]))
    tl.store(codes_ptr + at, codes, mask=inside)
    tl.store(scales_ptr + group, bits, mask=exists)


def _unpack_fused(codes_RC: Tensor, scales_RG: Tensor, out_RC: Tensor) -> None:
    is_bf16 = out_RC.dtype == torch.bfloat16
    _unpack_kernel[(triton.cdiv(scales_RG.numel(), BLOCK_GROUPS),)](
        codes_RC.view(torch.uint8), scales_RG.view(torch.int16),
        out_RC.view(torch.int16) if is_bf16 else out_RC, scales_RG.numel(), codes_RC.shape[1],
        scales_RG.shape[1], IS_BF16=is_bf16, BLOCK=BLOCK_GROUPS, GROUP=GROUP, num_warps=4,
    )  # fmt: skip


@triton.jit
def _unpack_kernel(
    codes_ptr, scales_ptr, out_ptr, num_groups, width, per_row,
    IS_BF16: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = group < num_groups
    column = (group % per_row)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = exists[:, None] & (column < width)
    at = (group // per_row)[:, None] * width + column
    scale = from_bf16_bits(tl.load(scales_ptr + group, mask=exists, other=0))
    x = decode_e4m3(tl.load(codes_ptr + at, mask=inside, other=0)) * scale[:, None]
    tl.store(out_ptr + at, bf16_bits(x) if IS_BF16 else x, mask=inside)
