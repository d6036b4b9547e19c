"""Which slot of which rank holds which expert, and which replica of it a copy of a token goes to.

Slots are numbered rank by rank over an expert-parallel group, equally many each. Without a
placement slot i holds expert i. An expert with several replicas gives them its tokens in turns,
each rank starting with another, so that all get the same number within one per rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rows import place_in_slot


class Slots:
    """The slots of one layer over the ranks of an expert-parallel group."""

    def __init__(self, ranks: Sequence[Sequence[int]], num_experts: int) -> None:
        """`ranks` lists the experts on each rank, slot by slot."""
        self.per_rank = len(ranks[0])
        self.num_experts = num_experts
        self.expert_of = [expert for rank in ranks for expert in rank]
        self.holders: list[list[int]] = [[] for _ in range(num_experts)]
        """The slots of each expert, in order."""
        for slot, expert in enumerate(self.expert_of):
            self.holders[expert].append(slot)
        self.in_order = self.expert_of == list(range(num_experts))
        self.replicated = len(self.expert_of) > num_experts
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def contiguous(num_experts: int, ranks: int) -> Slots:
        """Experts in order, in equal runs."""
        size = num_experts // ranks
        return Slots([range(r * size, (r + 1) * size) for r in range(ranks)], num_experts)

    def __len__(self) -> int:
        return len(self.expert_of)

    def of_rank(self, rank: int) -> list[int]:
        """The experts in the slots of one rank."""
        return self.expert_of[rank * self.per_rank : (rank + 1) * self.per_rank]

    def choose(self, expert_TK: Tensor, start: int) -> Tensor:
        """The slot of every copy; `start` is the replica that this rank begins with."""
        if self.in_order:
            return expert_TK
        holders_XC, counts_X = self._table(expert_TK.device)
        if not self.replicated:
            return holders_XC[:, 0][expert_TK]
        turn_TK = (place_in_slot(expert_TK, self.num_experts) + start) % counts_X[expert_TK]
        return holders_XC[expert_TK, turn_TK]

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Slots of each expert, padded to the most that one has, and how many they are."""
        if device not in self._tables:
            most = max(map(len, self.holders))
            rows = [own + own[:1] * (most - len(own)) for own in self.holders]
            counts = [len(own) for own in self.holders]
            self._tables[device] = (
                torch.tensor(rows, device=device),
                torch.tensor(counts, device=device),
            )
        return self._tables[device]
