"""Links between nodes that are emulated on one machine: their rate, held by the system.

Every connection between processes of different nodes gets the rate of the plan's link by
`SO_MAX_PACING_RATE`: the kernel sends no faster (each way; Linux, TCP's own pacing, no privileges).
Messages, collectives and their waits are real, and so is what runs beside them. A connection is
known by its two addresses, which both of its ends see. Each pair of processes has the rate to
itself, as sites have that are joined two by two; the latency is that of this machine.
"""

from __future__ import annotations

import os
import socket
import sys

import torch.distributed as dist

from ..errors import InputError
from ..plan import Plan

SO_MAX_PACING_RATE = 47
"""The number of the option on Linux, which Python's socket module does not name."""
Ends = tuple[str, str]
"""Own and other address of a connection."""


def check(plan: Plan, device: str) -> None:
    """Raise InputError where the links of a plan cannot be emulated."""
    (pool,) = plan.cluster.pools
    if pool.num_nodes == 1:
        raise InputError("emulate-links", plan.cluster.name, "is one node, without links between",
                         "plan for several, such as --gpus 2x1xcpu")  # fmt: skip
    if pool.inter_node is None:
        raise InputError("emulate-links", plan.cluster.name, "no rate between nodes is given",
                         "plan again with --link-rate 100Mbit/s")  # fmt: skip
    if device != "cpu":
        raise InputError("emulate-links", pool.device.name, "GPUs do not send by TCP connections",
                         "run it on its nodes, or plan for --gpus 2x1xcpu")  # fmt: skip
    if not sys.platform.startswith("linux"):
        raise InputError("emulate-links", sys.platform, "connections are paced by Linux alone",
                         "run it there, or on several machines")  # fmt: skip


def node_of(plan: Plan, rank: int) -> int:
    """The node that a rank is on, or would be."""
    return rank // plan.cluster.pools[0].devices_per_node


def hold_rate(plan: Plan) -> None:
    """Hold this rank's connections to other nodes to the plan's rate (collective)."""
    link, own = plan.cluster.pools[0].inter_node, node_of(plan, dist.get_rank())
    assert link is not None
    mine = {ends: descriptor for descriptor, ends in connections()}
    everyone: list[list[Ends]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, list(mine))
    for rank, theirs in enumerate(everyone):
        if node_of(plan, rank) == own:
            continue
        for address, peer in theirs:
            descriptor = mine.get((peer, address))
            if descriptor is not None:
                _pace(descriptor, int(link.bytes_per_s))


def connections() -> list[tuple[int, Ends]]:
    """Descriptor and ends of every TCP connection of this process."""
    found: list[tuple[int, Ends]] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.type == socket.SOCK_STREAM and copy.family != socket.AF_UNIX:
                    found.append(
                        (int(name), (_text(copy.getsockname()), _text(copy.getpeername())))
                    )
        except OSError:
            continue  # no socket, or one without a peer
    return found


def _text(address: tuple[str, int]) -> str:
    return f"{address[0]} {address[1]}"


def _pace(descriptor: int, bytes_per_s: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        copy.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, bytes_per_s)
