"""Which tensors are alive when: the allocation curve of one graph, forward and backward.

The walk plays the operators in order. Forward: outputs and saved internals appear, inputs go after
their last use unless they are saved. Backward, in reverse: gradients of inputs appear, saved
tensors go after the backward of the last operator that saved them. Where some operators run again,
what their consumers need is back when the backward of the graph starts, and goes after that of its
producer; what an operator keeps inside of it is there during its own backward. The maximum of the
live bytes is the peak; everything is an array over layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .graph import Array, Graph, Operator, Sizes
from .operators import transients
from .standing import main_tensor, moves, standing, total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """Bytes of one graph and one micro-batch."""

    saved: Array
    """Kept from forward to backward, the input included when it is saved."""
    forward_peak: Array
    """Largest live sum in forward, input and saved tensors of this graph included."""
    backward_peak: Array
    """Largest live sum in backward, this graph's saved tensors included; of its weights' gradients
    those being made, which are then added to others."""
    backward_peak_fresh: Array
    """The same when nothing is there to add to: every gradient made so far stays."""
    loss: Array
    """Part of `saved` that is the loss's."""
    landed: Array
    """How much larger the peaks of backward are when all that was saved came back in one buffer,
    which goes as a whole; zero where that is not asked for."""


def liveness(graph: Graph, sizes: Sizes, *, lands: bool = False) -> Liveness:
    """The allocation curve of a graph under its recompute setting; `lands` asks for `landed`."""
    forward_kept, kept = _forward(graph, sizes, _saved_names(graph))
    saved = sum(kept.values(), np.zeros(1))
    backward, fresh = _backward(graph, sizes)
    landed = _backward(graph, sizes, lands=True)[0] - backward if lands else np.zeros(1)
    loss = np.zeros(1)
    for op in graph.operators:
        if op.kind == "cross_entropy":
            loss = op.saves[0].num_bytes(sizes)
    if graph.checkpointed:
        boundary = graph.boundary.num_bytes(sizes)
        again = forward_kept + boundary  # the incoming gradient waits during recomputation
        kept = {t.name for t in graph.kept}
        forward_free, more = _forward(graph, sizes, kept)
        return Liveness(
            saved=sum(more.values(), boundary),
            forward_peak=forward_free,
            backward_peak=np.maximum(again, backward),
            backward_peak_fresh=np.maximum(again, fresh),
            loss=loss,
            landed=np.zeros(1),
        )
    return Liveness(
        saved=saved,
        forward_peak=forward_kept,
        backward_peak=backward,
        backward_peak_fresh=fresh,
        loss=loss,
        landed=landed,
    )


def saved_tensors(graph: Graph, sizes: Sizes) -> dict[str, Array]:
    """What a graph keeps from forward to backward: bytes by tensor, the largest first."""
    names = {t.name for t in graph.kept} if graph.checkpointed else _saved_names(graph)
    _, kept = _forward(graph, sizes, names)
    if graph.checkpointed:
        kept[graph.boundary.name] = graph.boundary.num_bytes(sizes)
    return dict(sorted(kept.items(), key=lambda item: -float(np.max(item[1]))))


def _saved_names(graph: Graph) -> set[str]:
    return {t.name for op in graph.operators for t in op.saves}


