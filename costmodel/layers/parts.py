"""What layers are built from: linears, norms, elementwise operators, and edges with collectives.

Where a tensor-parallel producer and consumer disagree on a tensor's layout, a collective stands on
the edge: partial sums become whole by all-reduce (or by reduce-scatter onto a split sequence), a
split sequence becomes whole by all-gather; the backward of each is its mirror image.
"""

from __future__ import annotations

from ..graph import Axes, Collective, Operator, Tensor

TOKENS: Axes = ("batch", "seq")
PART: Axes = ("batch", "seq_part")
"""Tokens outside the matmuls: sequence parallelism divides them by tp."""


def whole(name: str) -> Tensor:
    """Hidden states of all tokens of the rank's sequence."""
    return Tensor(name=name, axes=(*TOKENS, "hidden"))


def part(name: str) -> Tensor:
    """Hidden states outside the matmuls."""
    return Tensor(name=name, axes=(*PART, "hidden"))


def linear(
    name: str,
    x: Tensor,
    out: Tensor,
    width_in: Axes,
    width_out: Axes,
    bias: bool,
    *,
    forward_collectives: tuple[Collective, ...] = (),
    tokens: Axes = TOKENS,
) -> Operator:
    """A matmul (tokens, width_in) -> (tokens, width_out) with its weight."""
    weights = [Tensor(name=f"{name}.weight", axes=(*width_out, *width_in), dtype="param")]
    if bias:
        weights.append(Tensor(name=f"{name}.bias", axes=width_out, dtype="param"))
    return Operator(
        name=name,
        kind="linear",
        price_axes=(tokens, width_out, width_in),
        inputs=(x,),
        outputs=(out,),
        saves=(x,),
        weights=tuple(weights),
        forward_collectives=forward_collectives,
    )


def norm(name: str, kind: str, x: Tensor, out: Tensor, *, fused: bool) -> Operator:
    """RMSNorm or LayerNorm over the last axis.

    Without a fused kernel RMSNorm keeps its normalised input as well.
    """
    rows = Tensor(name=f"{name}.rstd", axes=x.axes[:-1], dtype="fp32")
    saves: tuple[Tensor, ...]
    if kind == "rmsnorm" and not fused:
        # Composed from elementary operators in fp32: in 16-bit the input is kept as an fp32 copy.
        upcast = Tensor(name=f"{name}.x", axes=x.axes, dtype="upcast")
        hat = Tensor(name=f"{name}.normalised", axes=x.axes, dtype="fp32")
        saves = (x, upcast, hat, rows)
    elif kind == "layernorm":
        saves = (x, rows, Tensor(name=f"{name}.mean", axes=x.axes[:-1], dtype="fp32"))
    else:
        saves = (x, rows)
    weights = [Tensor(name=f"{name}.weight", axes=x.axes[-1:], dtype="param")]
    if kind == "layernorm":
        weights.append(Tensor(name=f"{name}.bias", axes=x.axes[-1:], dtype="param"))
    return Operator(
        name=name,
        kind=kind,
        price_axes=(x.axes[:-1], x.axes[-1:]),
        inputs=(x,),
        outputs=(out,),
        saves=saves,
        weights=tuple(weights),
    )


def elementwise(
    name: str, kind: str, inputs: tuple[Tensor, ...], out: Tensor, saves: tuple[Tensor, ...] = ()
) -> Operator:
    """An operator priced by the elements of its output."""
    return Operator(
        name=name, kind=kind, price_axes=(out.axes,), inputs=inputs, outputs=(out,), saves=saves
    )


def boundary_op(
    name: str,
    x: Tensor,
    out: Tensor,
    forward: tuple[Collective, ...],
    backward: tuple[Collective, ...],
) -> Operator:
    """The edge between two layouts of one tensor."""
    return Operator(
        name=name,
        kind="edge",
        price_axes=(x.axes,),
        inputs=(x,),
        outputs=(out,),
        forward_collectives=forward,
        backward_collectives=backward,
    )


def local_copy(name: str, x: Tensor, out: Tensor, axis: str) -> Operator:
    """An edge on one rank: the same rows in another order, where an axis is above 1."""
    return Operator(
        name=name, kind="edge", price_axes=(x.axes,), inputs=(x,), outputs=(out,), copies_over=axis
    )


def enter(name: str, x: Tensor, out: Tensor, sequence_parallel: bool, axis: str = "tp") -> Operator:
    """The edge from a replicated (or split) region into tensor-parallel matmuls; `out` is whole."""
    kind = "reduce_scatter" if sequence_parallel else "all_reduce"
    back = Collective(kind=kind, axis=axis, buffer=out, edge=name, sums_gradients=True)
    gather = Collective(kind="all_gather", axis=axis, buffer=out, edge=name)
    return boundary_op(name, x, out, (gather,) if sequence_parallel else (), (back,))


def leave(name: str, x: Tensor, out: Tensor, sequence_parallel: bool, axis: str = "tp") -> Operator:
    """The edge out of tensor-parallel matmuls; `x` is whole and holds partial sums."""
    kind = "reduce_scatter" if sequence_parallel else "all_reduce"
    gather = Collective(kind="all_gather", axis=axis, buffer=x, edge=name)
    there = Collective(kind=kind, axis=axis, buffer=x, edge=name)
    return boundary_op(name, x, out, (there,), (gather,) if sequence_parallel else ())
