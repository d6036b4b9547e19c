"""The fewest GPUs of a kind that are fast enough.

    minimise    devices(i)                     i a size of the cluster: part of a node, or nodes
    subject to  tokens_per_s(i) >= asked       of the best plan on that size

Tokens per second is the estimate's: tokens of a step over its median time. It is not exactly
monotone in i, since degrees divide devices, batch and layers; `inverse` says what is done about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import gcd

import msgspec

from ...cluster import Cluster
from ...errors import InputError
from ..infeasible import spelling
from ..pins import Pins
from ..space import divisors, enumerate_grid, only_pool
from .asking import Conditions, ask_each, doubled, last_reason, unless_done, until_time
from .inverse import rounder_below, smallest
from .result import Answer, SweepResult
from .rows import Ask, Asker, Row

MAX_NODES = 512
NEAREST = 2
DIVIDING = 2
"""Sizes asked below an answer because their devices share most with the batch."""
FALLING = 3
"""Doublings in a row without more throughput that end the search."""


def fewest_gpus(
    asks: Sequence[Ask],
    conditions: Conditions,
    tokens_per_s: Callable[[Ask], float],
    *,
    max_nodes: int = MAX_NODES,
    pins_of: Callable[[Ask], Pins] | None = None,
) -> SweepResult:
    """The smallest cluster of each ask's nodes whose best plan reaches `tokens_per_s(ask)`.

    Sizes are the divisors of a node's devices, then one node, two, ... `max_nodes`. They are
    doubled until one is fast enough, and bisected over sizes that leave a legal layout. `pins_of`
    gives the pins of an ask at one of these sizes, where they are not the same for all.
    """

    def answer(asker: Asker, ask: Ask) -> Answer:
        sizes = cluster_sizes(ask.cluster, max_nodes)
        asks = [replace(ask, cluster=cluster) for cluster in sizes]
        if pins_of is not None:
            asks = [replace(sized, pins=pins_of(sized)) for sized in asks]
        return _fewest(asker, asks, tokens_per_s(ask))

    return ask_each("fewest-gpus", asks, answer, conditions)


def _fewest(asker: Asker, asks: Sequence[Ask], needed: float) -> Answer:
    """The first size, of one ask at rising sizes, that reaches so many tokens per second."""
    sizes = [ask.cluster for ask in asks]
    batch_seqs = asks[0].workload.global_batch_seqs
    rows = asker.rows
    seen: dict[int, int] = {}

    def reaches(size: int) -> bool:
        seen[size] = asker.ask(asks[size], explain=False)
        return rows[seen[size]].tokens_per_s >= needed

    def usable(size: int) -> bool:
        a = asks[size]
        return len(enumerate_grid(a.model, a.cluster, a.workload, a.pins)) > 0

    def no_longer_grows() -> bool:
        rates = [rows[index].tokens_per_s for index in seen.values()]
        return len(rates) > FALLING and max(rates[-FALLING:]) <= max(rates[:-FALLING]) > 0

    def below(size: int) -> list[int]:
        return sizes_below(sizes, size, batch_seqs)

    def beside_the_fastest() -> list[int]:
        fastest = max(seen, key=lambda size: (rows[seen[size]].tokens_per_s, -size))
        above = min((size for size in seen if size > fastest), default=fastest)
        if not rows[seen[fastest]].tokens_per_s:
            return []
        return [size for size in (*below(fastest), *below(above)) if size not in seen]

    found, stopped = until_time(
        lambda: smallest(
            reaches,
            doubled([cluster.num_devices for cluster in sizes]),
            neighbours=below,
            others=beside_the_fastest,
            usable=usable,
            hopeless=no_longer_grows,
        )
    )
    reaching = (i for i, index in seen.items() if rows[index].tokens_per_s >= needed)
    best = min(reaching, default=None) if found is None else found
    if best is None:
        return Answer(row=None, text=_why_not(rows, seen, needed, stopped))
    row = rows[seen[best]]
    text = f"{row.gpus} has {row.tokens_per_s:,.0f} tokens/s, {needed:,.0f} were asked for"
    return Answer(row=seen[best], text=text + unless_done(stopped))


def _why_not(rows: Sequence[Row], seen: dict[int, int], needed: float, stopped: bool) -> str:
    planned = [index for index in seen.values() if rows[index].status == "planned"]
    if not planned:
        return f"no size has a plan that fits: {last_reason(rows, seen)}" + unless_done(stopped)
    fastest = rows[max(planned, key=lambda index: (rows[index].tokens_per_s, -index))]
    most = rows[seen[max(seen)]]
    return (
        f"no size up to {most.gpus} reaches {needed:,.0f} tokens/s; the fastest, {fastest.gpus}, "
        f"has {fastest.tokens_per_s:,.0f}" + unless_done(stopped)
    )


def cluster_sizes(cluster: Cluster, max_nodes: int) -> list[Cluster]:
    """Parts of a node that divide it, then one node, two, three, ... up to `max_nodes`.

    Raises InputError for processes of this machine, which cannot be more than it has.
    """
    pool = only_pool(cluster)
    if pool.device.kind == "cpu":
        raise InputError("gpus", cluster.name, "cpu is this machine alone", "give a kind of GPU")
    nodes = max_nodes if pool.inter_node is not None else 1
    shapes = [(1, per_node) for per_node in divisors(pool.devices_per_node)]
    shapes += [(count, pool.devices_per_node) for count in range(2, nodes + 1)]
    pools = [
        msgspec.structs.replace(pool, num_nodes=count, devices_per_node=per_node)
        for count, per_node in shapes
    ]
    sized = [msgspec.structs.replace(cluster, pools=(pool,)) for pool in pools]
    return [msgspec.structs.replace(one, name=spelling(one)) for one in sized]


def sizes_below(sizes: Sequence[Cluster], size: int, batch_seqs: int) -> list[int]:
    """Sizes above half of one that may do as well: nearest, rounder, or dividing the batch."""
    devices = [cluster.num_devices for cluster in sizes]
    nodes = sizes[size].pools[0].num_nodes
    single = size - nodes + 1
    rounder = [single + count - 1 for count in rounder_below(nodes)]
    within = [i for i in range(size) if 2 * devices[i] > devices[size]]
    within.sort(key=lambda i: (-gcd(devices[i], batch_seqs) / devices[i], -i))
    return [*range(size - 1, max(size - NEAREST, 0) - 1, -1), *rounder, *within[:DIVIDING]]
