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
from dataclasses import dataclass, replace

from ..cluster import DTYPE_BYTES
from .graph import Array
from .halo_levels import LEVELS, Level, beside_bytes, cast_kind, gradient_bytes, weight_kind
from .moment_bytes import FORMATS

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


def _casting(forward_bytes: float, backward_bytes: float) -> Kind:
    """A cast of the first tensor in forward and of the others in backward: bytes per element."""
    return Kind(
        work=lambda s: s[0],
        backward_work=lambda s: sum(s[1:], 0.0 * s[0]),
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: forward_bytes * s[0],
        backward_bytes=lambda s, x: backward_bytes * sum(s[1:], 0.0 * s[0]),
        launches=2,
        backward_transient=0.0,
    )


def _beside_codes(level: Level, trainable: bool) -> Kind:
    """What a linear on rotated codes does besides: (tokens, out, in)."""
    return Kind(
        work=_product,
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: beside_bytes(level, s, trainable)[0],
        backward_bytes=lambda s, x: beside_bytes(level, s, trainable)[1],
        launches=3,
        backward_transient=0.0,
    )


def _streaming_each(bytes_per_element: float) -> Kind:
    """A conversion of some tensors in forward and again in backward."""
    return Kind(
        work=lambda s: sum(s, 0.0 * s[0]),
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: bytes_per_element * sum(s, 0.0 * s[0]),
        backward_bytes=lambda s, x: bytes_per_element * sum(s, 0.0 * s[0]),
        backward_transient=0.0,
    )


def _dequantizing(stored_bytes: float) -> Kind:
    """Stored weights read and written in the dtype of use, in forward and again in backward."""
    return replace(
        _streaming_each(0.0),
        forward_bytes=lambda s, x: (x + stored_bytes) * _product(s),
        backward_bytes=lambda s, x: (x + stored_bytes) * _product(s),
    )


def _updating(bytes_per_element: float) -> Kind:
    """An optimiser's step."""
    return Kind(
        work=lambda s: s[0],
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: bytes_per_element * s[0],
        backward_bytes=lambda s, x: 0.0 * s[0],
    )


