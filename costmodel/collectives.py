"""Time of collectives: alpha-beta formulas on the links that the group really crosses.

n is the full logical buffer in bytes (reduced buffer, gathered output, scattered input), p the
ranks of the group, of which `local` share a node. Within a node the bandwidth is the device's; a
group over several nodes is limited by its members' network interfaces: with `local` ranks of one
group in a node, the ring enters and leaves through `local` interfaces, or the part of them that the
stack's `interface_sharing` says.
"""

from __future__ import annotations

import numpy as np

from ..cluster import Link, Pool
from .graph import Array


def ring_s(
    kind: str, num_bytes: Array, ranks: Array, latency_s: Array, bytes_per_s: Array
) -> Array:
    """Time of a ring collective.

    all_gather, reduce_scatter: t = (p-1) (a + n / (p b)); all_reduce twice that; all_to_all as
    all_gather of the send buffer; p2p: a + n / b. Zero for p = 1.

    Source: Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in
    MPICH", 2005, the ring algorithms.

    >>> t = ring_s("all_reduce", *(np.array([x]) for x in (1e9, 8.0, 5e-6, 450e9)))
    >>> round(float(t[0]) * 1e3, 3)
    3.959
    """
    if kind == "p2p":
        return np.where(ranks > 1, latency_s + num_bytes / bytes_per_s, 0.0)
    passes = 2.0 if kind == "all_reduce" else 1.0
    return passes * (ranks - 1) * (latency_s + num_bytes / (ranks * bytes_per_s))


def group_s(kind: str, num_bytes: Array, ranks: Array, stride: Array, pool: Pool) -> Array:
    """Time of a collective over `ranks` ranks, `stride` apart in the rank order.

    A group inside a node uses the node's links. One over several nodes takes the better of a flat
    ring through the network interfaces of its members and of the hierarchical form (within nodes,
    then across with 1/local of the buffer each, where several members share a node). An all-to-all
    sends what stays in the node and what leaves it side by side.
    """
    intra, inter, stack = pool.intra_node, pool.inter_node or pool.intra_node, pool.stack
    per_node = float(pool.devices_per_node)
    local = np.minimum(np.maximum(np.floor(per_node / stride), 1.0), ranks)
    nodes = np.ceil(ranks / local)
    intra_rate = np.full_like(local, intra.bytes_per_s * stack.intra_node_efficiency)
    nic_rate = inter.bytes_per_s * stack.inter_node_efficiency
    inside = ring_s(kind, num_bytes, ranks, _latency(intra), intra_rate)
    if kind != "p2p" and np.all(nodes <= 1):
        return inside
    if kind == "p2p":
        across = ring_s(kind, num_bytes, ranks, _latency(inter), np.full_like(local, nic_rate))
        return np.where(stride * ranks <= per_node, inside, across)
    if kind == "all_to_all":  # everybody sends each part through its own links
        share = num_bytes / ranks
        abroad = (ranks - local) * share / nic_rate
        at_home = (local - 1) * share / intra_rate
        latency = inter.latency_s * (nodes - 1) + intra.latency_s * (local - 1)
        return np.where(nodes > 1, latency + np.maximum(abroad, at_home), inside)
    interfaces = np.maximum(1.0, local * stack.interface_sharing)
    flat_rate = np.minimum(nic_rate * interfaces, intra_rate)
    flat_latency = (inter.latency_s * nodes + intra.latency_s * (ranks - nodes)) / ranks
    flat = ring_s(kind, num_bytes, ranks, flat_latency, flat_rate)
    within = ring_s(kind, num_bytes, local, _latency(intra), intra_rate)
    across_rate = nic_rate * interfaces / local
    hierarchical = within + ring_s(kind, num_bytes / local, nodes, _latency(inter), across_rate)
    return np.where(nodes > 1, np.minimum(flat, hierarchical), inside)


def _latency(link: Link) -> Array:
    return np.array([link.latency_s])
