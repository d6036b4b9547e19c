"""Replication and placement of experts on ranks, so that the fullest rank has the least to do.

    sets        e in E      experts, w[e] tokens each
                r in R      ranks of S slots, in N nodes
    variables   c[e] >= 1 whole      replicas of expert e
                x[e,r] in {0, 1}     rank r holds a replica of e
    objective   minimise  max over r of  sum over e of x[e,r] w[e] / c[e]
    replicas    sum over r of x[e,r] = c[e]                for every e
    slots       sum over e of x[e,r] = S                   for every r (all slots are filled)
    groups      x[e,r] = 0 unless r lies in the node of e's group, when groups are given;
                every node takes equally many groups

An expert's tokens are split evenly over its replicas. A rank holds an expert once; where it has
more slots than experts to hold, at most slots / experts times, rounded up. Layers are problems of
their own.

Replicas are chosen greedily, largest load per replica first, then packed longest first into ranks
with free slots and improved by swaps (`balance`) and by trading replicas between experts (`trade`);
with groups, the same packing first gives groups to nodes. Small layers are then searched completely
(`exact`). Lower bound, the larger of

    sum of w / R            and            the least possible max of w[e] / c[e]

where the second is what the greedy counts attain. Replicating the experts of highest load and
packing groups into nodes before ranks is what expert-parallel load balancers do (DeepSeek-V3,
DeepSeek-AI 2024, section 3.4); groups keep routing that is limited to few nodes within them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .balance import pack, replicate, swap
from .exact import Exact
from .problem import (
    Floats,
    Layout,
    Loads,
    Whole,
    check_placement,
    check_problem,
    count_replicas,
    rank_loads,
)
from .trade import trade

SMALL_SLOTS = 16
"""Slots of a layer up to which all placements are searched."""
EFFORT = 200_000
"""Steps of that search, for all layers together."""
CLOSE = 1e-9
"""Gap that counts as none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The experts on every rank of one layer; loads in tokens."""

    layer: str
    replicas: dict[str, int]
    ranks: tuple[tuple[str, ...], ...]
    """Names of the experts on each rank."""
    max_load: float
    mean_load: float
    lower_bound: float
    """No placement has a fullest rank of less."""
    contiguous_load: float
    """Fullest rank when the experts are dealt in order, unreplicated, in equal runs."""
    cross_node_fraction: float | None
    """Share of the tokens that leave their node; None without nodes."""
    limit: str | None
    """"effort" when the complete search of a small layer was cut short."""

    @property
    def gap(self) -> float:
        """Largest load over the lower bound, minus one."""
        return self.max_load / self.lower_bound - 1 if self.max_load > self.lower_bound else 0.0

    @property
    def optimal(self) -> bool:
        """Whether no placement is better."""
        return self.gap == 0

    @property
    def imbalance(self) -> float:
        """Fullest rank over the mean of all; 1 without any load."""
        return self.max_load / self.mean_load if self.mean_load else 1.0

    @property
    def contiguous_imbalance(self) -> float:
        """The same for experts in order without replication."""
        return self.contiguous_load / self.mean_load if self.mean_load else 1.0


def place_experts(loads: Loads, layout: Layout, *, effort: int = EFFORT) -> tuple[Placement, ...]:
    """One placement per layer that keeps the largest rank load low.

    `effort` bounds the complete search of small layers, in steps; 0 leaves it out.

    Raises
    ------
    InputError : no rank, slot or node; loads that are negative or not finite; an expert named
        twice; nodes that do not divide the ranks, or groups the experts.
    NoFeasiblePlan : fewer slots than experts.
    """
    check_problem(loads, layout)
    tokens = np.asarray(loads.tokens, dtype=np.float64)
    bound = _lower_bound(tokens, layout)
    if layout.groups is not None and layout.nodes is not None:
        slots = _within_nodes(tokens, layout, layout.groups, layout.nodes, bound, effort)
        limits: list[str | None] = [None] * len(tokens)
    else:
        slots = _balanced(tokens, layout.ranks, layout.slots, bound)
        limits = _searched(tokens, slots, bound, effort)
    slots = np.sort(slots, axis=2)
    check_placement(loads, layout, slots)
    return _described(loads, layout, slots, bound, limits)


def _balanced(tokens: Floats, num_ranks: int, num_slots: int, enough: Floats) -> Whole:
    """Slots (B, R, S) by greedy replication, packing and swaps; `enough` (B,) ends the swaps."""
    most = -(-num_slots // tokens.shape[1])
    counts = replicate(tokens, num_ranks * num_slots, most * num_ranks)
    slots = pack(tokens, counts, num_ranks, num_slots, most)
    return trade(tokens, swap(tokens, slots, most, enough), most, enough)


def _searched(tokens: Floats, slots: Whole, bound: Floats, effort: int) -> list[str | None]:
    """Search small problems completely: improves `slots` (B, R, S) and raises `bound` (B,).

    Gives what cut the search of each problem short, None for those that are settled or not small.
    """
    limits: list[str | None] = [None] * len(slots)
    _, num_ranks, num_slots = slots.shape
    if num_ranks * num_slots > SMALL_SLOTS:
        return limits
    largest = rank_loads(tokens, slots).max(axis=1)
    for problem in range(len(slots)):
        search = Exact(
            tokens=tokens[problem],
            num_ranks=num_ranks,
            num_slots=num_slots,
            most=-(-num_slots // tokens.shape[1]),
            best=float(largest[problem]),
            enough=float(bound[problem]),
            effort=effort,
        )
        better = search.run()
        if better is not None:
            slots[problem] = better
        if search.finished:
            bound[problem] = max(bound[problem], search.best)
        else:
            limits[problem] = "effort"
        effort = search.effort
    return limits


def _within_nodes(
    tokens: Floats, layout: Layout, num_groups: int, num_nodes: int, bound: Floats, effort: int
) -> Whole:
    """Slots (L, R, S) with every group of experts within a node: groups to nodes, then ranks.

    The least possible load of the fullest node, where it is found, raises `bound` (L,).
    """
    num_layers, num_experts = tokens.shape
    size, per_node = num_experts // num_groups, num_groups // num_nodes
    ranks = layout.ranks // num_nodes
    of_group = tokens.reshape(num_layers, num_groups, size).sum(axis=2)
    of_node = of_group.sum(axis=1) / num_nodes
    groups = _balanced(of_group, num_nodes, per_node, of_node)  # (L, N, groups per node)
    _searched(of_group, groups, of_node, effort)
    bound[:] = np.maximum(bound, of_node / ranks)
    experts = (np.sort(groups, axis=2)[..., None] * size + np.arange(size)).reshape(
        num_layers * num_nodes, per_node * size
    )
    own = np.take_along_axis(np.repeat(tokens, num_nodes, axis=0), experts, axis=1)
    slots = _balanced(own, ranks, layout.slots, np.repeat(bound, num_nodes))
    flat = np.take_along_axis(experts, slots.reshape(len(own), -1), axis=1)
    return flat.reshape(num_layers, layout.ranks, layout.slots)


def _lower_bound(tokens: Floats, layout: Layout) -> Floats:
    """What no placement's fullest rank is below, per layer (L,)."""
    most = layout.copies_per_rank(tokens.shape[1])
    homes = layout.ranks  # that may hold an expert
    bound = tokens.sum(axis=1) / layout.ranks
    if layout.groups is not None and layout.nodes is not None:
        homes //= layout.nodes
        of_group = tokens.reshape(len(tokens), layout.groups, -1).sum(axis=2)
        bound = np.maximum(bound, of_group.max(axis=1) / homes)
    counts = replicate(tokens, layout.total_slots, most * homes)
    return np.maximum(bound, (tokens / counts).max(axis=1))