def _forward(graph: Graph, sizes: Sizes, keep: set[str]) -> tuple[Array, dict[str, Array]]:
    """Peak of the forward walk, and the bytes of what is left of `keep` by tensor."""
    last_use: dict[str, int] = {}
    for index, op in enumerate(graph.operators):
        for tensor in op.inputs:
            last_use[tensor.name] = index
    live: dict[str, Array] = {graph.boundary.name: graph.boundary.num_bytes(sizes)}
    peak, before = np.zeros(1), live[graph.boundary.name]
    for index, op in enumerate(graph.operators):
        new = {t.name: t.num_bytes(sizes) for t in op.outputs}
        for tensor in op.saves:
            if tensor.name not in live and tensor.name not in new:
                new[tensor.name] = tensor.num_bytes(sizes)
        added = sum(new.values(), np.zeros(1))
        if op.kind == "edge":  # where nothing is exchanged the edge hands the tensor on
            peak = np.maximum(peak, before + np.where(moves(op, sizes), added, 0.0))
        else:
            extra = transients(op.kind, op.outputs[-1].dtype)[0] * main_tensor(op).num_bytes(sizes)
            extra = extra + total_bytes(op.held_forward, sizes)
            peak = np.maximum(peak, before + added + extra)
        live.update(new)
        made, read = _names(op), {t.name for t in op.inputs}
        gone = (n for n in live if n not in keep and last_use.get(n, -1) <= index)
        before = before + added
        for name in [n for n in gone if n not in made or n in read]:
            before = before - live.pop(name)
    return peak, {name: size for name, size in live.items() if name in keep}


def _names(op: Operator) -> set[str]:
    return {t.name for t in op.outputs}


def _backward(graph: Graph, sizes: Sizes, *, lands: bool = False) -> tuple[Array, Array]:
    """Peaks of the backward walk: weights' gradients leaving at once, or staying."""
    there = standing(graph, sizes, lands=lands)
    grads: dict[str, Array] = {t.name: t.num_bytes(sizes) for t in graph.operators[-1].outputs}
    waiting = sum(grads.values(), np.zeros(1))
    peak, fresh, stayed = np.zeros(1), np.zeros(1), np.zeros(1)
    for op in reversed(graph.operators):
        coming = there.before(op)
        peak = np.maximum(peak, coming + waiting)
        fresh = np.maximum(fresh, coming + waiting + stayed)
        trained = (t.num_bytes(sizes) for t in op.weights if t.trainable)
        weights = sum(trained, np.zeros(1))
        made, making = _input_gradients(op, sizes, grads)
        making = sum((t.num_bytes(sizes) for t in op.unpacks), making)
        making = making + total_bytes(op.held_backward, sizes)
        here = there.held + there.inside(op) + waiting
        peak = np.maximum(peak, here + making + weights)
        stayed = stayed + weights
        fresh = np.maximum(fresh, here + making + stayed)
        for tensor in op.outputs:
            waiting = waiting - grads.pop(tensor.name, 0.0)
        there.after(op)
        for name, size in made.items():
            if name in grads:  # two consumers: both gradients and their sum live for a moment
                held = there.held + waiting
                peak = np.maximum(peak, held + 2 * size)
                fresh = np.maximum(fresh, held + 2 * size + stayed)
                waiting = waiting - grads[name]
            waiting = waiting + size
            grads[name] = size
    return peak, fresh


def _input_gradients(
    op: Operator, sizes: Sizes, grads: dict[str, Array]
) -> tuple[dict[str, Array], Array]:
    """Gradients that remain after the operator's backward, and the bytes live while making them."""
    if not op.grad_inputs:
        return {}, np.zeros(1)
    if op.kind == "add":  # the same gradient goes to both inputs: no new tensor
        out = grads[op.outputs[0].name]
        first, *others = op.inputs
        made = {first.name: out, **{t.name: 0.0 * out for t in others}}
        return made, np.zeros(1)
    made = {t.name: t.num_bytes(sizes) for t in op.inputs}
    total = sum(made.values(), np.zeros(1))
    if op.kind == "edge":
        return made, np.where(moves(op, sizes), total, 0.0)
    extra = transients(op.kind, op.outputs[-1].dtype)[1] * main_tensor(op).num_bytes(sizes)
    if op.kind == "cross_entropy":  # a cut vocabulary takes one pass over its gradient, not two
        extra = np.where(sizes["tp"] > 1, np.maximum(total, extra / 2), extra)
    return made, np.maximum(total, extra)
