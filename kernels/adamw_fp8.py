# pyright: reportInvalidTypeForm=false
"""AdamW whose moments are kept in 8 bits, with a range expanded group by group.

Moments spread over few powers of two within a group, far fewer than E4M3 covers, so that most codes
stay unused. Before it is stored, a group of 128 values x is raised to a power k that stretches its
range to that of the format (Xi et al. 2024, COAT, arXiv 2410.19313):

    top, low = largest and smallest |x| > 0,  R = top / low,  c = sqrt(top low)
    k        = floor(16 log2(448^2 / 2) / log2 R) / 16,  within 1/16 and 64
    s        = (top / c)^k / 448
    code     = E4M3(sign(x) (|x| / c)^k / s),   x' = sign(y) |y|^(1/k) c  with  y = code s

The largest value has the code 448. A group of zeros has codes of zero; a zero, and what is below
the smallest normal number of fp32, decodes to zero. R = 1 would make k infinite: k stops at 64.

Groups are 128 neighbours along a row of the parameter (dim 0 counts rows, all other dims make one
up); the last one of a row may be shorter. So a parameter that is cut between rows has its groups
cut between as well, and the codes do not depend on how. State per parameter of (rows, columns):

    codes   uint8, (rows, columns)                      bits of E4M3
    groups  fp32,  (rows, ceil(columns / 128), 3)       s, k, c

2 (1 + 3 * 4 / 128) = 2.1875 bytes per parameter for both moments in place of 8.

The arithmetic of a step is in fp32, on moments before they are rounded; the parameter is written in
its own dtype. A group whose gradient is not finite keeps parameter and moments, and is counted.

`step` runs the fused kernel on CUDA: it reads and writes every code once, 16 bytes of parameter,
gradient and codes per element and 0.4 of groups. Elsewhere the plain reference runs, some rows at
a time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat import bf16_bits, decode_e4m3, encode_e4m3, from_bf16_bits, on_triton, tl, triton
from .fp8_cast import chunks

GROUP = 128
E4M3_MAX = 448.0
LOG2_RANGE = math.log2(E4M3_MAX * E4M3_MAX / 2)
"""Target range: from 448 down to the middle of the subnormals' first steps, 448 / 2^16.6."""
STEPS_PER_UNIT = 16
LEAST_EXPONENT, LARGEST_EXPONENT = 1 / STEPS_PER_UNIT, 64.0
SMALLEST = 2.0**-126
CHUNK_ELEMENTS = 1 << 17
"""What the reference works on at a time."""
BELOW_SMALLEST = 2.0**-126 - 2.0**-149


def num_groups(columns: int) -> int:
    """Groups of a row."""
    return -(-columns // GROUP)


def pack(x_RC: Tensor, *, expand: bool = True) -> tuple[Tensor, Tensor]:
    """Codes (R, C) uint8 and groups (R, G, 3) fp32 of fp32 values.

    Without `expand` the plain format: k = 1, c = 1 and s = top / 448.
    """
    x_RGN = _grouped(x_RC)
    size = F.threshold(x_RGN.abs(), BELOW_SMALLEST, 0.0, inplace=True)
    top = size.amax(-1)
    if expand:
        low = size.masked_fill(size == 0, math.inf).amin(-1).minimum(top)
        empty = top == 0
        one = torch.ones_like(top)
        top, low = torch.where(empty, one, top), torch.where(empty, one, low)
        octaves = (top.log2() - low.log2()).clamp_(min=1e-3)
        exponent = (LOG2_RANGE / octaves * STEPS_PER_UNIT).floor_() / STEPS_PER_UNIT
        exponent = exponent.clamp_(LEAST_EXPONENT, LARGEST_EXPONENT)
        centre = top.sqrt() * low.sqrt()
        scale = ((top / centre).log2_() * exponent).exp2_() / E4M3_MAX
        ratio = (size / centre[..., None]).log2_().mul_(exponent[..., None]).exp2_()
        size = ratio / scale[..., None]  # a zero's logarithm is -inf, and its power zero again
    else:
        exponent, centre = torch.ones_like(top), torch.ones_like(top)
        scale = top.clamp(min=SMALLEST) / E4M3_MAX
        size = size / scale[..., None]
    signed = torch.copysign(size.clamp_(max=E4M3_MAX), x_RGN)
    codes_RC = signed.flatten(1)[:, : x_RC.shape[1]].to(torch.float8_e4m3fn)
    return codes_RC.view(torch.uint8), torch.stack((scale, exponent, centre), -1)


def unpack(codes_RC: Tensor, groups_RG3: Tensor) -> Tensor:
    """The values (R, C) fp32 that codes and groups stand for."""
    y_RGN = _grouped(codes_RC.view(torch.float8_e4m3fn).float())
    scale, exponent, centre = (part[..., None] for part in groups_RG3.unbind(-1))
    size = (y_RGN.abs() * scale).log2_().div_(exponent).exp2_().mul_(centre)
    return torch.copysign(size, y_RGN).flatten(1)[:, : codes_RC.shape[1]]


def _grouped(x_RC: Tensor) -> Tensor:
    """Rows in groups (R, G, 128), the last one filled up with zeros."""
    missing = num_groups(x_RC.shape[1]) * GROUP - x_RC.shape[1]
    return F.pad(x_RC, (0, missing)).unflatten(1, (-1, GROUP))


class Moment:
    """Views of one moment's state as rows: codes (R, C) and groups (R, G, 3)."""

    def __init__(self, codes: Tensor, groups: Tensor) -> None:
        self.codes, self.groups = _rows(codes), groups


def _rows(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1)


def step(
    parameter: Tensor,
    gradient: Tensor,
    first: Moment,
    second: Moment,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    steps: int,
    skipped: Tensor,
) -> None:
    """One AdamW step, in place; `steps` counts from 1, `skipped` (int32, 1) counts groups.

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
    p = (1 - lr wd) p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
    """
    if parameter.numel() == 0:
        return
    p_RC, g_RC = _rows(parameter), _rows(gradient.contiguous())
    b1, b2 = betas
    decay = 1.0 - learning_rate * weight_decay
    rate = learning_rate / (1.0 - b1**steps)
    correction = 1.0 / math.sqrt(1.0 - b2**steps)
    run = _fused if on_triton(parameter) else _reference
    run(p_RC, g_RC, first, second, b1, b2, eps, decay, rate, correction, skipped)


def _reference(
    p_RC: Tensor, g_RC: Tensor, first: Moment, second: Moment, b1: float, b2: float, eps: float,
    decay: float, rate: float, correction: float, skipped: Tensor,
) -> None:  # fmt: skip
    num_rows, columns = p_RC.shape
    for rows in chunks(num_rows, columns, CHUNK_ELEMENTS):
        p, g = p_RC[rows].float(), g_RC[rows].float()
        m = unpack(first.codes[rows], first.groups[rows]).mul_(b1).add_(g, alpha=1 - b1)
        v = unpack(second.codes[rows], second.groups[rows]).mul_(b2).addcmul_(g, g, value=1 - b2)
        p = p.mul(decay).addcdiv_(m, v.sqrt().mul_(correction).add_(eps), value=-rate)
        new = [p, *pack(m), *pack(v)]
        old = [p_RC, first.codes, first.groups, second.codes, second.groups]
        whole_RG = _grouped(g).mul(0.0).sum(-1) == 0  # a product with inf or NaN is NaN
        if not bool(whole_RG.all()):
            skipped += (~whole_RG).sum()
            keep_RC = whole_RG.repeat_interleave(GROUP, 1)[:, : p.shape[1]]
            for which, there in enumerate(old):
                mask = whole_RG[..., None] if there.dim() == 3 else keep_RC
                new[which] = torch.where(mask, new[which], there[rows].to(new[which].dtype))
        for there, value in zip(old, new, strict=True):
            there[rows] = value.to(there.dtype)


BLOCK_GROUPS = 8
"""Groups of one program: 1,024 elements."""


def _fused(
    p_RC: Tensor, g_RC: Tensor, first: Moment, second: Moment, b1: float, b2: float, eps: float,
    decay: float, rate: float, correction: float, skipped: Tensor,
) -> None:  # fmt: skip
    rows, columns = p_RC.shape
    per_row = num_groups(columns)
    grid = (triton.cdiv(rows * per_row, BLOCK_GROUPS),)
    is_bf16 = p_RC.dtype == torch.bfloat16
    _step_kernel[grid](
        p_RC.view(torch.int16) if is_bf16 else p_RC, g_RC, first.codes, first.groups,
        second.codes, second.groups, skipped, rows * per_row, columns, per_row,
        b1, 1 - b1, b2, 1 - b2, eps, decay, rate, correction,
        LOG2_RANGE=LOG2_RANGE, STEPS=STEPS_PER_UNIT, LEAST=LEAST_EXPONENT,
        LARGEST=LARGEST_EXPONENT, SMALLEST=SMALLEST, IS_BF16=is_bf16, BLOCK=BLOCK_GROUPS,
        GROUP=GROUP, num_warps=4,
    )  # fmt: skip


@triton.jit
def _unpacked(codes_ptr, groups_ptr, at, inside, group, exists):
    """Values of a block of groups; codes and constants are read once."""
    y = decode_e4m3(tl.load(codes_ptr + at, mask=inside, other=0))
    scale = tl.load(groups_ptr + 3 * group, mask=exists, other=1.0)[:, None]
    exponent = tl.load(groups_ptr + 3 * group + 1, mask=exists, other=1.0)[:, None]
    centre = tl.load(groups_ptr + 3 * group + 2, mask=exists, other=1.0)[:, None]
    size = tl.abs(y) * scale
    power = tl.exp2(tl.log2(tl.where(y == 0.0, 1.0, size)) / exponent) * centre
    return tl.where(y == 0.0, 0.0, tl.where(y < 0.0, -power, power))


@triton.jit
def _pack(
    codes_ptr, groups_ptr, x, at, inside, group, exists,
    LOG2_RANGE: tl.constexpr, STEPS: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):  # fmt: skip
    """Stores a block of groups."""
    size = tl.abs(x)
    size = tl.where(inside & (size >= SMALLEST), size, 0.0)
    top = tl.max(size, axis=1)
    low = tl.minimum(tl.min(tl.where(size > 0.0, size, float("inf")), axis=1), top)
    empty = top == 0.0
    top = tl.where(empty, 1.0, top)
    low = tl.where(empty, 1.0, low)
    octaves = tl.maximum(tl.log2(top) - tl.log2(low), 1e-3)
    exponent = tl.floor(LOG2_RANGE / octaves * STEPS) / STEPS
    exponent = tl.minimum(tl.maximum(exponent, LEAST), LARGEST)
    centre = tl.sqrt(top) * tl.sqrt(low)
    scale = tl.exp2(tl.log2(top / centre) * exponent) / 448.0
    ratio = tl.where(size > 0.0, size / centre[:, None], 1.0)
    power = tl.exp2(tl.log2(ratio) * exponent[:, None]) / scale[:, None]
    signed = tl.where(size > 0.0, tl.where(x < 0.0, -power, power), 0.0)
    tl.store(codes_ptr + at, encode_e4m3(signed), mask=inside)
    tl.store(groups_ptr + 3 * group, scale, mask=exists)
    tl.store(groups_ptr + 3 * group + 1, exponent, mask=exists)
    tl.store(groups_ptr + 3 * group + 2, centre, mask=exists)


@triton.jit
def _step_kernel(
    p_ptr, g_ptr, m_codes, m_groups, v_codes, v_groups, skipped_ptr,
    num_groups, columns, per_row, b1, one_b1, b2, one_b2, eps, decay, rate, correction,
    LOG2_RANGE: tl.constexpr, STEPS: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr, IS_BF16: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = group < num_groups
    row = group // per_row
    column = (group % per_row)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = exists[:, None] & (column < columns)
    at = row[:, None] * columns + column

    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    is_bad = (g != g) | (tl.abs(g) == float("inf"))
    bad = tl.max(is_bad.to(tl.int32), axis=1)
    count = tl.sum(bad)
    tl.atomic_add(skipped_ptr, count, mask=count > 0)
    exists = exists & (bad == 0)
    inside = inside & exists[:, None]
    g = tl.where(inside, g, 0.0)

    m = _unpacked(m_codes, m_groups, at, inside, group, exists) * b1 + g * one_b1
    v = _unpacked(v_codes, v_groups, at, inside, group, exists) * b2 + g * g * one_b2
    p = tl.load(p_ptr + at, mask=inside, other=0)
    p = from_bf16_bits(p) if IS_BF16 else p.to(tl.float32)
    p = p * decay - rate * (m / (tl.sqrt(v) * correction + eps))
    tl.store(p_ptr + at, bf16_bits(p) if IS_BF16 else p, mask=inside)
    _pack(
        m_codes, m_groups, m, at, inside, group, exists, LOG2_RANGE, STEPS, LEAST, LARGEST, SMALLEST
    )
    _pack(
        v_codes, v_groups, v, at, inside, group, exists, LOG2_RANGE, STEPS, LEAST, LARGEST, SMALLEST
    )
