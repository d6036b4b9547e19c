"""Sums of the gradients of an expert's replicas, over the ranks of an expert-parallel group.

The rank of an expert's first slot is its owner. All-to-all: every other replica's gradient goes to
the owner, which adds them up in the order of slots; all-to-all: the sum goes back. Every rank knows
all sizes beforehand, so that nothing is told. A replica sends one gradient and gets one, whatever
the number of experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import exchange
from .slots import Slots


def followers(slots: Slots, owner: int, rank: int) -> list[int]:
    """The slots on `rank` whose experts have their first slot on `owner`, another rank or not."""
    first, last = rank * slots.per_rank, (rank + 1) * slots.per_rank
    found: list[int] = []
    for holders in slots.holders:
        if holders[0] // slots.per_rank == owner:
            found += [slot for slot in holders[1:] if first <= slot < last]
    return found


def sum_replicas(gradients: list[Tensor], slots: Slots, group: dist.ProcessGroup) -> None:
    """Sum gradients (slots, ...) of this rank with those of the replicas elsewhere, in place."""
    size, rank = group.size(), group.rank()
    mine = [followers(slots, owner, rank) for owner in range(size)]  # by their owner
    owned = [followers(slots, rank, other) for other in range(size)]  # by where they lie
    offset = rank * slots.per_rank
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    own_rows = [slot - offset for own in mine for slot in own]
    send, receive = [len(own) for own in mine], [len(own) for own in owned]
    arrived = exchange(flat[own_rows], send, receive, group)
    first_of = {slot: holders[0] - offset for holders in slots.holders for slot in holders[1:]}
    order = [slot for own in owned for slot in own]
    for row, slot in sorted(enumerate(order), key=lambda pair: pair[1]):
        flat[first_of[slot]] += arrived[row]
    sums = flat[[first_of[slot] for slot in order]]
    flat[own_rows] = exchange(sums, receive, send, group)
    parts = flat.split([gradient[0].numel() for gradient in gradients], dim=1)
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
