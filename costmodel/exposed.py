"""Communication inside a layer: which ranks exchange what, and how much of it a step feels.

Collectives of tensor and expert parallelism stand between dependent operators. Those of a ring of
context-parallel ranks run beside the attention that reads what arrives, and copies of offloaded
activations beside everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .graph import Array, Axes, Collective, Graph, Sizes
from .layout import Layouts
from .options import Options
from .overlap import kept_share
from .prices import Prices
from .techniques import offload

HIDDEN_SHARE = 0.5
"""Part of an operator's time that communication beside it can hide behind: a ring's first and last
steps have nothing to hide behind, and both want the device. Assumed."""
MESH_AXES = {
    "ulysses": "cp", "ring": "cp", "expert_tp": "tp", "even_tp": "tp", "uneven_tp": "tp",
    "micro_batch_ranks": "ep", "batch_ranks": "ep",
}  # fmt: skip
"""The mesh axis that a group lies on, where it has another name: ulysses and ring are the two parts
of cp, expert_tp is what tp is for experts; the counts of a balance loss are told as those of rows
are, though over more ranks."""


def mesh_axis(axis: str) -> str:
    """The mesh axis of a collective's group."""
    return MESH_AXES.get(axis, axis)


def ranks_of(axis: str, layouts: Layouts) -> Array:
    """Ranks of a group."""
    return getattr(layouts, axis).astype(float)


def stride_of(axis: str, layouts: Layouts) -> Array:
    """Distance of neighbours: tp is innermost, then cp with ulysses inside the ring.

    ep lies over cp and dp, and over tp where experts are not cut by it.
    """
    if mesh_axis(axis) == "tp":
        return np.ones(1)
    if axis == "ep":
        return layouts.expert_tp.astype(float)
    if axis in ("micro_batch_ranks", "batch_ranks"):
        return np.where(layouts.sequence_parallel > 0, 1, layouts.tp).astype(float)
    inside = layouts.tp * layouts.ulysses if axis == "ring" else layouts.tp
    return inside.astype(float)


def forward_collectives(graph: Graph, options: Options, prices: Prices) -> list[Collective]:
    """Collectives of a forward; gathers of what fp8 matmuls read move fp8 where the stack does."""
    low = options.gathers_low(prices.pool.stack)
    return [
        replace(c, buffer=replace(c.buffer, dtype="fp8"))
        if low and c.kind == "all_gather" and c.axis == "tp"
        else c
        for op in graph.operators
        for c in op.forward_collectives
    ]


def backward_collectives(graph: Graph, again: frozenset[str], options: Options) -> list[Collective]:
    """Collectives of a backward, with those of the operators that run again."""
    own = [c for op in graph.operators for c in op.backward_collectives]
    return own + again_collectives(graph, again, options)


def again_collectives(graph: Graph, again: frozenset[str], options: Options) -> list[Collective]:
    """Collectives of the operators that run again, on all tokens or on those left behind."""
    repeated = (c for op in graph.operators if op.name in again for c in op.forward_collectives)
    more = [c for c in repeated if not c.once]
    return list(map(offload.of_left_tokens, more)) if offload.by_tokens(options) else more


