"""What a traced module consists of: its operators, with sizes that are linear in the batch.

Where tensor parallelism of degree t divides a part of a size, that part is told beside it: a size
(f, p) with a cut part (g, q) is f - g + g / t + (p - q + q / t) x batch on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from .document import Value

Size = tuple[int, int]
"""A size of a traced module: fixed part, and what every sample of the batch adds."""
UNCUT: Size = (0, 0)
"""The cut part of a size that tensor parallelism does not divide."""


class TracedTensor(Value, frozen=True, kw_only=True):
    """A storage that operators of a traced module share, whatever views lie on it."""

    name: str
    elements: Size
    dtype: str
    """`compute` for what follows the plan's precision, otherwise a dtype of that many bytes."""
    cut: Size = UNCUT


class TracedWeight(Value, frozen=True, kw_only=True):
    """A parameter of a traced module."""

    name: str
    elements: int
    trainable: bool = True
    cut: bool = False
    """Whether tensor parallelism divides it."""


class TracedWork(Value, frozen=True, kw_only=True):
    """One operator of a traced backward: a kind of `costmodel/operators.py` and its sizes."""

    kind: str
    sizes: tuple[Size, ...]
    cut: tuple[Size, ...] = ()
    """Cut parts of `sizes`; empty where nothing is cut."""


class TracedCollective(Value, frozen=True, kw_only=True):
    """A collective over the tensor-parallel group."""

    kind: Literal["all_reduce", "all_gather"]
    buffer: TracedTensor
    """The full logical buffer."""
    backward: bool
    """Whether it belongs to the backward."""


class TracedOperator(Value, frozen=True, kw_only=True):
    """One operator of a traced forward, with what its backward keeps and does."""

    name: str
    module: str
    """Path of the submodule that called it; empty for the module itself and the loss."""
    kind: str
    sizes: tuple[Size, ...]
    inputs: tuple[TracedTensor, ...] = ()
    """Those that need a gradient, parameters apart."""
    outputs: tuple[TracedTensor, ...] = ()
    saves: tuple[TracedTensor, ...] = ()
    weights: tuple[TracedWeight, ...] = ()
    """Parameters that are first used here."""
    backward: tuple[TracedWork, ...] = ()
    """What its backward does beyond the backward of its kind."""
    cut: tuple[Size, ...] = ()
    """Cut parts of `sizes`; empty where nothing is cut."""
    collectives: tuple[TracedCollective, ...] = ()
    """Of an `edge`, which does nothing else."""


Operators = tuple[TracedOperator, ...]


class Divided(Value, frozen=True, kw_only=True):
    """A traced module cut by its `tp_plan`: the same parts in the operators that run then."""

    degrees: tuple[int, ...]
    """Degrees of tensor parallelism at which it ran."""
    prefix: Operators
    layers: tuple[Operators, ...]
    """Of each of the model's layer groups."""
    suffix: Operators


class Traced(Value, frozen=True, kw_only=True):
    """What a model is besides its layers when it came from a user's function."""

    target: str
    """`package.module:function`; never imported when a plan is loaded."""
    tokens: bool
    """Whether the module takes tokens of the corpus; otherwise the function makes its batches."""
    seq_tokens: int
    """The sequence length it was traced for."""
    prefix: Operators
    suffix: Operators
    blocks: tuple[str, ...]
    """Paths of the submodules that are the layers, in order."""
    flops_per_sample: int
    """Model FLOPs of one sample, forward and backward."""
    divided: Divided | None = None
    """How tensor parallelism divides it; None = it does not."""
    hidden: tuple[int, ...] = ()
    """Shape of what the blocks hand on, without the batch; empty = no pipeline cuts it."""
    shared: tuple[TracedWeight, ...] = ()
    """Parameters that both prefix and suffix use, such as a tied table; counted in the prefix."""


def num_params(operators: Iterable[TracedOperator]) -> int:
    """Parameters first used by these operators."""
    return sum(weight.elements for op in operators for weight in op.weights)
