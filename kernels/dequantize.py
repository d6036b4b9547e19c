# pyright: reportInvalidTypeForm=false
"""Frozen weights of few bits as the matrices that they stand for.

    NF4     w = table[code] scale top / 255    an 8-bit scale per 64 inputs, an fp32 top per 256 of
                                               these in the order of the whole matrix
    grids   w = (code - zero) scale            B bits, an fp16 scale and a zero of B bits per group

Codes of B bits lie one behind the other (`bits.py`); those of zeros run along the outputs. fp32
throughout, rounded once to the dtype of use. One read of the bytes and one write of the matrix on
CUDA; elsewhere the plain references, so many rows at a time as make a chunk.
"""

import torch
from torch import Tensor

from .bits import unpack
from .compat import bf16_bits, on_triton, tl, triton
from .fp8_cast import chunks

BLOCK, GROUP = 64, 256
"""Weights of an NF4 scale, and scales of a top."""
PER_STEP = 1.0 / 255.0
CHUNK_ELEMENTS = 1 << 15
"""What a reference works on at a time."""
PROGRAM = 1024
"""Elements of a kernel's program."""


def nf4(
    codes: Tensor, scales: Tensor, tops: Tensor, table: Tensor, blocks: int, first: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The part (R, K) from row and block `first` of a matrix with `blocks` blocks per row.

    codes (R, K/2) and scales (R, K/64) uint8, tops fp32 of the whole matrix, table (16,) fp32.
    """
    out = torch.empty(codes.shape[0], 2 * codes.shape[1], dtype=dtype, device=codes.device)
    run = _nf4_fused if on_triton(codes) else _nf4_reference
    run(out, codes, scales, tops, table, blocks, first)
    return out


def _nf4_reference(
    out: Tensor, codes: Tensor, scales: Tensor, tops: Tensor, table: Tensor, blocks: int,
    first: tuple[int, int],
) -> None:  # fmt: skip
    byte = torch.arange(256, device=codes.device)
    pairs = torch.stack((table[byte & 15], table[byte >> 4]), -1)
    count = scales.shape[1]
    for rows in chunks(out.shape[0], out.shape[1], CHUNK_ELEMENTS):
        part = codes[rows]
        row = torch.arange(rows.start, rows.start + len(part), device=codes.device)[:, None]
        index = (first[0] + row) * blocks + first[1] + torch.arange(count, device=codes.device)
        scale = scales[rows] * tops[index // GROUP] * PER_STEP
        values = pairs.index_select(0, part.flatten().int()).view(len(part), count, BLOCK)
        out[rows] = values.mul_(scale[..., None]).flatten(-2).to(out.dtype)


def grid(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int, columns: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The matrix (R, columns) of codes (R, bytes) uint8, scales (R, G) fp16, zeros (bytes, G)."""
    out = torch.empty(codes.shape[0], columns, dtype=dtype, device=codes.device)
    run = _grid_fused if on_triton(codes) else _grid_reference
    run(out, codes, scales, zeros, bits, group)
    return out


def _grid_reference(
    out: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int
) -> None:
    columns = out.shape[1]
    zero_RG = unpack(zeros.t(), bits, out.shape[0]).t()
    for rows in chunks(out.shape[0], out.shape[1], CHUNK_ELEMENTS):
        part = unpack(codes[rows], bits, columns).unflatten(-1, (-1, group)).float()
        values = part.sub_(zero_RG[rows][..., None]).mul_(scales[rows].float()[..., None])
        out[rows] = values.flatten(-2).to(out.dtype)


# Kernels. A program has so many elements of the flat matrix, a byte is read by all codes in it.


def _stored(out: Tensor) -> Tensor:
    """The matrix as the kernels write it."""
    return out.view(torch.int16) if out.dtype == torch.bfloat16 else out


def _nf4_fused(
    out: Tensor, codes: Tensor, scales: Tensor, tops: Tensor, table: Tensor, blocks: int,
    first: tuple[int, int],
) -> None:  # fmt: skip
    _nf4_kernel[(triton.cdiv(out.numel(), PROGRAM),)](
        codes, scales, tops, table, _stored(out), out.numel(), out.shape[1], blocks, *first,
        IS_BF16=out.dtype == torch.bfloat16, PER_STEP=PER_STEP, BLOCK=BLOCK, GROUP=GROUP,
        PROGRAM=PROGRAM, num_warps=4,
    )  # fmt: skip


@triton.jit
def _nf4_kernel(
    codes_ptr, scales_ptr, tops_ptr, table_ptr, out_ptr, count, columns, blocks, first_row,
    first_block, IS_BF16: tl.constexpr, PER_STEP: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, PROGRAM: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * PROGRAM + tl.arange(0, PROGRAM)
    inside = at < count
    row, column = at // columns, at % columns
    byte = tl.load(codes_ptr + at // 2, mask=inside, other=0).to(tl.int32)
    code = (byte >> (4 * (at % 2)).to(tl.int32)) & 15
    scale = tl.load(scales_ptr + at // BLOCK, mask=inside, other=0).to(tl.float32)
    index = ((row + first_row) * blocks + first_block + column // BLOCK) // GROUP
    scale = scale * tl.load(tops_ptr + index, mask=inside, other=0.0) * PER_STEP
    x = tl.load(table_ptr + code) * scale
    tl.store(out_ptr + at, bf16_bits(x) if IS_BF16 else x, mask=inside)


def _grid_fused(
    out: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int
) -> None:
    _grid_kernel[(triton.cdiv(out.numel(), PROGRAM),)](
        codes, scales, zeros, _stored(out), out.numel(), out.shape[1], codes.shape[1],
        scales.shape[1], zeros.shape[0], IS_BF16=out.dtype == torch.bfloat16, BITS=bits,
        GROUP=group, PROGRAM=PROGRAM, num_warps=4,
    )  # fmt: skip


@triton.jit
def _grid_kernel(
    codes_ptr, scales_ptr, zeros_ptr, out_ptr, count, columns, row_bytes, per_row, zero_rows,
    IS_BF16: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PROGRAM: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * PROGRAM + tl.arange(0, PROGRAM)
    inside = at < count
    row, column = at // columns, at % columns
    group = column // GROUP
    bit = column * BITS  # a code of 3 bits may end in the next byte
    first = row * row_bytes + bit // 8
    low = tl.load(codes_ptr + first, mask=inside, other=0).to(tl.int32)
    more = inside & (bit // 8 + 1 < row_bytes)
    high = tl.load(codes_ptr + first + 1, mask=more, other=0).to(tl.int32)
    code = ((low | (high << 8)) >> (bit % 8).to(tl.int32)) & ((1 << BITS) - 1)
    bit = row * BITS
    first = (bit // 8) * per_row + group
    low = tl.load(zeros_ptr + first, mask=inside, other=0).to(tl.int32)
    more = inside & (bit // 8 + 1 < zero_rows)
    high = tl.load(zeros_ptr + first + per_row, mask=more, other=0).to(tl.int32)
    zero = ((low | (high << 8)) >> (bit % 8).to(tl.int32)) & ((1 << BITS) - 1)
    scale = tl.load(scales_ptr + row * per_row + group, mask=inside, other=0.0).to(tl.float32)
    x = (code - zero).to(tl.float32) * scale
    tl.store(out_ptr + at, bf16_bits(x) if IS_BF16 else x, mask=inside)
