"""The operator graph that every cost is derived from: operators on labelled axes.

A tensor's shape is a tuple of axis labels; its local size follows from a table of local axis sizes
(`Sizes`), which is the global size divided by the degrees that shard the axis. FLOPs, bytes, saved
activations and collectives all come from the same operators, so nothing is typed in twice.

Sizes are NumPy arrays: one plan is an array of length one, a search grid an array of thousands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cluster import DTYPE_BYTES

Array = NDArray[Any]
Sizes = Mapping[str, Array]
"""Local size of each axis label."""

Axes = tuple[str, ...]


def volume(axes: Axes, sizes: Sizes) -> Array:
    """Elements of a local tensor: the product of its axes' local sizes."""
    if not axes:
        return np.ones(1)
    total = sizes[axes[0]]
    for axis in axes[1:]:
        total = total * sizes[axis]
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """An edge of the graph.

    `dtype` is a dtype name, or until the precision rewrite one of: "compute" (the plan's compute
    dtype), "param" (a weight as used), "upcast" (an fp32 copy that exists only in 16-bit runs).
    """

    name: str
    axes: Axes
    dtype: str = "compute"
    trainable: bool = True
    """Of a weight: whether it has a gradient and optimiser states."""

    def num_bytes(self, sizes: Sizes) -> Array:
        """Bytes of the local tensor; its dtype must have been settled by the precision rewrite."""
        return volume(self.axes, sizes) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """A collective over one mesh axis on a tensor: its full logical buffer.

    A send is a round in which every rank of the group may hand a message to another and get one;
    its buffer is one message.
    """

    kind: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, send"""
    axis: str
    """Mesh axis: tp, dp, ep, ...; ulysses and ring are the two parts of cp."""
    buffer: Tensor
    overlaps: str | None = None
    """Name of the operator that it runs beside; None = between dependent operators."""
    once: bool = False
    """Whether it is left out when its operator runs again in backward."""
    passes: str | None = None
    """Of a send: the axis whose size is the rounds that follow one another."""
    sent: str | None = None
    """Of a send: the axis whose size is the messages that a rank sends, in the mean."""
    edge: str | None = None
    """Of tensor parallelism: name of the edge that it stands on."""
    sums_gradients: bool = False
    """Whether it adds up gradients of inputs, for which those of the weights do not wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One operator of the forward pass, with what its backward needs.

    `kind` is the operator that prices and ledgers know; `price_axes` are the sizes it is priced
    by, in the order of that kind's curve (see `costmodel/operators.py`).
    """

    name: str
    kind: str
    price_axes: tuple[Axes, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    saves: tuple[Tensor, ...] = ()
    """Tensors kept from forward to backward: inputs, outputs or internal ones."""
    needs: tuple[Tensor, ...] = ()
    """What backward reads, where some of it is not kept and comes back when it is asked for."""
    weights: tuple[Tensor, ...] = ()
    forward_collectives: tuple[Collective, ...] = ()
    """After the operator, on its outputs (or before it, on its inputs)."""
    backward_collectives: tuple[Collective, ...] = ()
    held_forward: tuple[Tensor, ...] = ()
    """What stands in memory while it runs, beside inputs and outputs: buffers of its messages."""
    held_backward: tuple[Tensor, ...] = ()
    recomputed: bool = False
    """Whether backward runs the forward again."""
    compute: str | None = None
    """Dtype that its matmul runs in where that is not its input's (fp8, fp4)."""
    grad_inputs: bool = True
    """Whether the inputs need a gradient (token ids do not)."""
    copies_over: str | None = None
    """Of an edge without collectives: it copies its input, each way, where this axis is above 1."""
    unpacks: tuple[Tensor, ...] = ()
    """What backward makes anew, while it runs, of tensors that are saved in other dtypes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One layer (or the embedding, or the head) as operators in forward order."""

    name: str
    operators: tuple[Operator, ...]
    boundary: Tensor
    """The input: what full recompute keeps and what pipelines and checkpoints hand over."""
    checkpointed: bool = False
    """Whether only the boundary is kept and all operators run again in backward."""
    kept: tuple[Tensor, ...] = ()
    """What a checkpointed graph keeps beside its boundary; what makes it does not run again."""
    weights: tuple[Tensor, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.weights:
            found = {w.name: w for op in self.operators for w in op.weights}
            object.__setattr__(self, "weights", tuple(found.values()))

    def num_params(self, sizes: Sizes, *, experts: bool = False, trainable: bool = False) -> Array:
        """Local parameters before any data-parallel sharding: the experts', or all others.

        With `trainable` those with gradients alone.
        """
        total = np.zeros(1)
        for weight in self.weights:
            if ("experts" in weight.axes) == experts and (weight.trainable or not trainable):
                total = total + volume(weight.axes, sizes)
        return total
