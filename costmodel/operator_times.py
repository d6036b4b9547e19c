"""Seconds of all operators of one graph, forward, backward and again.

`Prices` knows what an operator costs by its kind and size. What else a stack and the options of a
plan make of it is said here: recipes of low precision, kernels of attention, compiled layers,
uneven experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .by_shape import Times, cheapest
from .cores import core_s, merges_s
from .graph import Array, Collective, Graph, Operator, Sizes, volume
from .layers.attention import CORE
from .layout import Layouts
from .operators import KINDS
from .options import Options
from .prices import Prices
from .rates import is_compute, is_matmul
from .techniques.precision import BY_SHAPE

FLASH_VERSIONS = {"flash1": 0.6, "flash2": 1.0, "flash3": 1.25}
"""Rate of a flash kernel relative to the stack's own constants, which stand for the second version.
Dao 2023 (arXiv 2307.08691, figures 4 to 6) and Shah et al. 2024 (arXiv 2407.08608, figure 5), at
long sequences: about 1.7 from the first to the second, 1.5 to the third on H100 in forward and less
in backward."""


BOTH_GRADIENTS = ("grouped_linear", "conv")
"""Kinds whose backward is the input's gradient and the weights', each with the FLOPs of a forward
(`operators.KINDS`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTimes:
    """Seconds per micro-batch, without communication."""

    forward_s: Array
    backward_s: Array
    """Without what runs again."""
    weight_s: Array
    """Part of `backward_s` for which no other operator waits: gradients of weights."""
    recompute_s: Array
    streaming_s: Array
    """Part of forward and backward that is bound by memory."""
    forward_launches: int
    backward_launches: int
    beside_forward: dict[str, Array]
    """Of each operator by name: what communication beside it can hide behind."""
    beside_backward: dict[str, Array]
    near_forward: dict[str, Array]
    """Of each edge by name: the matmuls that read its output or make its input."""
    near_backward: dict[str, Array]
    """The same of their input gradients."""
    near_weights: dict[str, Array]
    """The gradients of the weights of those that read its output, for which nothing waits."""
    again: frozenset[str]
    """Operators that run again in backward."""


def operator_times(
    graph: Graph, sizes: Sizes, layouts: Layouts, prices: Prices, options: Options
) -> OperatorTimes:
    """The sums over a graph's operators."""
    zero = np.zeros(len(layouts))
    forward, backward, recompute = zero.copy(), zero.copy(), zero.copy()
    weight, streaming = zero.copy(), zero.copy()
    near = _Near.of(graph)
    forward_launches = backward_launches = 0
    beside_forward: dict[str, Array] = {}
    beside_backward: dict[str, Array] = {}
    again = runs_again(graph, prices.pool.stack.recompute_stops_early)
    merged, merged_back = merges_s(graph, sizes, options.cp_kind, prices)

    def time_of(op: Operator) -> Times:
        return operator_s(op, sizes, prices, options)

    free = options.linears == BY_SHAPE
    chosen = cheapest(graph, time_of) if free else {}
    for op in graph.operators:
        if op.kind == "edge":
            there, back = _edge_copies(op, sizes, prices)
        else:
            there, back, of_weights = chosen.get(op.name) or time_of(op)
            weight = weight + of_weights
            exchanged = _exchange_copies(op, sizes, prices)
            there, back = there + exchanged[0], back + exchanged[1]
            if op.name == CORE:
                there, back = there + merged, back + merged_back
            if not is_compute(op.kind):
                streaming = streaming + there + back
            if is_matmul(op.kind):
                near.add(op, there, back, of_weights)
            launches = 0 if free and not op.grad_inputs else KINDS[op.kind].launches
            forward_launches += launches
            backward_launches += 2 * launches
        forward, backward = forward + there, backward + back
        beside_forward[op.name], beside_backward[op.name] = there, back
        if op.name in again:
            recompute = recompute + there
            beside_backward[op.name] = back + there
            if op.kind != "edge":
                backward_launches += KINDS[op.kind].launches
    return OperatorTimes(
        forward_s=forward,
        backward_s=backward + _joins(graph, sizes, prices),
        weight_s=weight,
        recompute_s=recompute,
        streaming_s=streaming,
        forward_launches=forward_launches,
        backward_launches=backward_launches,
        beside_forward=beside_forward,
        beside_backward=beside_backward,
        near_forward=near.forward,
        near_backward=near.backward,
        near_weights=near.weights,
        again=again,
    )


def waiting_bytes(graph: Graph, sizes: Sizes) -> Array:
    """Inputs and output gradients of the operators whose weights' gradients may be put off.

    Of a layer without recomputation about as much as it keeps from forward to backward: 32 against
    34 bytes per token and hidden unit in Qi et al. 2023, table 1.
    """
    tensors: dict[str, Array] = {}
    for op in graph.operators:
        if op.kind in ("linear", *BOTH_GRADIENTS) and op.weights[0].trainable:
            for end, group in (("input", op.inputs), ("gradient", op.outputs)):
                tensors |= {f"{end} {t.name}": t.num_bytes(sizes) for t in group}
    return sum(tensors.values(), np.zeros(1))


def runs_again(graph: Graph, stops_early: bool) -> frozenset[str]:
    """Operators that run again in backward: of a checkpointed graph all of them.

    Or, where recomputation stops once everything saved is back, those before the last that saves
    something, which saves its inputs alone.
    """
    if not graph.checkpointed:
        return frozenset(op.name for op in graph.operators if op.recomputed)
    kept = {t.name for t in graph.kept}
    some = [op for op in graph.operators if not {t.name for t in op.outputs} <= kept]
    if not stops_early:
        return frozenset(op.name for op in some)
    last = max(index for index, op in enumerate(some) if op.saves)
    return frozenset(op.name for op in some[:last])


class _Near:
    """Seconds of the matmuls next to each edge."""

    def __init__(self, into: dict[str, str], out_of: dict[str, str]) -> None:
        self._into, self._out_of = into, out_of
        names = [*into.values(), *out_of.values()]
        self.forward = dict.fromkeys(names, np.zeros(1))
        self.backward = dict.fromkeys(names, np.zeros(1))
        self.weights = dict.fromkeys(names, np.zeros(1))

    @staticmethod
    def of(graph: Graph) -> _Near:
        """Edges by the tensor that they make and by the one that they take."""
        edges = [op for op in graph.operators if op.kind == "edge"]
        return _Near(
            into={op.outputs[0].name: op.name for op in edges},
            out_of={op.inputs[0].name: op.name for op in edges},
        )

    def add(self, op: Operator, there: Array, back: Array, of_weights: Array) -> None:
        """A matmul."""
        reads = self._into.get(op.inputs[0].name) if op.inputs else None
        makes = self._out_of.get(op.outputs[0].name) if op.outputs else None
        for edge in (reads, makes):
            if edge is not None:
                self.forward[edge] = self.forward[edge] + there
                self.backward[edge] = self.backward[edge] + back - of_weights
        if reads is not None:
            self.weights[reads] = self.weights[reads] + of_weights


def operator_s(op: Operator, sizes: Sizes, prices: Prices, options: Options) -> Times:
    """One operator: forward, backward, and of the backward the gradients of weights.

    Those of norms and embeddings, which are small, are left with the rest.
    """
    dtype = op.compute or (op.inputs[0].dtype if op.grad_inputs else op.outputs[0].dtype)
    shape = [volume(axes, sizes) for axes in op.price_axes]
    if op.kind.startswith("attention"):
        forward, backward = core_s(op, sizes, dtype, options, prices)
    else:
        forward, backward = prices.operator(op.kind, shape, dtype, options.runtime)
    weight = np.zeros(1)
    if op.kind == "linear" and op.weights[0].trainable:
        weight = prices.operator("linear_wgrad", shape, dtype)[0]
        backward = backward + weight
    elif op.kind in BOTH_GRADIENTS:
        weight = backward / 2
    if not op.grad_inputs and np.any(weight):
        weight = backward
    factor = _factor(op.kind, dtype, prices, options)
    return forward * factor, backward * factor, weight * factor


def _factor(kind: str, dtype: str, prices: Prices, options: Options) -> float:
    """Time relative to the operator's price."""
    stack = prices.pool.stack
    if kind.startswith("grouped"):  # a plan's own imbalance is in the rows already
        return stack.expert_imbalance if options.expert_imbalance is None else 1.0
    if is_matmul(kind):
        rowwise = dtype == "fp8" and options.recipe == "rowwise"
        return 1.0 / stack.rowwise_fraction if rowwise else 1.0
    if kind.startswith("attention"):
        return 1.0 / FLASH_VERSIONS.get(options.attention, 1.0)
    return 1.0


def _joins(graph: Graph, sizes: Sizes, prices: Prices) -> Array:
    """Backward additions where a tensor has several consumers: their gradients are summed."""
    uses: dict[str, int] = {}
    tensors = {}
    for op in graph.operators:
        if not op.grad_inputs:
            continue
        for tensor in op.inputs:
            uses[tensor.name] = uses.get(tensor.name, 0) + 1
            tensors[tensor.name] = tensor
    seconds = np.zeros(1)
    for name, count in uses.items():
        if count > 1:
            shape = [volume(tensors[name].axes, sizes)]
            seconds = seconds + (count - 1) * prices.operator("add", shape, tensors[name].dtype)[0]
    return seconds


def _exchange_copies(op: Operator, sizes: Sizes, prices: Prices) -> tuple[Array, Array]:
    """Copies around an operator's all-to-alls over ulysses ranks, forward and backward.

    What goes out is cut by heads in a copy, and so is its gradient; what comes back from them is
    put together in another. Behind the core it is the other way round.
    """
    zero = np.zeros(1)
    if not prices.pool.stack.sequence_copies or np.all(sizes.get("ulysses", zero) <= 1):
        return zero, zero
    back_again = op.name == "wo"
    forward, backward = zero, zero
    for c in op.forward_collectives:
        if c.axis == "ulysses":
            shape = [volume(c.buffer.axes, sizes)]
            one = prices.operator("copy", shape, c.buffer.dtype)[0]
            one = np.where(sizes["ulysses"] > 1, one, 0.0)
            forward = forward + (2 * one if back_again else one)
            backward = backward + (one if back_again else 2 * one)
    return forward, backward


def _edge_copies(op: Operator, sizes: Sizes, prices: Prices) -> tuple[Array, Array]:
    """Copies around the collectives of an edge, forward and backward, where the stack makes them.

    A gathered sequence is made contiguous afterwards, one to be scattered before. An edge without
    collectives is a copy itself.
    """
    if op.copies_over is not None:
        shape = [volume(op.inputs[0].axes, sizes)]
        seconds = prices.operator("copy", shape, op.inputs[0].dtype)[0]
        seconds = np.where(sizes[op.copies_over] > 1, seconds, 0.0)
        return seconds, seconds

    def copies(group: Sequence[Collective]) -> Array:
        seconds = np.zeros(1)
        for c in group:
            if c.axis == "tp" and c.kind != "all_reduce":
                shape = [volume(c.buffer.axes, sizes)]
                seconds = seconds + prices.operator("copy", shape, c.buffer.dtype)[0]
        return np.where((sizes["tp"] > 1) & (sizes["batch"] > 1), seconds, 0.0)

    if not prices.pool.stack.sequence_copies:
        return np.zeros(1), np.zeros(1)
    return copies(op.forward_collectives), copies(op.backward_collectives)