KINDS: dict[str, Kind] = {
    # (output pixels, channels, inputs per output, values read): an implicit GEMM that reads its
    # input once; the backward is the input's and the weights' gradient
    "conv": Kind(
        work=lambda s: s[0] * s[1] * s[2],
        forward_flops=lambda s: 2 * s[0] * s[1] * s[2],
        backward_flops=lambda s: 4 * s[0] * s[1] * s[2],
        forward_bytes=lambda s, x: (s[3] + s[1] * s[2] + s[0] * s[1]) * x,
        backward_bytes=lambda s, x: 2 * (s[3] + s[1] * s[2] + s[0] * s[1]) * x,
        backward_transient=0.0,
    ),
    # the same on an image, which needs no gradient
    "conv_stem": Kind(
        work=lambda s: s[0] * s[1] * s[2],
        forward_flops=lambda s: 2 * s[0] * s[1] * s[2],
        backward_flops=lambda s: 2 * s[0] * s[1] * s[2],
        forward_bytes=lambda s, x: (s[3] + s[1] * s[2] + s[0] * s[1]) * x,
        backward_bytes=lambda s, x: (s[3] + s[1] * s[2] + s[0] * s[1]) * x,
        backward_transient=0.0,
    ),
    # (rows, columns, width): the product of two activations, with the gradients of both
    "linear_scores": Kind(
        work=_product,
        forward_flops=lambda s: 2 * _product(s),
        backward_flops=lambda s: 4 * _product(s),
        forward_bytes=lambda s, x: (s[0] * s[2] + s[1] * s[2] + s[0] * s[1]) * x,
        backward_bytes=lambda s, x: 2 * (s[0] * s[2] + s[1] * s[2] + s[0] * s[1]) * x,
        backward_transient=0.0,
    ),
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
    # (rows of all groups, out, in, groups): one matmul per group, such as the experts of a rank;
    # the backward is the input's and the weights' gradient
    "grouped_linear": Kind(
        work=lambda s: s[0] * s[1] * s[2],
        forward_flops=lambda s: 2 * s[0] * s[1] * s[2],
        backward_flops=lambda s: 4 * s[0] * s[1] * s[2],
        forward_bytes=lambda s, x: (s[0] * (s[1] + s[2]) + s[3] * s[1] * s[2]) * x,
        backward_bytes=lambda s, x: 2 * (s[0] * (s[1] + s[2]) + s[3] * s[1] * s[2]) * x,
        backward_transient=0.0,
    ),
    # the same with frozen weights: the input's gradient alone
    "grouped_linear_frozen": Kind(
        work=lambda s: s[0] * s[1] * s[2],
        forward_flops=lambda s: 2 * s[0] * s[1] * s[2],
        backward_flops=lambda s: 2 * s[0] * s[1] * s[2],
        forward_bytes=lambda s, x: (s[0] * (s[1] + s[2]) + s[3] * s[1] * s[2]) * x,
        backward_bytes=lambda s, x: (s[0] * (s[1] + s[2]) + s[3] * s[1] * s[2]) * x,
        backward_transient=0.0,
    ),
    # (tokens, experts): softmax of the router's logits in fp32 and its top k
    "routing": Kind(
        work=_product,
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: _product(s) * (x + 8),
        backward_bytes=lambda s, x: _product(s) * (x + 8),
        launches=4,
        backward_transient=0.0,
    ),
    # (tokens x hidden, copies): each token to the rows of its experts; backward adds them up
    "permute": Kind(
        work=_product,
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: s[0] * (1 + s[1]) * x,
        backward_bytes=lambda s, x: s[0] * (1 + s[1]) * x,
        launches=3,
        backward_transient=0.0,
    ),
    # the same, rows to the weighted sum per token; backward reads the rows again for the weights
    "unpermute": Kind(
        work=_product,
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: s[0] * (1 + s[1]) * x,
        backward_bytes=lambda s, x: s[0] * (1 + 2 * s[1]) * x,
        launches=2,
        backward_transient=0.0,
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
    # (batch x heads, queries, head size, keys), the whole rectangle of scores: encoders, and
    # attention over an encoder's output
    "attention_full": Kind(
        work=_product,
        forward_flops=lambda s: 4 * _product(s),
        backward_flops=lambda s: 10 * _product(s),
        forward_bytes=lambda s, x: 2 * s[0] * s[2] * (s[1] + s[3]) * x,
        backward_bytes=lambda s, x: 4 * s[0] * s[2] * (s[1] + s[3]) * x,
        launches=2,
        backward_transient=0.0,
    ),
    # (batch x heads, seq, head size), scores in memory: the whole square, masked afterwards; per
    # score the product written, softmax and dropout read and written with the mask, and read by the
    # second product: 6.5 elements; backward 9.5, each product and each kernel between reading what
    # it differentiates as well
    "attention_unfused": Kind(
        work=lambda s: s[0] * s[1] * s[1] * s[2],
        forward_flops=lambda s: 4 * s[0] * s[1] * s[1] * s[2],
        backward_flops=lambda s: 8 * s[0] * s[1] * s[1] * s[2],
        forward_bytes=lambda s, x: 6.5 * s[0] * s[1] * s[1] * x,
        backward_bytes=lambda s, x: 9.5 * s[0] * s[1] * s[1] * x,
        launches=5,
        backward_transient=0.0,
    ),
    # the same with the mask in a kernel of its own: two more elements each way
    "attention_unfused_eager": Kind(
        work=lambda s: s[0] * s[1] * s[1] * s[2],
        forward_flops=lambda s: 4 * s[0] * s[1] * s[1] * s[2],
        backward_flops=lambda s: 8 * s[0] * s[1] * s[1] * s[2],
        forward_bytes=lambda s, x: 8.5 * s[0] * s[1] * s[1] * x,
        backward_bytes=lambda s, x: 11.5 * s[0] * s[1] * s[1] * x,
        launches=9,
        backward_transient=0.0,
    ),
    # (matmul input, its matmuls' outputs ...), from 16 to 8 bits and below: the input in forward,
    # in two reads and a write; the outputs' gradients in backward, and their transposed copies
    "quantize": _casting(5, 7),
    # the same with scales by row: one more read each way
    "quantize_rowwise": _casting(7, 9),
    # (weight): two reads and a write in forward; in backward, its scale known, a read and a write
    # in the other order
    "quantize_weight": Kind(
        work=_product,
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: 5 * _product(s),
        backward_bytes=lambda s, x: 3 * _product(s),
        launches=2,
        backward_transient=0.0,
    ),
    # (matmul input, its matmuls' outputs ...): casts to codes, of inputs and of output gradients
    **{cast_kind(name): _casting(5, gradient_bytes(level)) for name, level in LEVELS.items()},
    **{
        weight_kind(name, trainable=trains): _beside_codes(level, trains)
        for name, level in LEVELS.items()
        for trains in (True, False)
    },
    # (stored tensors ...): 16-bit activations to fp8 with scales by group, and back in backward
    "quantize_store": _streaming_each(2 + DTYPE_BYTES["fp8_g16"]),
    # (weight): about four bits to the dtype of use before its matmuls of forward and backward
    "dequantize": _dequantizing(DTYPE_BYTES["nf4"]),
    "rmsnorm": _streaming(
        2, 4, launches=2, backward_transient=4.0,
        forward_transient_16bit=2.0, backward_transient_16bit=8.0,
    ),
    "layernorm": _streaming(2, 4, launches=2),
    "swiglu": _streaming(3, 6, launches=2, backward_transient=2.0),
    "geglu": _streaming(3, 6, launches=2, backward_transient=2.0),
    "gelu": _streaming(2, 3),
    "relu": _streaming(2, 3),
    "silu": _streaming(2, 3),
    # scale and shift of a whole tensor by a vector per sample; backward sums over tokens
    "modulate": _streaming(4, 6, launches=2),
    "gate": _streaming(2, 4),
    # statistics, then the normalised output: training reads its input twice in forward, and input
    # and gradient twice in backward
    "batchnorm": _streaming(3, 5),
    # by input: read once, the output of a stride of two and its places are half of that
    "max_pool": _streaming(1.5, 1.5, backward_transient=0.0),
    # by input: read (the mean) or picked from; its gradient is written whole
    "pool": _streaming(1, 1, backward_transient=0.0),
    "squared_error": _streaming(2, 3, launches=2),
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
    # the same with a frozen table: nothing to do in backward
    "embedding_frozen": Kind(
        work=lambda s: s[0] * s[1],
        forward_flops=lambda s: 0.0 * s[0],
        backward_flops=lambda s: 0.0 * s[0],
        forward_bytes=lambda s, x: 2 * s[0] * s[1] * x,
        backward_bytes=lambda s, x: 0.0 * s[0],
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
    # (parameters, tensors): read and write of fp32 parameter and two moments, read of the gradient;
    # with moments in other formats their bytes in place of 8
    "adamw": _updating(28),
    "adamw_fp8": _updating(12 + 2 * FORMATS["adamw_fp8"].rate),
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
