"""Messages between the ranks of a ring: posted together, waited for after the work beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Message = tuple[Tensor, int]
"""A contiguous tensor, and the rank of the group that it goes to or comes from."""


@dataclass(slots=True)
class Flight:
    """Messages under way; their tensors stay as they are until `land`."""

    works: list[Any] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def land(self) -> None:
        """Wait until all have arrived: on CUDA the current stream waits, not the host."""
        for work in self.works:
            work.wait()
        self.works, self.tensors = [], []


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks of a group, by their place in it."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    """Global ranks."""
    rank: int

    @staticmethod
    def of(group: dist.ProcessGroup) -> Peers:
        """This rank's place in a group that it belongs to."""
        ranks = tuple(dist.get_process_group_ranks(group))
        return Peers(group, ranks, ranks.index(dist.get_rank()))

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return len(self.ranks)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Flight:
        """Start sending and receiving; ranks without a message in a round post none.

        All ranks of a group post their rounds in one order, as backends of one queue demand.
        """
        ops = [dist.P2POp(dist.isend, x, self.ranks[to], self.group) for x, to in sends]
        ops += [dist.P2POp(dist.irecv, x, self.ranks[source], self.group) for x, source in receives]
        if not ops:
            return Flight()
        tensors = [x for x, _ in (*sends, *receives)]
        return Flight(dist.batch_isend_irecv(ops), tensors)


def packed(*parts: Tensor) -> Tensor:
    """Tensors (B, H, S, D) of one form as one message (parts, B, S, H, D)."""
    return torch.stack([part.transpose(1, 2) for part in parts])


def unpacked(message: Tensor) -> tuple[Tensor, ...]:
    """The tensors (B, H, S, D) of a message, which lie in it."""
    return message.transpose(2, 3).unbind(0)
