"""Time of collectives on the links that the group really crosses.

n is the full logical buffer in bytes (reduced buffer, gathered output, scattered input), p the
ranks of the group, of which `local` share a node. Within a node the bandwidth is the device's; a
group over several nodes is limited by its members' network interfaces: with `local` ranks of one
group in a node, the ring enters and leaves through `local` interfaces, or, where they are not
neighbours, the part of them that the stack's `interface_sharing` says.

On GPUs the library takes the algorithm and protocol (`algorithms.py`) that it expects to be
fastest, here the fastest; on CPUs there is the ring alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cluster import Pool
from .algorithms import RING, Protocols, ring_s, switch_s, tree_s
from .graph import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Where the ranks of a group lie, and the rates that they get."""

    pool: Pool
    ranks: Array
    stride: Array
    """Between neighbours in the rank order."""
    local: Array
    """Of them in one node."""
    nodes: Array
    inside_rate: float
    """Of a rank's link to its node, bytes/s."""
    interface_rate: float
    """Of a rank's network interface."""
    inside_s: float
    """Latency of a step of the plain protocol inside a node."""
    across_s: float
    """And between nodes."""

    @staticmethod
    def of(ranks: Array, stride: Array, pool: Pool) -> Group:
        """`ranks` ranks, `stride` apart in the rank order."""
        intra, inter, stack = pool.intra_node, pool.inter_node or pool.intra_node, pool.stack
        local = np.minimum(np.maximum(np.floor(pool.devices_per_node / stride), 1.0), ranks)
        return Group(
            pool=pool,
            ranks=ranks,
            stride=stride,
            local=local,
            nodes=np.ceil(ranks / local),
            inside_rate=intra.bytes_per_s * stack.intra_node_efficiency,
            interface_rate=inter.bytes_per_s * stack.inter_node_efficiency,
            inside_s=intra.latency_s,
            across_s=inter.latency_s,
        )

    @property
    def interfaces(self) -> Array:
        """Network interfaces of a node that the group uses.

        Ranks that lie apart may leave some of theirs to others.
        """
        part = np.where(self.stride > 1, self.pool.stack.interface_sharing, 1.0)
        return np.maximum(1.0, self.local * part)

    @property
    def protocols(self) -> Protocols | None:
        """Those that the library has; None on a CPU."""
        return RING if self.pool.device.kind == "gpu" else None


def crosses(ranks: Array, stride: Array, pool: Pool) -> NDArray[np.bool_]:
    """Whether a group of `ranks` ranks, `stride` apart in the rank order, leaves its node."""
    return (ranks > 1) & (stride * (ranks - 1) >= pool.devices_per_node)


def group_s(kind: str, num_bytes: Array, ranks: Array, stride: Array, pool: Pool) -> Array:
    """Time of a collective over `ranks` ranks, `stride` apart in the rank order.

    A group inside a node uses the node's links. One over several nodes takes the better of a flat
    ring through the network interfaces of its members and of the hierarchical form (within nodes,
    then across with 1/local of the buffer each, where several members share a node). An all-to-all
    sends what stays in the node and what leaves it side by side.
    """
    group = Group.of(ranks, stride, pool)
    if kind == "p2p":
        inside = stride * ranks <= pool.devices_per_node
        latency_s = np.where(inside, group.inside_s, group.across_s)
        rate = np.where(inside, group.inside_rate, group.interface_rate)
        return ring_s(kind, num_bytes, ranks, latency_s, rate)
    if kind == "all_to_all":
        return _all_to_all_s(num_bytes, group)
    options = [_rings_s(kind, num_bytes, group)]
    if kind == "all_reduce" and group.protocols is not None:
        options += _reductions_s(num_bytes, group)
    best = np.min(np.vstack(np.broadcast_arrays(*options)), axis=0)
    return np.where(ranks > 1, best, 0.0)


def _all_to_all_s(num_bytes: Array, group: Group) -> Array:
    """Everybody sends each part through its own links."""
    share = num_bytes / group.ranks
    abroad = (group.ranks - group.local) * share / group.interface_rate
    at_home = (group.local - 1) * share / group.inside_rate
    latency = group.across_s * (group.nodes - 1) + group.inside_s * (group.local - 1)
    return latency + np.maximum(abroad, at_home)


def _rings_s(kind: str, num_bytes: Array, group: Group) -> Array:
    """The ring over all members, and rings inside nodes and then across; a row per protocol."""
    local, nodes, ranks = group.local, group.nodes, group.ranks
    p = group.protocols
    one = np.ones((1, 1))
    start_s, inside, across, share, share_across = (
        (p.start_s, p.inside, p.across, p.share, p.share_across) if p else (0 * one, *[one] * 4)
    )
    several = nodes > 1
    if not np.any(several):
        rate = share * group.inside_rate
        return start_s + ring_s(kind, num_bytes, ranks, group.inside_s * inside, rate)
    share = np.where(several, share_across, share)
    rate = np.minimum(group.interface_rate * group.interfaces, group.inside_rate)
    rate = share * np.where(several, rate, group.inside_rate)
    inside_s, across_s = group.inside_s * inside, group.across_s * across
    step_s = (across_s * nodes + inside_s * (ranks - nodes)) / ranks
    flat = ring_s(kind, num_bytes, ranks, np.where(several, step_s, inside_s), rate)
    within = ring_s(kind, num_bytes, local, inside_s, share * group.inside_rate)
    across_rate = share * group.interface_rate * group.interfaces / local
    between = ring_s(kind, num_bytes / local, nodes, across_s, across_rate)
    return start_s + np.where(several, np.minimum(flat, within + between), flat)


def _reductions_s(num_bytes: Array, group: Group) -> list[Array]:
    """All-reduce by trees and, where it can, in the switch."""
    several = group.nodes > 1
    outgoing = group.interface_rate * group.interfaces
    rate = np.where(several, np.minimum(outgoing, group.inside_rate), group.inside_rate)
    latencies = (group.inside_s, group.across_s)
    options = [tree_s(num_bytes, group.local, group.nodes, latencies, rate)]
    share = group.pool.intra_node.in_switch_share
    if share > 0:
        inside = np.where(group.local > 1, group.inside_rate * share, np.inf)
        together = np.where(several, outgoing, np.inf)
        options.append(
            np.where(
                group.local > 1,
                switch_s(num_bytes, group.nodes, group.across_s, inside, together),
                np.inf,
            )
        )
    return options
