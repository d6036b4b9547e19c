"""Which linears of a layer are worth running below 16 bits, at every layout's shapes.

A linear (M, N, K) gains in its three matmuls what its casts must not take away (torchao's rule,
docs/source/workflows/training.md, with the casts of our executors):

    sum over 3 matmuls of 2 M N K (1 / F_16bit - 1 / F_low)  >  t(weight) + t(gradient) + t(input)

with rates F at the shape of each. Linears that read one input share its cast: those that gain more
than their own casts take do so together if the sum of that pays for the input, else none does.
Casts are launched as well: `launch_s` is what one more launch costs a layer, next to nothing where
the device is behind its host, all of its host time where it waits for it. The bound of a search
leaves it out (`cheapest`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .graph import Array, Graph, Operator
from .operators import KINDS
from .techniques.precision import CAST, WEIGHT_CAST, is_low_precision

Times = tuple[Array, Array, Array]
"""Seconds forward, backward, and of the backward the gradients of weights."""
TimeOf = Callable[[Operator], Times]
LAUNCHES = 3
"""Of an operator, for each in its forward: a backward launches twice as many."""


def uses(graph: Graph, time_of: TimeOf, launch_s: float = 0.0) -> dict[str, NDArray[np.bool_]]:
    """Whether each linear below 16 bits of a graph is worth it, by name."""
    by_name = {op.name: op for op in graph.operators}
    found: dict[str, NDArray[np.bool_]] = {}
    for x_name, readers in _groups(graph).items():
        nets = {op.name: _net_s(op, by_name, time_of, launch_s) for op in readers}
        pays = sum((np.maximum(net, 0.0) for net in nets.values()), np.zeros(1))
        cast = replace(by_name[f"{x_name}{CAST}"], price_axes=(readers[0].inputs[0].axes,))
        worth = pays > time_of(cast)[0] + LAUNCHES * KINDS[cast.kind].launches * launch_s
        found |= {name: worth & (net > 0) for name, net in nets.items()}
    return found


def cheapest(graph: Graph, time_of: TimeOf) -> dict[str, Times]:
    """Times of the linears below 16 bits and of their casts, by name, each linear in whichever is
    faster."""
    by_name = {op.name: op for op in graph.operators}
    worth = uses(graph, time_of)
    times: dict[str, Times] = {}
    for x_name, readers in _groups(graph).items():
        cast = by_name[f"{x_name}{CAST}"]
        some = np.zeros(1, dtype=bool)
        back = np.zeros(1)
        for op in readers:
            use = worth[op.name]
            some = some | use
            back = back + np.where(use, _gradient_s(op, cast, time_of), 0.0)
            low, wide = time_of(op), time_of(replace(op, compute=None))
            times[op.name] = _each(use, low, wide)
            weight = by_name.get(f"{op.name}{WEIGHT_CAST}")
            if weight is not None:
                none = np.zeros(1)
                times[weight.name] = _each(use, time_of(weight), (none, none, none))
        times[cast.name] = (np.where(some, time_of(cast)[0], 0.0), back, back)
    return times


def _groups(graph: Graph) -> dict[str, list[Operator]]:
    """Linears below 16 bits by the name of their input."""
    groups: dict[str, list[Operator]] = {}
    for op in graph.operators:
        if op.compute is not None and is_low_precision(op):
            groups.setdefault(op.inputs[0].name, []).append(op)
    return groups


def _net_s(op: Operator, by_name: dict[str, Operator], time_of: TimeOf, launch_s: float) -> Array:
    """What a linear gains per micro-batch after casts of its weight and its output's gradient."""
    cast = by_name[f"{op.inputs[0].name}{CAST}"]
    gain = _total(time_of(replace(op, compute=None))) - _total(time_of(op))
    weight = by_name.get(f"{op.name}{WEIGHT_CAST}")
    paid = 0.0
    if weight is not None:
        paid = _total(time_of(weight)) + LAUNCHES * KINDS[weight.kind].launches * launch_s
    return gain - paid - _gradient_s(op, cast, time_of)


def _gradient_s(op: Operator, cast: Operator, time_of: TimeOf) -> Array:
    """The cast of the gradient of a linear's output."""
    alone = replace(cast, price_axes=(op.inputs[0].axes, op.outputs[0].axes))
    return time_of(alone)[1]


def _total(times: Times) -> Array:
    return times[0] + times[1]


def _each(use: NDArray[np.bool_], yes: Times, no: Times) -> Times:
    forward, backward, weight = (np.where(use, a, b) for a, b in zip(yes, no, strict=True))
    return forward, backward, weight
