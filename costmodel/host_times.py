"""What the host adds to a piece: glue beyond the operators, launches that the device waits for, and
what a long head hides of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..model import Model
from .exposed import ranks_of
from .graph import Array, Collective, Graph, Sizes
from .layers.attention import CORE
from .layers.rings import BLOCKS
from .layout import Layouts
from .operator_times import OperatorTimes
from .options import Options
from .pieces import Piece
from .prices import Prices
from .state_bytes import in_units

RUNTIME_LAUNCHES = {"eager": 1.0, "compiled": 0.5, "graphs": 0.05}
"""Host time per operator relative to eager launches: a compiled layer has about half the kernels, a
captured graph is launched as a whole. Assumed."""


def launches_s(
    graph: Graph, times: OperatorTimes, prices: Prices, options: Options
) -> tuple[float, float]:
    """Host time to launch a piece's operators on a GPU, forward and backward, Python included."""
    launch_s = prices.launch_s * RUNTIME_LAUNCHES[options.runtime]
    forward, backward = times.forward_launches * launch_s, times.backward_launches * launch_s
    if graph.name != "layer":
        return forward, backward
    glue = prices.beside("layer_forward"), prices.beside("layer_backward")
    if options.runtime == "compiled" and prices.beside("compiled_layer_forward"):
        forward, backward = (prices.beside(f"compiled_layer_{d}") for d in ("forward", "backward"))
        glue = 0.0, 0.0
    if graph.checkpointed:
        again = forward if options.runtime == "compiled" else 0.0  # launches of eager ones are in
        backward += again + glue[0] + prices.beside("checkpoint")
    return forward + glue[0], backward + glue[1]


def hooks_s(
    graph: Graph, layouts: Layouts, prices: Prices, options: Options
) -> tuple[Array, Array]:
    """Host time of the hooks around an FSDP unit, which on a GPU runs beside the device."""
    stack = prices.pool.stack
    if graph.name != "layer" or prices.launch_s == 0.0 or stack.sharding != "fsdp":
        return np.zeros(1), np.zeros(1)
    units = in_units(layouts, options, stack)
    forward = prices.beside("fsdp_unit_forward", stack.host_s_per_unit)
    backward = prices.beside("fsdp_unit_backward", stack.host_s_per_unit)
    return np.where(units, forward, 0.0), np.where(units, backward, 0.0)


def floor_s(
    compute_s: Array,
    comm_s: dict[str, Array],
    launching_s: Array,
    collectives: Sequence[Collective],
    layouts: Layouts,
    prices: Prices,
) -> tuple[Array, Array]:
    """What a piece takes beyond its device work because the host must launch it, and how much
    longer the device works on it than the host.

    Host and device work side by side: together (device^q + host^q)^(1/q).
    """
    if not np.any(launching_s):
        return np.zeros(1), np.zeros(1)
    stack = prices.pool.stack
    device_s = sum(comm_s.values(), compute_s)
    host_s = launching_s
    for c in collectives:
        host_s = host_s + np.where(ranks_of(c.axis, layouts) > 1, stack.host_s_per_collective, 0.0)
    q = stack.host_smoothness
    floor = (device_s**q + host_s**q) ** (1 / q) - device_s
    return floor, np.maximum(device_s - host_s, 0.0)


def glue_s(
    graph: Graph,
    sizes: Sizes,
    layouts: Layouts,
    prices: Prices,
    options: Options,
    again: frozenset[str],
    sp: bool,
) -> tuple[Array, Array]:
    """Host time beyond the operators: Python and autograd glue, DTensor dispatch, checkpoints."""
    if graph.name != "layer":
        return np.zeros(1), np.zeros(1)
    routed = any(op.kind == "routing" for op in graph.operators)
    forward, backward = prices.host("layer_forward"), prices.host("layer_backward")
    if routed:
        forward = max(forward, prices.host("expert_layer_forward"))
        backward = max(backward, prices.host("expert_layer_backward"))
    if graph.checkpointed:
        backward += forward + prices.host("checkpoint")
    prefix = "tp_sp_layer" if sp else "tp_layer"
    tp = layouts.tp > 1
    extra = prices.host(f"{prefix}_backward")
    if graph.checkpointed:
        extra += prices.host(f"{prefix}_forward")
    forward = forward + np.where(tp, prices.host(f"{prefix}_forward"), 0.0)
    backward = backward + np.where(tp, extra, 0.0)
    if "ring" not in sizes:  # a traced module
        return forward, backward
    several = {"ring_block": (sizes[BLOCKS[options.cp_kind][0]], CORE in again),
               "ulysses_layer": (layouts.ulysses > 1, graph.checkpointed),
               "ep_layer": ((layouts.ep > 1) & routed, graph.checkpointed)}  # fmt: skip
    if "documents" in sizes:  # those of a rank's share of the sequence, of every row
        count = sizes["batch"] * np.maximum(sizes["documents"] / sizes["ring"], 1.0)
        several["document"] = (count, CORE in again)
    for name, (count, twice) in several.items():
        one = prices.host(f"{name}_forward")
        forward = forward + count * one
        backward = backward + count * (prices.host(f"{name}_backward") + twice * one)
    return forward, backward


def hiding(head: Piece, model: Model, policies: Sequence[Sequence[Piece]], prices: Prices) -> Piece:
    """The head with what it hides of the layers' host time, whichever policy they are under.

    The host runs ahead of a device that works on the head's large matmul and loss, so that layers
    which take longer to launch than to compute catch up there:

        max(0, sum over layers of host_s - spare_s)   at most for the rank that holds the head

    Where the host waits for the device behind the head's forward, that is so in backward alone,
    which begins with the head.
    """

    def hidden(way: str) -> Array:
        of_layers = [
            sum(
                (group.repeat * getattr(piece, f"host_{way}_s") for group, piece in
                 zip(model.layers, layers, strict=True)), np.zeros(1),
            )
            for layers in policies
        ]  # fmt: skip
        return np.minimum(getattr(head, f"spare_{way}_s"), np.max(of_layers, axis=0))

    once_s = prices.pool.stack.host_s_per_micro_batch
    back = hidden("backward")
    there = 0.0 * back if prices.pool.stack.host_waits else hidden("forward")
    return replace(
        head,
        host_forward_s=np.maximum(head.host_forward_s, 0.0) - there + once_s,
        host_backward_s=np.maximum(head.host_backward_s, 0.0) - back,
    )
