"""The linears that a plan names for a compute dtype below 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..cluster import Cluster
from ..model import Layer, Model
from .by_shape import LAUNCHES, TimeOf, Times, uses
from .graph import Graph, Operator
from .host_times import RUNTIME_LAUNCHES
from .layout import Layouts
from .operator_times import operator_s
from .operators import KINDS
from .options import Options
from .piece_graphs import graph_and_sizes
from .prices import Prices
from .techniques.precision import BY_SHAPE, LOW_PRECISION


def named_linears(
    model: Model, cluster: Cluster, layout: Layouts, seq_tokens: int, options: Sequence[Options]
) -> tuple[Options, ...]:
    """The options of every layer of one layout, with the linears that are worth it by name.

    `options` are one for all layers or one each; those that leave no choice stay as they are. A
    layer in which no linear is worth it runs in 16 bits.
    """
    each = tuple(options) if len(options) > 1 else (options[0],) * model.num_layers
    if all(own.linears != BY_SHAPE for own in each):
        return tuple(options)
    pool = cluster.pools[0]
    prices = Prices(pool, cluster.profile, min(cluster.num_devices, pool.devices_per_node))
    known: dict[tuple[Layer, Options], Options] = {}
    found: list[Options] = []
    for index, own in enumerate(each):
        key = (model.layer_at(index), own)
        if key not in known:
            known[key] = _named(model, *key, layout, seq_tokens, prices)
        found.append(known[key])
    return tuple(found) if len(set(found)) > 1 else (found[0],)


def _launch_s(graph: Graph, time_of: TimeOf, prices: Prices, options: Options) -> float:
    """What one more launch costs a layer whose linears all run in 16 bits.

    Host and device work side by side, (device^q + host^q)^(1/q): the derivative by the host's time.
    """
    launch_s = prices.launch_s * RUNTIME_LAUNCHES[options.runtime]
    if launch_s == 0.0:
        return 0.0
    device_s, launches = 0.0, 0
    for op in graph.operators:
        if op.kind != "edge" and op.grad_inputs:  # casts are what is asked about
            forward, backward, _ = time_of(replace(op, compute=None))
            device_s += float(forward[0] + backward[0])
            launches += LAUNCHES * KINDS[op.kind].launches
    q, host_s = prices.pool.stack.host_smoothness, launches * launch_s
    return launch_s * (host_s / (device_s**q + host_s**q) ** (1 / q)) ** (q - 1)


def _named(
    model: Model, layer: Layer, options: Options, layout: Layouts, seq_tokens: int, prices: Prices
) -> Options:
    if options.linears != BY_SHAPE:
        return options
    if options.compute not in LOW_PRECISION:
        return replace(options, linears=None)
    graph, sizes = graph_and_sizes(model, layer, layout, seq_tokens, prices, options)

    def time_of(op: Operator) -> Times:
        return operator_s(op, sizes, prices, options)

    worth = uses(graph, time_of, _launch_s(graph, time_of, prices, options))
    linears = tuple(name for name, use in worth.items() if use[0])
    if len(linears) == len(worth):
        return replace(options, linears=None)
    if linears:
        return replace(options, linears=linears)
    wide = Options(compute=options.tensor_dtype)
    return replace(options, compute=wide.compute, recipe=wide.recipe, linears=None)
