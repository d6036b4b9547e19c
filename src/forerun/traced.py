"""What a traced module consists of: its operators, with sizes that are linear in the batch."""

from __future__ import annotations

from collections.abc import Iterable

from .document import Value

Size = tuple[int, int]
"""A size of a traced module: fixed part, and what every sample of the batch adds."""


class TracedTensor(Value, frozen=True, kw_only=True):
    """A storage that operators of a traced module share, whatever views lie on it."""

    name: str
    elements: Size
    dtype: str
    """`compute` for what follows the plan's precision, otherwise a dtype of that many bytes."""


class TracedWeight(Value, frozen=True, kw_only=True):
    """A parameter of a traced module."""

    name: str
    elements: int
    trainable: bool = True


class TracedWork(Value, frozen=True, kw_only=True):
    """One operator of a traced backward: a kind of `costmodel/operators.py` and its sizes."""

    kind: str
    sizes: tuple[Size, ...]


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


class Traced(Value, frozen=True, kw_only=True):
    """What a model is besides its layers when it came from a user's function."""

    target: str
    """`package.module:function`; never imported when a plan is loaded."""
    tokens: bool
    """Whether the module takes tokens of the corpus; otherwise the function makes its batches."""
    seq_tokens: int
    """The sequence length it was traced for."""
    prefix: tuple[TracedOperator, ...]
    suffix: tuple[TracedOperator, ...]
    blocks: tuple[str, ...]
    """Paths of the submodules that are the layers, in order."""
    flops_per_sample: int
    """Model FLOPs of one sample, forward and backward."""


def num_params(operators: Iterable[TracedOperator]) -> int:
    """Parameters first used by these operators."""
    return sum(weight.elements for op in operators for weight in op.weights)
