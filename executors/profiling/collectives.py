"""Collectives between real processes, by size of the full logical buffer.

Ranks of a training step arrive at a collective nearly together, so every repetition starts behind
a barrier, and its time runs from the arrival of the last rank to the mean end of all of them (p2p:
to the end of the receiver). Loopback and shared cores give heavy tails; a step of many collectives
sees their average, so repetitions are averaged without the highest and lowest fifth.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .timing import median, trimmed_mean

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")
SMALL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Setting:
    """`groups` groups of `group` ranks each, at work at once; rank r is in group r // group."""

    group: int
    groups: int = 1

    @property
    def world(self) -> int:
        """Ranks at work."""
        return self.group * self.groups


class Groups:
    """The process groups of some settings, made by all ranks of the world in the same order."""

    def __init__(self, settings: list[Setting], rank: int) -> None:
        self.rank = rank
        self.mine: dict[Setting, dist.ProcessGroup] = {}
        self.everyone: dict[int, dist.ProcessGroup] = {}
        for setting in settings:
            for index in range(setting.groups):
                ranks = list(range(index * setting.group, (index + 1) * setting.group))
                group = dist.new_group(ranks)
                if rank in ranks:
                    assert isinstance(group, dist.ProcessGroup)
                    self.mine[setting] = group

    def barrier_group(self, world: int) -> dist.ProcessGroup:
        """The group of the first `world` ranks (made by `add_barrier`)."""
        return self.everyone[world]

    def add_barrier(self, world: int) -> None:
        """Make the group of the first `world` ranks; all ranks of the world must call this."""
        group = dist.new_group(list(range(world)))
        if self.rank < world:
            assert isinstance(group, dist.ProcessGroup)
            self.everyone[world] = group


def repetitions(message_bytes: int, quick: bool) -> int:
    """How often a size is measured."""
    if message_bytes < SMALL_BYTES:
        return 15 if quick else 24
    return 5 if quick or message_bytes > 8 << 20 else 10


def operation(
    kind: str, message_bytes: int, setting: Setting, groups: Groups
) -> Callable[[], None]:
    """A call of the collective on fp32 buffers of that full size, as FSDP2 and DTensor make it."""
    group, size = groups.mine[setting], setting.group
    part = max(1, message_bytes // 4 // size)
    whole = torch.ones(part * size)
    shard = torch.ones(part)
    if kind == "all_reduce":
        whole.zero_()
        return lambda: _ignore(dist.all_reduce(whole, group=group))
    if kind == "all_gather":
        return lambda: _ignore(dist.all_gather_into_tensor(whole, shard, group=group))
    if kind == "reduce_scatter":
        return lambda: _ignore(dist.reduce_scatter_tensor(shard, whole, group=group))
    if kind == "all_to_all":
        other = torch.empty_like(whole)
        return lambda: _ignore(dist.all_to_all_single(other, whole, group=group))
    return _send_one_way(whole, group, groups.rank, setting)


def _ignore(_work: object) -> None:
    """Synchronous collectives return nothing of interest."""


def _send_one_way(
    buffer: Tensor, group: dist.ProcessGroup, rank: int, setting: Setting
) -> Callable[[], None]:
    """Even ranks of the group send, odd ones receive."""
    base = rank // setting.group * setting.group
    local = rank - base
    peer = base + (local ^ 1)
    call = dist.isend if local % 2 == 0 else dist.irecv

    def send_or_receive() -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(call, buffer, peer, group)]):
            work.wait()

    return send_or_receive


def measure(
    kind: str,
    message_bytes: int,
    setting: Setting,
    groups: Groups,
    *,
    quick: bool,
) -> float:
    """Seconds of one collective; the same value on all ranks at work."""
    everyone = groups.barrier_group(setting.world)
    call = operation(kind, message_bytes, setting, groups)
    call()
    starts, ends = [], []
    for _ in range(repetitions(message_bytes, quick)):
        dist.barrier(group=everyone)
        starts.append(time.perf_counter())
        call()
        ends.append(time.perf_counter())
    return _combine(kind, starts, ends, setting, everyone)


def _combine(
    kind: str,
    starts: list[float],
    ends: list[float],
    setting: Setting,
    everyone: dist.ProcessGroup,
) -> float:
    """Averages the repetitions over all ranks at work (their clock is the node's one clock)."""
    mine = torch.tensor([starts, ends], dtype=torch.float64)
    gathered = [torch.empty_like(mine) for _ in range(setting.world)]
    dist.all_gather(gathered, mine, group=everyone)
    times = torch.stack(gathered)  # (rank, start or end, repetition)
    per_group = []
    for first in range(0, setting.world, setting.group):
        part = times[first : first + setting.group]
        arrival = part[:, 0].amax(dim=0)
        end = part[1, 1] if kind == "p2p" else part[:, 1].mean(dim=0)
        per_group.append(trimmed_mean((end - arrival).tolist(), cut=0.2))
    return max(1e-7, sum(per_group) / len(per_group))


WAIT_BYTES = 512 << 10
"""Message of the collective at which ranks meet."""


def measure_wait(
    calls: int, seconds: float, setting: Setting, groups: Groups, cores: int
) -> tuple[float, float]:
    """(compute seconds, seconds lost) per meeting of ranks that run `calls` matmuls in between.

    Compute is this thread's processor time, stretched by the processes per core as everywhere in
    the profile; the collective is timed with all ranks arriving together. What the loop takes
    beyond both is lost to waiting. Means over the ranks at work, over loops of about `seconds`.
    """
    everyone = groups.barrier_group(setting.world)
    call = operation("all_reduce", WAIT_BYTES, setting, groups)
    together_s = measure("all_reduce", WAIT_BYTES, setting, groups, quick=False)
    x = torch.ones(256, 256)
    y = x * 0.01
    shared = max(1.0, setting.world / cores)

    def loop(times: int) -> tuple[float, float]:
        compute = 0.0
        dist.barrier(group=everyone)
        start = time.perf_counter()
        for _ in range(times):
            before = time.thread_time()
            for _ in range(calls):
                torch.mm(x, y)
            compute += time.thread_time() - before
            call()
        return (time.perf_counter() - start) / times, compute * shared / times

    found = torch.tensor(loop(2)[0], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=everyone)
    times = max(3, min(200, round(seconds / WAIT_LOOPS / float(found))))
    whole, compute = (
        median(list(column))
        for column in zip(*(loop(times) for _ in range(WAIT_LOOPS)), strict=True)
    )
    mine = torch.tensor([compute, whole - compute - together_s], dtype=torch.float64)
    dist.all_reduce(mine, group=everyone)
    compute_s, lost_s = (mine / setting.world).tolist()
    return compute_s, max(1e-7, lost_s)


WAIT_LOOPS = 3
