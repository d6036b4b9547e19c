"""Traced modules as graphs of operators: the counterpart of `executors/trace_module.py`.

A traced operator knows its sizes as (fixed, per sample): the axis label `f+pb` stands for a size of
f + p x micro-batch, so that the formulas of all other graphs hold. The forward is one graph. Kinds
with a backward of their own (`OWN_BACKWARD`) bring it along; what the others do in backward stands
in a second graph, whose forward times are backward times of the layer.

Data parallelism alone divides a traced module: no axis but the batch has a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from ..model import Model
from ..traced import Size, TracedOperator, TracedTensor
from .graph import Array, Axes, Graph, Operator, Sizes, Tensor, volume
from .layout import Layouts
from .operators import KINDS

OWN_BACKWARD = frozenset(
    {"linear", "gelu", "layernorm", "embedding", "cross_entropy", "attention", "attention_full"}
)
"""Kinds whose price includes their backward."""

NOTHING = "0+0b"


def label(size: Size) -> str:
    """The axis label of a size.

    >>> label((16, 4096))
    '16+4096b'
    """
    return f"{size[0]}+{size[1]}b"


def sizes(operators: Iterable[TracedOperator], layouts: Layouts) -> Sizes:
    """Local size of every axis label of these operators, and what all graphs need."""
    batch = layouts.micro_batch_seqs.astype(float)
    table: dict[str, Array] = {
        NOTHING: 0.0 * batch,
        "batch": batch,
        "one": np.ones(len(layouts)),
        "tp": layouts.tp.astype(float),
    }
    for op in operators:
        used: list[Size] = [*op.sizes, *(size for work in op.backward for size in work.sizes)]
        used += [tensor.elements for tensor in (*op.inputs, *op.outputs, *op.saves)]
        used += [(weight.elements, 0) for weight in op.weights]
        for fixed, per_sample in used:
            table[label((fixed, per_sample))] = fixed + per_sample * batch
    table["boundary"] = sum((table[label(t.elements)] for t in _boundary(operators)), 0.0 * batch)
    return table


def graph(name: str, operators: Sequence[TracedOperator]) -> Graph:
    """The forward of some traced operators; an empty one does nothing."""
    boundary = Tensor(name="boundary", axes=("boundary",))
    entering = list(_boundary(operators))
    if len(entering) == 1:
        boundary = replace(_tensor(entering[0]), name=entering[0].name)
    if not operators:
        return Graph(name=name, operators=(_idle(),), boundary=_idle().outputs[0])
    return Graph(name=name, operators=tuple(map(_operator, operators)), boundary=boundary)


def backward_graph(operators: Sequence[TracedOperator]) -> Graph:
    """What the backward does beyond the backward of the forward's kinds, in forward-only kinds."""
    done = Tensor(name="gradient", axes=(NOTHING,))
    works = [
        Operator(
            name=f"{op.name}.backward",
            kind=work.kind,
            price_axes=_axes(work.sizes),
            inputs=(done,),
            outputs=(done,),
        )
        for op in operators
        for work in op.backward
    ]
    return Graph(name="backward", operators=tuple(works) or (_idle(),), boundary=done)


def flops(operators: Sequence[TracedOperator], table: Sizes) -> tuple[Array, Array]:
    """FLOPs of one micro-batch, forward and backward (a multiply-add is two)."""
    forward, backward = np.zeros(1), np.zeros(1)
    for op in operators:
        shape = [volume(axes, table) for axes in _axes(op.sizes)]
        forward = forward + KINDS[op.kind].forward_flops(shape)
        backward = backward + KINDS[op.kind].backward_flops(shape)
        if op.kind == "linear":
            backward = backward + KINDS["linear_wgrad"].forward_flops(shape)
        for work in op.backward:
            shape = [volume(axes, table) for axes in _axes(work.sizes)]
            backward = backward + KINDS[work.kind].forward_flops(shape)
    return forward, backward


def parts(model: Model) -> tuple[tuple[TracedOperator, ...], ...]:
    """Operators of the prefix, of every layer group, and of the suffix."""
    assert model.traced is not None
    layers = (layer.operators for layer in model.layers)
    return (model.traced.prefix, *layers, model.traced.suffix)


def _boundary(operators: Iterable[TracedOperator]) -> tuple[TracedTensor, ...]:
    """Tensors with gradients that come from outside."""
    made: set[str] = set()
    found: dict[str, TracedTensor] = {}
    for op in operators:
        for tensor in op.inputs:
            if tensor.name not in made:
                found[tensor.name] = tensor
        made |= {tensor.name for tensor in op.outputs}
    return tuple(found.values())


def _axes(some: Iterable[Size]) -> tuple[Axes, ...]:
    return tuple((label(size),) for size in some)


def _tensor(tensor: TracedTensor) -> Tensor:
    return Tensor(name=tensor.name, axes=(label(tensor.elements),), dtype=tensor.dtype)


def _operator(op: TracedOperator) -> Operator:
    weights = tuple(
        Tensor(
            name=weight.name,
            axes=(label((weight.elements, 0)),),
            dtype="param",
            trainable=weight.trainable,
        )
        for weight in op.weights
    )
    return Operator(
        name=op.name,
        kind=op.kind,
        price_axes=_axes(op.sizes),
        inputs=tuple(map(_tensor, op.inputs)),
        outputs=tuple(map(_tensor, op.outputs)),
        saves=tuple(map(_tensor, op.saves)),
        weights=weights,
        grad_inputs=bool(op.inputs),
    )


def _idle() -> Operator:
    """An operator that costs nothing: what an empty part of a module consists of."""
    nothing = Tensor(name="nothing", axes=(NOTHING,))
    return Operator(
        name="nothing",
        kind="edge",
        price_axes=((NOTHING,),),
        inputs=(nothing,),
        outputs=(nothing,),
    )
