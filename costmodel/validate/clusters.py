"""The cluster of a row: its node type, its network rate, its software stack."""

from __future__ import annotations

import functools
import re

import msgspec

from ...catalogs import load_hardware, resolve_gpus
from ...cluster import Cluster, Link, Pool
from ...errors import InputError
from ...stack import Stack
from .table import Row

_RATE = re.compile(
    r"(?:(?P<count>\d+)\s*x\s*)?(?P<rate>\d+(?:\.\d+)?)\s*Gb/s(?:\s+[\w./-]+){0,4}?"
    r"\s+per\s+(?P<unit>node|GPU)",
    re.IGNORECASE,
)
ASSUMED_LATENCY_S = 1e-5
"""Of a network whose node type has none in the catalog: as for the catalog's InfiniBand."""


@functools.cache
def family_of(hardware: str) -> str:
    """The stack family of a hardware name or alias."""
    try:
        return load_hardware(hardware).family
    except InputError as error:  # which names the option, not the column
        raise InputError("hardware", error.value, error.problem, error.remedy) from error


def cluster_of(row: Row, stack: Stack) -> Cluster:
    """The cluster of a row, without any profile: it is not this user's machine."""
    pool = _pool(row.hardware, row.gpus, row.gpus_per_node)
    inter_node = _network(pool, network_bytes_per_s(row.interconnect_note, pool.devices_per_node))
    pool = msgspec.structs.replace(pool, inter_node=inter_node, stack=stack)
    return Cluster(name=f"{row.gpus}x{pool.name}", pools=(pool,))


@functools.lru_cache(maxsize=1024)
def _pool(hardware: str, gpus: int, gpus_per_node: int | None) -> Pool:
    """Equal nodes of at most `gpus_per_node` (an NVLink domain over several hosts is one node)."""
    per_node = gpus_per_node or load_hardware(hardware).devices_per_node
    per_node = max(n for n in range(1, min(per_node, gpus) + 1) if gpus % n == 0)
    return resolve_gpus(f"{gpus // per_node}x{per_node}x{hardware}").cluster.pools[0]


def network_bytes_per_s(note: str, devices_per_node: int) -> float | None:
    """The network rate of one device that a note states, or None.

    >>> network_bytes_per_s("NVSwitch; 800 Gb/s per node", 8)
    12500000000.0
    >>> network_bytes_per_s("8x200 Gb/s HDR IB per node (Selene)", 8)
    25000000000.0
    >>> network_bytes_per_s("400 Gb/s per GPU IB or RoCE", 8)
    50000000000.0
    """
    match = _RATE.search(note)
    if match is None:
        return None
    bytes_per_s = int(match["count"] or 1) * float(match["rate"]) * 1e9 / 8
    return bytes_per_s / (devices_per_node if match["unit"].lower() == "node" else 1)


def _network(pool: Pool, bytes_per_s: float | None) -> Link | None:
    if not bytes_per_s:
        return pool.inter_node
    latency_s = pool.inter_node.latency_s if pool.inter_node is not None else ASSUMED_LATENCY_S
    return Link(latency_s=latency_s, bytes_per_s=bytes_per_s, source="the row's interconnect_note")
