"""The operators of 8 bits: casts, matmuls of codes, and moments of an optimiser."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...kernels.fp8_cast import E4M3, E5M2, cast, pack_groups, unpack_groups
from ..adamw_fp8 import AdamWFp8
from ..torch_compat import scaled_matmul
from .cases import Case, Sizes
from .timing import Buffers, Call


def adamw_fp8(buffers: Buffers, sizes: Sizes) -> Case:
    """AdamW with moments in 8 bits, on matrices of 256 columns."""
    elements, tensors = sizes
    rows = max(1, elements // tensors // COLUMNS)
    count = max(1, min(6, buffers.cold_bytes // (10 * elements)))
    optimizers: list[torch.optim.Optimizer] = []
    for _ in range(count):
        params = [
            nn.Parameter(torch.zeros(rows, COLUMNS, device=buffers.device)) for _ in range(tensors)
        ]
        for param in params:
            param.grad = torch.full_like(param, 1e-3)
        optimizers.append(AdamWFp8(params, lr=1e-6))
        optimizers[-1].step()  # makes the states
    turn = itertools.cycle(optimizers)
    return Case(lambda: next(turn).step())


COLUMNS = 256
"""Width of the matrices that are cast."""


def _matrices(buffers: Buffers, elements: int) -> Iterator[Tensor]:
    columns = min(COLUMNS, elements)
    return itertools.cycle(buffers.rotating(elements // columns, columns))


def quantize(buffers: Buffers, sizes: Sizes) -> Case:
    """The cast of a matmul's input; as backward that of an output's gradient. In both orders on a
    GPU, where matmuls want them."""
    inputs, both = _matrices(buffers, sizes[0]), buffers.device.type == "cuda"
    return Case(
        lambda: _drop(cast(next(inputs), E4M3, transposed=both)),
        lambda: lambda: _drop(cast(next(inputs), E5M2, transposed=both)),
    )


def quantize_weight(buffers: Buffers, sizes: Sizes) -> Case:
    """The cast of a weight; as backward in the other order, its scale known."""
    weights = _matrices(buffers, sizes[0])
    scale = torch.ones((), device=buffers.device)
    on_cuda = buffers.device.type == "cuda"
    return Case(
        lambda: _drop(cast(next(weights), E4M3)),
        lambda: (
            lambda: _drop(cast(next(weights), E4M3, scale, plain=not on_cuda, transposed=on_cuda))
        ),
    )


def quantize_store(buffers: Buffers, sizes: Sizes) -> Case:
    """Activations to 8 bits with scales by group, and back."""
    inputs = _matrices(buffers, sizes[0])
    packed = [pack_groups(next(inputs)) for _ in range(2)]
    turn = itertools.cycle(packed)
    return Case(
        lambda: _drop(pack_groups(next(inputs))),
        lambda: lambda: _drop(unpack_groups(*next(turn), buffers.dtype)),
    )


def _drop(_: object) -> None:
    """A result that nobody keeps."""


def low_linear(buffers: Buffers, sizes: Sizes) -> Case:
    """x W^T on 8-bit operands; backward = the input's gradient, whose operands are as long."""
    m, n, k = sizes
    return Case(
        _low_matmul(buffers, m, n, k, fast=True),
        lambda: _low_matmul(buffers, m, k, n, fast=False),
    )


def low_linear_wgrad(buffers: Buffers, sizes: Sizes) -> Case:
    """g^T x on 8-bit operands, both turned."""
    m, n, k = sizes
    return Case(_low_matmul(buffers, n, k, m, fast=False))


def _low_matmul(buffers: Buffers, rows: int, columns: int, inner: int, *, fast: bool) -> Call:
    a = cast(buffers.take(rows, inner), E4M3)
    others = [cast(b, E4M3) for b in buffers.rotating(columns, inner)]
    turn = itertools.cycle([b.codes_MK for b in others])
    assert a.codes_MK is not None
    codes, scale = a.codes_MK, a.scale

    def call() -> None:
        b = next(turn)
        assert b is not None
        scaled_matmul(codes, b, scale, buffers.dtype, fast=fast)

    return call
