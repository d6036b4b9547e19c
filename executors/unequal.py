"""Training on sequences of unequal length, shared out over unequal groups of ranks anew each step.

A rank goes through its passes of a step one by one, forward and backward; in each, an aligned block
of ranks shares a row of packed sequences as in context parallelism (a balanced ring or all-to-alls),
and blocks of all sizes have had their process groups made beforehand. Losses are sums over tokens
divided by the tokens of the whole step, so that gradients are those of the mean over its tokens,
however sequences are shared out: rank r contributes

    loss_r = (N / T) sum of its tokens' losses,     gradient = (1 / N) sum_r gradient of loss_r

with N ranks, whose gradients are averaged, and T tokens. Gradients are exchanged in the last pass of
a rank (in every pass under ZeRO 2 and 3, where all ranks have as many). Rows are padded to what a
block divides; padding is a document of its own without loss, and a pass without sequences is all
padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..costmodel.unequal import GroupPass, Step
from ..planner.sequences.costs import powers_of_two
from . import data, data_parallel
from .context_parallel import Spread
from .context_parallel.peers import Peers
from .data import Rows
from .sharing_ahead import Ahead
from .trainer import Trainer

NO_TARGET = -100


def summed_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Sum of the cross-entropies of all tokens that have a target, in fp32."""
    return F.cross_entropy(
        logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), ignore_index=NO_TARGET,
        reduction="sum",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LocalPass:
    """One rank's part of a pass."""

    spread: Spread
    rows: Rows


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank does in a step."""

    passes: list[LocalPass]
    tokens: int
    """Of all ranks."""


class Blocks:
    """Process groups of all aligned blocks of ranks; every rank makes all, in the same order."""

    def __init__(self, num_ranks: int) -> None:
        self.mine: dict[int, Peers] = {}
        for degree in powers_of_two(num_ranks)[1:]:
            for start in range(0, num_ranks, degree):
                ranks = list(range(start, start + degree))
                group = dist.new_group(ranks)
                if dist.get_rank() in ranks:
                    assert isinstance(group, dist.ProcessGroup)
                    self.mine[degree] = Peers.of(group)
        for peers in self.mine.values():
            dist.barrier(group=peers.group)  # connects all ranks: later rounds leave some out

    def spread(self, own: GroupPass) -> Spread:
        """How the ranks of a pass share its row."""
        if own.degree == 1:
            return Spread()
        peers = self.mine[own.degree]
        if own.kind == "ulysses":
            return Spread(ulysses=peers.group, rank=peers.rank)
        return Spread(ring=peers, rank=peers.rank)


class UnequalTrainer(Trainer):
    """The trainer of a plan with unequal groups."""

    blocks: Blocks
    ahead: Ahead

    def prepare(self) -> UnequalTrainer:
        """This trainer with its groups and its solver; all ranks call it."""
        self.blocks, self.ahead = Blocks(self.mesh.world), Ahead(self.plan)
        self.pieces[0].loss = summed_loss
        return self

    def share(self, corpus: np.ndarray, step: int) -> Share:
        """What this rank does in a step (collective)."""
        passes: Step = self.ahead.step(step)
        own = [p for p in passes if dist.get_rank() in p.ranks]
        local: list[LocalPass] = []
        for one in own:
            spread = self.blocks.spread(one)
            rows = rows_of(corpus, self.plan.workload.seed, step, one)
            part = Rows(spread.part(rows.inputs_BS), spread.part(rows.targets_BS), rows.documents_BN)
            local.append(LocalPass(spread, part.to(self.device)))
        return Share(local, sum(length for p in passes for length in p.lengths))

    def forward_backward(self, tokens_BS1: Share) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """This rank's part of the mean loss of a step, whose gradients now stand on the parameters."""
        share = tokens_BS1
        total = torch.zeros((), device=self.device)
        scale = self.mesh.world / share.tokens
        (piece,) = self.pieces
        for index, own in enumerate(share.passes):
            last = index == len(share.passes) - 1
            piece.spread = own.spread
            with data_parallel.microbatch(self.modules[0], self.phase, last):
                with self.marks.mark("forward"):
                    loss = self.modules[0](*own.rows) * scale
                with self.marks.mark("backward"):
                    loss.backward()
            total += loss.detach()
        return total / self.mesh.world

    def global_loss(self, local_loss: Tensor) -> float:
        """Mean loss over all tokens of a step, the same on every rank: one small all-reduce."""
        total = local_loss.clone()
        dist.all_reduce(total)
        return float(total)


def rows_of(corpus: np.ndarray, seed: int, step: int, own: GroupPass) -> Rows:
    """The whole row of a pass; sequence i of a step is the same stretch in every pass."""
    parts = [
        data.sequence(corpus, seed, step, index, length + 1)
        for index, length in zip(own.sequences, own.lengths, strict=True)
    ]
    padding = own.tokens - sum(own.lengths)
    inputs = [*(part[:-1] for part in parts), np.zeros(padding, dtype=np.int64)]
    targets = [*(part[1:] for part in parts), np.full(padding, NO_TARGET, dtype=np.int64)]
    return Rows(
        torch.from_numpy(np.concatenate(inputs))[None],
        torch.from_numpy(np.concatenate(targets))[None],
        torch.tensor([own.ends]),
    )
