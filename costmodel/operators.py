"""What each operator kind costs in principle: FLOPs, bytes moved, transient memory.

For every kind: `work`, the quantity its time is proportional to at large sizes; FLOPs and memory
traffic forward and backward, for the roofline; and the transient tensors of its forward and
backward, for the memory walk. `sizes` are the operator's `price_axes` in order.

Traffic counts each tensor once per read or write in the operator's dtype (x bytes per element).
Transients are multiples of the operator's output, counted on torch 2.13 with a storage counter;
`backward` includes the produced gradients. `tests/executors/test_ledger.py` compares the whole
ledger with the storages of real steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .graph import Array

Sized = Callable[[Sequence[Array], float], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One operator kind; the functions take (sizes, bytes per element)."""

    work: Callable[[Sequence[Array]], Array]
    forward_flops: Callable[[Sequence[Array]], Array]
    backward_flops: Callable[[Sequence[Array]], Array]
    forward_bytes: Sized
    backward_bytes: Sized
    backward_work: Callable[[Sequence[Array]], Array] | None = None
    """Where the backward grows with other sizes than the forward."""
    launches: int = 1
    """Kernel launches of a forward; a backward takes about twice as many."""
    forward_transient: float = 0.0
    backward_transient: float = 1.0
    forward_transient_16bit: float | None = None
    backward_transient_16bit: float | None = None


def _product(sizes: Sequence[Array]) -> Array:
    total = sizes[0]
    for size in sizes[1:]:
        total = total * size
    return total


def _streaming(
    reads_writes_forward: float,
    reads_writes_backward: float,
    *,
    launches: int = 1,
    forward_transient: float = 0.0,
    backward_transient: float = 1.0,
    forward_transient_16bit: float | None = None,
    backward_transient_16bit: float | None = None,
) -> Kind:
    """A kind bound by memory: so many reads and writes of its output's size."""
    return Kind(
        work=_product,
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: reads_writes_forward * _product(s) * x,
        backward_bytes=lambda s, x: reads_writes_backward * _product(s) * x,
        launches=launches,
        forward_transient=forward_transient,
        backward_transient=backward_transient,
        forward_transient_16bit=forward_transient_16bit,
        backward_transient_16bit=backward_transient_16bit,
    )


KINDS: dict[str, Kind] = {
    # (tokens, out, in): the input gradient; the weight gradient is `linear_wgrad`
    "linear": Kind(
        work=_product,
        forward_flops=lambda s: 2 * _product(s),
        backward_flops=lambda s: 2 * _product(s),
        forward_bytes=lambda s, x: (s[0] * s[2] + s[1] * s[2] + s[0] * s[1]) * x,
        backward_bytes=lambda s, x: (s[0] * s[2] + s[1] * s[2] + s[0] * s[1]) * x,
        backward_transient=0.0,
    ),
    "linear_wgrad": Kind(
        work=_product,
        forward_flops=lambda s: 2 * _product(s),
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: (s[0] * s[2] + s[1] * s[2] + s[0] * s[1]) * x,
        backward_bytes=lambda s, x: 0.0 * s[0],
    ),
    # (batch x heads, seq, head size), causal: half of the square; the flash backward does 5 matmuls
    # for the forward's 2
    "attention": Kind(
        work=lambda s: s[0] * s[1] * s[1] * s[2],
        forward_flops=lambda s: 2 * s[0] * s[1] * s[1] * s[2],
        backward_flops=lambda s: 5 * s[0] * s[1] * s[1] * s[2],
        forward_bytes=lambda s, x: 4 * s[0] * s[1] * s[2] * x,
        backward_bytes=lambda s, x: 8 * s[0] * s[1] * s[2] * x,
        launches=2,
        backward_transient=0.0,
    ),
    "rmsnorm": _streaming(
        2, 4, launches=2, backward_transient=4.0,
        forward_transient_16bit=2.0, backward_transient_16bit=8.0,
    ),
    "layernorm": _streaming(2, 4, launches=2),
    "swiglu": _streaming(3, 6, launches=2, backward_transient=2.0),
    "gelu": _streaming(2, 3),
    "squared_relu": _streaming(2, 3, launches=2, backward_transient=3.0),
    "rope": _streaming(2, 2, launches=4, forward_transient=2.0, backward_transient=3.5),
    "add": _streaming(3, 0, backward_transient=0.0),
    "accumulate": _streaming(3, 0),
    "copy": _streaming(2, 0),
    "cast": _streaming(2, 0),
    # (tokens, hidden, vocab): backward writes the dense gradient of the table
    "embedding": Kind(
        work=lambda s: s[0] * s[1],
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: 2 * s[0] * s[1] * x,
        backward_bytes=lambda s, x: (2 * s[0] + s[2]) * s[1] * x,
        backward_work=lambda s: (2 * s[0] + s[2]) * s[1],
        backward_transient=0.0,
    ),
    # (tokens, vocab): fp32 softmax over logits of the compute dtype: forward reads the logits and
    # writes the log-softmax, backward reads it and writes two gradients
    "cross_entropy": Kind(
        work=_product,
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: _product(s) * (x + 8),
        backward_bytes=lambda s, x: _product(s) * (x + 12),
        launches=4,
        backward_transient=2.0,
        forward_transient_16bit=1.0,
    ),
    # (parameters, tensors): read and write of fp32 parameter and two moments, read of the gradient
    "adamw": Kind(
        work=lambda s: s[0],
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: 28 * s[0],
        backward_bytes=lambda s, x: 0.0 * s[0],
    ),
}  # fmt: skip


def transients(kind: str, dtype: str) -> tuple[float, float]:
    """Transient tensors of a kind's forward and backward, as multiples of its output's bytes."""
    entry = KINDS[kind]
    forward, backward = entry.forward_transient, entry.backward_transient
    if dtype != "fp32":
        if entry.forward_transient_16bit is not None:
            forward = entry.forward_transient_16bit
        if entry.backward_transient_16bit is not None:
            backward = entry.backward_transient_16bit
    return forward, backward