def wire_bytes(group: Sequence[Collective], sizes: Sizes, layouts: Layouts) -> dict[str, Array]:
    """Bytes of the logical buffers by `collective@axis`."""
    total: dict[str, Array] = {}
    for c in group:
        key = f"{c.kind}@{mesh_axis(c.axis)}"
        moved = c.buffer.num_bytes(sizes) * (sizes[c.sent] if c.sent is not None else 1.0)
        moved = np.where(ranks_of(c.axis, layouts) > 1, moved, 0.0)
        moved = np.round(moved, 3)  # rows per token may be a fraction, all rows are not
        total[key] = total.get(key, np.zeros(len(layouts))) + moved
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What communication of one direction may run beside: seconds by name."""

    operators: Mapping[str, Array]
    matmuls: Mapping[str, Array]
    """Next to an edge."""
    weights: Mapping[str, Array]
    """Gradients of weights next to an edge; empty in forward."""


def exposed_s(
    group: Sequence[Collective],
    sizes: Sizes,
    layouts: Layouts,
    prices: Prices,
    options: Options,
    compute_s: Array,
    beside: Beside,
) -> dict[str, Array]:
    """Exposed seconds by mesh axis.

    At each collective that stands between operators, and at each round of one that cannot run
    beside them, the ranks, which computed for `compute_s` in all, wait for the slowest. Those
    beside one operator are hidden together, up to a part of its time.
    """
    stack = prices.pool.stack
    seconds: dict[str, Array] = {}
    hidden: dict[tuple[str, str], Array] = {}
    known: dict[tuple[str, str, Axes, str, str | None], Array] = {}
    meetings = np.zeros(1)
    for c in group:
        several = ranks_of(c.axis, layouts) > 1
        if c.overlaps is None:
            meetings = meetings + several
        elif c.passes is not None and not stack.can_overlap:
            meetings = meetings + several * sizes[c.passes]
    for c in group:
        ranks = ranks_of(c.axis, layouts)
        if np.all(ranks == 1):
            if c.overlaps is None:
                seconds.setdefault(mesh_axis(c.axis), np.zeros(len(layouts)))
            continue
        stride, groups = stride_of(c.axis, layouts), layouts.world / ranks
        key = (c.kind, c.axis, c.buffer.axes, c.buffer.dtype, c.passes)
        if key not in known:
            moved = c.buffer.num_bytes(sizes)
            if c.passes is None:
                known[key] = prices.collective(c.kind, moved, ranks, stride, groups)
            else:
                known[key] = sizes[c.passes] * round_s(moved, ranks, stride, groups, prices)
        one, axis = known[key], mesh_axis(c.axis)
        lost = prices.wait(compute_s / np.maximum(meetings, 1.0), ranks, groups)
        if c.overlaps is not None:
            if c.passes is not None and not stack.can_overlap:
                one = one + sizes[c.passes] * lost
            place = (axis, c.overlaps)
            hidden[place] = hidden.get(place, 0.0) + np.where(ranks > 1, one, 0.0)
            continue
        if axis == "tp":
            one = _tensor_parallel_s(c, one, ranks, prices, options, beside)
        if axis == "ep":
            one = one * stack.expert_parallel_exposed * (options.expert_imbalance or 1.0)
        here = np.where(ranks > 1, (one + lost) * prices.scale(f"exposed.{axis}"), 0.0)
        seconds[axis] = seconds.get(axis, 0.0) + here
    share = HIDDEN_SHARE if stack.can_overlap else 0.0
    for (axis, name), total in hidden.items():
        left = np.maximum(0.0, total - share * beside.operators[name])
        seconds[axis] = seconds.get(axis, 0.0) + left * prices.scale(f"exposed.{axis}")
    return seconds


def round_s(message: Array, ranks: Array, stride: Array, groups: Array, prices: Prices) -> Array:
    """Seconds of one round in which every rank passes a message on.

    An all-gather of all ranks' messages is ranks - 1 such rounds, in a ring and as measured.
    """
    whole = prices.collective("all_gather", message * ranks, ranks, stride, groups)
    return whole / np.maximum(ranks - 1, 1.0)


def _tensor_parallel_s(
    c: Collective, whole_s: Array, ranks: Array, prices: Prices, options: Options, beside: Beside
) -> Array:
    """What is felt of a collective of tensor parallelism.

    Between p ranks one that is cut up runs beside the matmul that makes or reads its parts, but for
    the first or last of p. One that sums gradients of inputs may run beside those of weights.
    Either way it slows these matmuls down.
    """
    stack = prices.pool.stack
    if c.edge is None or not stack.can_overlap:
        return whole_s * stack.tensor_parallel_exposed
    window_s, last = np.zeros(1), np.zeros(1)
    if c.kind != "all_reduce" and (stack.pipelines_tensor_parallel or options.async_tp):
        window_s, last = beside.matmuls[c.edge], 1.0 / ranks
    elif c.sums_gradients and stack.overlaps_weight_gradients:
        window_s = beside.weights[c.edge]
    hidden_s = np.minimum(whole_s, window_s)
    felt_s = whole_s - hidden_s * np.maximum(1.0 - kept_share(prices) - last, 0.0)
    return felt_s * stack.tensor_parallel_exposed


def copies_s(moved_bytes: Array, direction: str, options: Options, prices: Prices) -> Array:
    """Seconds of moving a layer's offloaded bytes one way: `out` of the device, or `in`."""
    seconds = prices.copy_s(direction, moved_bytes, options.offload_tier)
    return np.where(moved_bytes > 0, seconds, 0.0)


def exposed_copy_s(
    moved_bytes: Array, direction: str, options: Options, prices: Prices, compute_s: Array
) -> Array:
    """The part of that beyond the compute of one layer that it runs beside."""
    beside = compute_s * prices.copy_hidden_share
    moving_s = copies_s(moved_bytes, direction, options, prices)
    return np.maximum(0.0, moving_s - beside) * prices.scale("exposed.copy")