def _described(
    loads: Loads, layout: Layout, slots: Whole, bound: Floats, limits: list[str | None]
) -> tuple[Placement, ...]:
    tokens = loads.tokens
    largest = rank_loads(tokens, slots).max(axis=1)
    counts = count_replicas(slots, len(loads.experts))
    runs = np.array_split(tokens, layout.ranks, axis=1)
    contiguous = np.max([run.sum(axis=1) for run in runs], axis=0)
    crossing = _cross_node_fraction(tokens, slots, layout.nodes)
    close = np.where(largest <= bound * (1 + CLOSE), largest, bound)
    return tuple(
        Placement(
            layer=layer,
            replicas=dict(zip(loads.experts, counts[index].tolist(), strict=True)),
            ranks=tuple(tuple(loads.experts[e] for e in rank) for rank in slots[index].tolist()),
            max_load=float(largest[index]),
            mean_load=float(tokens[index].sum() / layout.ranks),
            lower_bound=float(close[index]),
            contiguous_load=float(contiguous[index]),
            cross_node_fraction=None if crossing is None else float(crossing[index]),
            limit=limits[index],
        )
        for index, layer in enumerate(loads.layers)
    )


def _cross_node_fraction(tokens: Floats, slots: Whole, num_nodes: int | None) -> Floats | None:
    """Share of each layer's tokens (L,) that are served outside the node that they come from.

    Every node sends 1 / N of every expert's tokens, and a node with k of an expert's c replicas
    serves k / c of them, its own first:

        1 - sum_e w_e sum_n min(1 / N, k[e,n] / c[e]) / sum_e w_e
    """
    if num_nodes is None:
        return None
    num_layers, num_experts = tokens.shape
    by_node = slots.reshape(num_layers * num_nodes, -1, 1)
    held = count_replicas(by_node, num_experts).reshape(num_layers, num_nodes, num_experts)
    share = held / held.sum(axis=1, keepdims=True)
    local = np.minimum(share, 1 / num_nodes).sum(axis=1)  # (L, E)
    total = tokens.sum(axis=1)
    kept = (tokens * local).sum(axis=1) / np.where(total > 0, total, 1.0)
    return np.where(total > 0, np.clip(1 - kept, 0, 1), 0.0)
