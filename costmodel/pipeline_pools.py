"""The pools that pipelines run through: which ranks lie where, and what rows cost there.

Every stage lies in one pool, all stages share the mesh: with M = dp cp tp ranks a stage, a pool of
N devices holds the next N / M ranks of the pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..cluster import Cluster, Pool
from .collectives import ring_s
from .graph import Array
from .grid_rows import Index
from .layout import Layouts
from .seconds import Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class OnPool:
    """Times of rows on one pool."""

    seconds: Seconds
    hop_s: Array
    """To the next rank; zero where transfers hide behind compute."""
    action_s: float
    until_rank: Array
    """The ranks below this one, and of no earlier pool, lie here."""

    def take(self, rows: Index) -> OnPool:
        """Those of some rows."""
        return replace(
            self, seconds=self.seconds.take(rows), hop_s=self.hop_s[rows],
            until_rank=self.until_rank[rows],
        )  # fmt: skip


def until_ranks(pools: Sequence[Pool], layouts: Layouts) -> list[Array]:
    """By pool, the rank behind its last one."""
    replicas = (layouts.dp * layouts.cp * layouts.tp).astype(float)
    if len(pools) == 1:
        return [layouts.pp.astype(float)]
    return [np.cumsum([p.num_devices for p in pools])[k] / replicas for k in range(len(pools))]


def between_s(cluster: Cluster, num_bytes: Array) -> Array:
    """Seconds of handing a micro-batch's activations from one pool to the next.

    Through the link between pools, or where none is given through the slower of their networks; at
    the lowest efficiency of their stacks.
    """
    links = [cluster.between_pools] if cluster.between_pools is not None else [
        pool.inter_node or pool.intra_node for pool in cluster.pools
    ]  # fmt: skip
    share = min(pool.stack.inter_node_efficiency for pool in cluster.pools)
    one, two = np.ones(1), np.full(1, 2.0)
    times = [
        ring_s("p2p", num_bytes, two, link.latency_s * one, share * link.bytes_per_s * one)
        for link in links
    ]
    return np.max(times, axis=0)


def fill_hops_s(until: Sequence[Array], hops_s: Sequence[Array], between: Array | float) -> Array:
    """Transfers of fill and drain: every boundary between ranks once each way."""
    total, begin = np.zeros(1), 0.0 * until[0]
    for end, hop in zip(until, hops_s, strict=True):
        total = total + np.maximum(end - begin - 1, 0.0) * hop
        begin = end
    return 2 * (total + (len(until) - 1) * between)


def drift(pools: Sequence[Pool]) -> float:
    """Slow-down of a step by jitter and slow nodes, which grows with the devices; of several pools
    the largest."""
    doublings = max(0.0, math.log2(sum(pool.num_devices for pool in pools) / 8))
    return 1.0 + max(pool.stack.drift_per_doubling for pool in pools) * doublings
