"""What an aten operator is to the cost model: its kind and the sizes that kind is priced by.

Matmuls and convolutions are (rows, columns, inner) with 2 x rows x columns x inner FLOPs, the count
of `torch.utils.flop_counter`; a convolution counts as the matmul of its unfolded input. Causal
attention counts half of the square, as everywhere in the cost model. What is neither a matmul,
attention nor a fused operator with a kind of its own moves bytes: it is priced as a copy of half of
what it reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

Priced = tuple[str, tuple[int, ...]]

MATMUL = "linear_wgrad"
"""The kind of one matmul without a backward."""

COPY_UNIT_BYTES = 4
"""A copy is counted in fp32 elements."""


def forward(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Priced:
    """Kind and sizes of an operator of the forward."""
    if name in ("gelu",):
        return "gelu", (args[0].numel(),)
    if name == "native_layer_norm":
        hidden = math.prod(args[1])
        return "layernorm", (args[0].numel() // hidden, hidden)
    if name == "embedding":
        vocab, hidden = args[0].shape
        return "embedding", (args[1].numel(), hidden, vocab)
    if name.startswith("_scaled_dot_product"):
        return _attention(name, args, kwargs)
    if name == "add" and _same_shapes(args):
        return "add", (out.numel(),)
    if name in ("convolution", "_convolution"):
        return MATMUL, _convolution(args[0], args[1], out, transposed=bool(args[6]))
    return _matmul(name, args) or _copy(args, out)


def backward(name: str, args: Sequence[Any], out: Any) -> tuple[Priced, ...]:
    """Kinds and sizes of an operator of the backward, in kinds without a backward."""
    if name == "convolution_backward":
        gradient, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
        one = (MATMUL, _convolution(x, weight, gradient, transposed=bool(transposed)))
        return (one,) * (int(mask[0]) + int(mask[1]))
    return (_matmul(name, args) or _copy(args, out),)


def _matmul(name: str, args: Sequence[Any]) -> Priced | None:
    if name in ("addmm", "baddbmm"):
        name, args = ("mm" if name == "addmm" else "bmm"), args[1:]
    if name == "mm":
        (rows, inner), columns = args[0].shape, args[1].shape[1]
        return MATMUL, (rows, columns, inner)
    if name == "bmm":
        (batch, rows, inner), columns = args[0].shape, args[1].shape[2]
        return MATMUL, (batch * rows, columns, inner)
    return None


def _convolution(
    x: Tensor, weight: Tensor, out: Tensor, *, transposed: bool
) -> tuple[int, int, int]:
    """(positions, first weight axis, the other weight axes): each position meets the whole filter.

    Positions are those of the output, or of the input of a transposed convolution.
    """
    place = x if transposed else out
    positions = place.shape[0] * math.prod(place.shape[2:])
    return positions, weight.shape[0], weight.numel() // weight.shape[0]


def _attention(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Priced:
    """Causal attention of equal lengths as the cost model's own; anything else as a full square."""
    query, key = args[0], args[1]
    batch, heads, queries, head_dim = query.shape
    causal_at = 5 if "efficient" in name or "cudnn" in name else 4
    given = args[causal_at] if len(args) > causal_at else False
    if bool(kwargs.get("is_causal", given)) and queries == key.shape[2]:
        return "attention", (batch * heads, queries, head_dim)
    return "attention_full", (batch * heads, queries, head_dim, key.shape[2])


def _same_shapes(args: Sequence[Any]) -> bool:
    tensors = [a for a in args[:2] if isinstance(a, Tensor)]
    return len(tensors) == 2 and tensors[0].shape == tensors[1].shape


def _copy(args: Sequence[Any], out: Any) -> Priced:
    moved = sum(t.numel() * t.element_size() for t in (*tensors_of(args), *tensors_of(out)))
    return "copy", (math.ceil(moved / 2 / COPY_UNIT_BYTES),)


def tensors_of(value: Any) -> list[Tensor]:
    """Tensors in a nest of tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []
