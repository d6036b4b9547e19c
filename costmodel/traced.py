"""Traced modules as graphs of operators: the counterpart of `executors/trace_module.py`.

A traced operator knows its sizes as (fixed, per sample): the axis label `f+pb` stands for a size of
f + p x micro-batch, so that the formulas of all other graphs hold. The forward is one graph. Kinds
with a backward of their own (`OWN_BACKWARD`) bring it along; what the others do in backward stands
in a second graph, whose forward times are backward times of the layer.

Tensor parallelism of degree t divides the cut part of a size: `f+pb/g+qb` stands for f - g + g / t
plus p - q + q / t for every sample. A module that has a `tp_plan` has these parts twice: as it runs
whole, and as it runs cut, with the collectives between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from ..model import Model
from ..traced import UNCUT, Operators, Size, TracedOperator, TracedTensor, TracedWeight
from .graph import Array, Axes, Collective, Graph, Operator, Sizes, Tensor, volume
from .layout import Layouts
from .operators import KINDS

OWN_BACKWARD = frozenset(
    {"linear", "gelu", "layernorm", "embedding", "cross_entropy", "attention", "attention_full"}
)
"""Kinds whose price includes their backward."""

NOTHING = "0+0b"


def label(size: Size, cut: Size = UNCUT) -> str:
    """The axis label of a size.

    >>> label((16, 4096)), label((16, 4096), (0, 1024))
    ('16+4096b', '16+4096b/0+1024b')
    """
    whole = f"{size[0]}+{size[1]}b"
    return whole if cut == UNCUT else f"{whole}/{cut[0]}+{cut[1]}b"


def sizes(operators: Iterable[TracedOperator], layouts: Layouts) -> Sizes:
    """Local size of every axis label of these operators, and what all graphs need."""
    batch = layouts.micro_batch_seqs.astype(float)
    tp = layouts.tp.astype(float)
    table: dict[str, Array] = {
        NOTHING: 0.0 * batch,
        "batch": batch,
        "one": np.ones(len(layouts)),
        "tp": tp,
    }

    def local(size: Size, cut: Size) -> Array:
        """The whole, less what the other ranks have."""
        return size[0] + size[1] * batch - (cut[0] + cut[1] * batch) * (1 - 1 / tp)

    for op in operators:
        used = list(zip(op.sizes, _cuts(op.sizes, op.cut), strict=True))
        for work in op.backward:
            used += zip(work.sizes, _cuts(work.sizes, work.cut), strict=True)
        tensors = (*op.inputs, *op.outputs, *op.saves, *(c.buffer for c in op.collectives))
        used += [(tensor.elements, tensor.cut) for tensor in tensors]
        used += [weight_sizes(weight) for weight in op.weights]
        for size, cut in used:
            table[label(size, cut)] = local(size, cut)
    boundary = (table[label(t.elements, t.cut)] for t in _boundary(operators))
    table["boundary"] = sum(boundary, 0.0 * batch)
    return table


def weight_sizes(weight: TracedWeight) -> tuple[Size, Size]:
    """The size of a parameter, and its cut part."""
    size = (weight.elements, 0)
    return size, size if weight.cut else UNCUT


def weight_table(weights: Sequence[TracedWeight], layouts: Layouts) -> Sizes:
    """Local sizes of the axis labels of parameters."""
    tp = layouts.tp.astype(float)
    return {
        label(*weight_sizes(w)): w.elements / (tp if w.cut else np.ones(len(layouts)))
        for w in weights
    }


def shared_weights(model: Model, divided: bool) -> list[TracedWeight]:
    """The parameters that both ends of a module use, as its prefix holds them."""
    assert model.traced is not None
    names = {weight.name for weight in model.traced.shared}
    prefix = parts(model, divided)[0]
    return [weight for op in prefix for weight in op.weights if weight.name in names]


def shared_params(model: Model, layouts: Layouts) -> Array:
    """Their local elements."""

    def total(divided: bool) -> Array:
        shared = shared_weights(model, divided)
        table = weight_table(shared, layouts)
        return sum((table[label(*weight_sizes(w))] for w in shared), np.zeros(len(layouts)))

    return np.where(layouts.tp > 1, total(True), total(False))


def graph(
    name: str, operators: Sequence[TracedOperator], more: Sequence[TracedWeight] = ()
) -> Graph:
    """The forward of some traced operators, which use `more` parameters; none do nothing."""
    boundary = Tensor(name="boundary", axes=("boundary",))
    entering = list(_boundary(operators))
    if len(entering) == 1:
        boundary = replace(_tensor(entering[0]), name=entering[0].name)
    if not operators:
        return Graph(name=name, operators=(_idle(),), boundary=_idle().outputs[0])
    made = tuple(map(_operator, operators))
    weights = {w.name: w for op in made for w in op.weights} | {w.name: _weight(w) for w in more}
    return Graph(name=name, operators=made, boundary=boundary, weights=tuple(weights.values()))


def backward_graph(operators: Sequence[TracedOperator]) -> Graph:
    """What the backward does beyond the backward of the forward's kinds, in forward-only kinds."""
    done = Tensor(name="gradient", axes=(NOTHING,))
    works = [
        Operator(
            name=f"{op.name}.backward",
            kind=work.kind,
            price_axes=_axes(work.sizes, work.cut),
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
        if op.kind == "edge":
            continue
        shape = [volume(axes, table) for axes in _axes(op.sizes, op.cut)]
        forward = forward + KINDS[op.kind].forward_flops(shape)
        backward = backward + KINDS[op.kind].backward_flops(shape)
        if op.kind == "linear":
            backward = backward + KINDS["linear_wgrad"].forward_flops(shape)
        for work in op.backward:
            shape = [volume(axes, table) for axes in _axes(work.sizes, work.cut)]
            backward = backward + KINDS[work.kind].forward_flops(shape)
    return forward, backward


def parts(model: Model, divided: bool = False) -> tuple[Operators, ...]:
    """Operators of the prefix, of every layer group, and of the suffix; `divided` by tp or not."""
    assert model.traced is not None
    cut = model.traced.divided
    if divided and cut is not None:
        return (cut.prefix, *cut.layers, cut.suffix)
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


def _cuts(sizes: Sequence[Size], cut: Sequence[Size]) -> Sequence[Size]:
    return cut or (UNCUT,) * len(sizes)


def _axes(sizes: Sequence[Size], cut: Sequence[Size]) -> tuple[Axes, ...]:
    return tuple((label(s, c),) for s, c in zip(sizes, _cuts(sizes, cut), strict=True))


def _tensor(tensor: TracedTensor) -> Tensor:
    return Tensor(name=tensor.name, axes=(label(tensor.elements, tensor.cut),), dtype=tensor.dtype)


def _weight(weight: TracedWeight) -> Tensor:
    return Tensor(
        name=weight.name,
        axes=(label(*weight_sizes(weight)),),
        dtype="param",
        trainable=weight.trainable,
    )


def _operator(op: TracedOperator) -> Operator:
    if op.kind == "edge":
        return _edge(op)
    return Operator(
        name=op.name,
        kind=op.kind,
        price_axes=_axes(op.sizes, op.cut),
        inputs=tuple(map(_tensor, op.inputs)),
        outputs=tuple(map(_tensor, op.outputs)),
        saves=tuple(map(_tensor, op.saves)),
        weights=tuple(map(_weight, op.weights)),
        grad_inputs=bool(op.inputs),
    )


def _edge(op: TracedOperator) -> Operator:
    """Collectives between two operators, on tensors that stay where they are."""

    def of(backward: bool) -> tuple[Collective, ...]:
        return tuple(
            Collective(kind=c.kind, axis="tp", buffer=_tensor(c.buffer))
            for c in op.collectives
            if c.backward == backward
        )

    return replace(
        _idle(), name=op.name, forward_collectives=of(False), backward_collectives=of(True)
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
