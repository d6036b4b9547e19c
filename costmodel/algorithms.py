"""Algorithms and protocols of NCCL's collectives: what each takes, for the library to choose from.

A protocol trades rate for latency: LL sends a flag with every 4 bytes of data and LL128 with every
120, so that a receiver sees data as it arrives; Simple sends bare data between fences. With k steps
of latency a and n bytes at a rate b, of which the protocol leaves the share e, and a fixed latency
to start,

    ring                 t = start + k a + passes (p-1)/p n / (e b),  k = passes (p-1)
    double binary tree   t = start + 2 (chain inside the node + log2 nodes) a + 2 n / (e b)
    in the switch        t = start + 6/5 n / (s b)          every rank sends its part once, and the
                                                            switch adds up and sends the sum to all
    switch, then tree    t = start + 2 log2(nodes) a + 6/5 n / min(s b, c / 2)

all-reduce takes two passes of a ring, all-gather and reduce-scatter one. Trees and switches serve
all-reduce alone. c is the rate of the node's interfaces together, s what the switch keeps of b.

Source: NVIDIA/nccl, src/graph/tuning.cc of version 2.20 (latencies, shares, the ratio 6/5) and
src/tuning/nvls.cc of 2.29 (s), the tables by which the library itself chooses; Sanders, Speck,
Träff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .graph import Array

Column = np.ndarray
"""One number per protocol, as a column to broadcast against arrays of layouts."""


def _column(*values: float) -> Column:
    return np.array(values)[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocols:
    """Simple, LL128 and LL side by side; latencies of a step relative to Simple's, which is the
    link's own."""

    start_s: Column
    inside: Column
    """Of a step over NVLink or PCIe."""
    across: Column
    """Of a step between nodes."""
    share: Column
    """Part of the rate that carries data, on one node."""
    share_across: Column
    """The same over several nodes."""


RING = Protocols(
    start_s=_column(8.4e-6, 14.0e-6, 6.6e-6),
    inside=_column(1.0, 1.9 / 3.4, 0.6 / 3.4),
    across=_column(1.0, 4.0 / 14.0, 2.7 / 14.0),
    share=_column(1.0, 0.92, 0.37),
    share_across=_column(1.0, 0.92, 0.25),
)
"""LL's share on one node: its cap of 87.7 of 240 GB/s (A100) and of 141 of 371 (H100)."""
TREE = Protocols(
    start_s=_column(8.4e-6, 14.0e-6, 6.8e-6),
    inside=_column(4.0 / 3.4, 1.25 / 3.4, 0.6 / 3.4),
    across=_column(1.0, 8.5 / 14.0, 5.0 / 14.0),
    share=_column(0.92, 0.92 * 7 / 9, 0.92 / 3.8),
    share_across=_column(0.92, 0.92 * 120 / 128, 0.92 / 3.8),
)
SWITCH_START_S = 25e-6
SWITCH_TRAFFIC = 6 / 5
"""Bytes through a rank's link in the busier direction per byte of the buffer."""


def ring_s(
    kind: str, num_bytes: Array, ranks: Array, latency_s: Array, bytes_per_s: Array
) -> Array:
    """Time of a ring collective of one protocol, without the start.

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


def tree_s(
    num_bytes: Array, local: Array, nodes: Array, latencies_s: tuple[float, float], rate: Array
) -> Array:
    """All-reduce by two binary trees over the nodes, a chain inside each; by protocol.

    A node sends half of the buffer to the root in each tree, and half to each of two others in the
    one in which it is not a leaf: of two nodes neither has two others.
    """
    inside, across = latencies_s
    steps_s = (local - 1) * inside * TREE.inside + np.log2(nodes) * across * TREE.across
    share = np.where(nodes > 1, TREE.share_across, TREE.share)
    times = np.where(nodes == 2, 1.0, 2.0)
    return TREE.start_s + 2 * steps_s + times * num_bytes / (share * rate)


def switch_s(
    num_bytes: Array, nodes: Array, across_s: float, inside_rate: Array, across_rate: Array
) -> Array:
    """All-reduce in the NVLink switch of each node, and by trees over the nodes.

    A tree of more than two nodes sends to two others what it receives from one.
    """
    halves = np.where(nodes > 2, 2.0, 1.0)
    rate = np.where(nodes > 1, np.minimum(inside_rate, across_rate / halves), inside_rate)
    steps_s = 2 * np.log2(nodes) * across_s
    return SWITCH_START_S + steps_s + SWITCH_TRAFFIC * num_bytes / rate
