"""How the ranks of a context-parallel group share a sequence, and this rank's part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...plan import Phase
from .chunks import Borders, places
from .context import Context, Local, Method
from .lightseq import LightSeq
from .peers import Peers
from .ring import Ring


@dataclass(frozen=True, slots=True)
class Spread:
    """A sequence over ring x ulysses ranks, ulysses inside the ring; alone by default."""

    kind: str = "zigzag"
    """Of the ring: zigzag, ring or lightseq."""
    ring: Peers | None = None
    ulysses: dist.ProcessGroup | None = None
    rank: int = 0
    """Of all that share the sequence."""

    @property
    def ranks(self) -> int:
        """Ranks that share the sequence."""
        return self.num_ring * self.num_ulysses

    @property
    def num_ring(self) -> int:
        """Ranks of the ring."""
        return 1 if self.ring is None else self.ring.size

    @property
    def num_ulysses(self) -> int:
        """Ranks that exchange heads."""
        return 1 if self.ulysses is None else self.ulysses.size()

    def places(self, seq_tokens: int) -> Tensor:
        """Places in the sequence of the tokens that this rank holds, (S / ranks,) int64."""
        return torch.tensor(
            places(self.kind, self.num_ring, self.num_ulysses, self.rank, seq_tokens)
        )

    def in_documents(self, borders: Borders) -> Tensor:
        """Places in their documents of the tokens that this rank holds, (B, S / ranks) int64."""
        rows: list[Tensor] = []
        for ends in borders:
            edges = torch.tensor(ends)
            starts = edges[:-1].repeat_interleave(edges.diff())
            rows.append(torch.arange(ends[-1]) - starts)
        return self.part(torch.stack(rows))

    def part(self, x_BS: Tensor) -> Tensor:
        """This rank's tokens of whole sequences, (B, S / ranks)."""
        if self.ranks == 1:
            return x_BS
        return x_BS[:, self.places(x_BS.shape[1]).to(x_BS.device)]

    def context(self, borders: Borders | None = None) -> Context | None:
        """How attention works on this rank; None for plain attention."""
        method: Method | None = Local(borders) if borders is not None else None
        if self.ring is not None and self.kind == "lightseq":
            method = LightSeq(self.ring, borders)
        elif self.ring is not None:
            method = Ring(self.kind, self.ring, borders)
        if method is None and self.ulysses is None:
            return None
        return Context(method, self.ulysses)


def over_mesh(phase: Phase) -> Spread:
    """The spread of a plan's sequences; every rank calls it, for all make all groups."""
    mesh = phase.mesh
    if mesh.cp == 1:
        return Spread()
    sharing = [
        [first + outer * mesh.cp * mesh.tp + mesh.tp * index for index in range(mesh.cp)]
        for outer in range(mesh.world // (mesh.cp * mesh.tp))
        for first in range(mesh.tp)
    ]
    inside = mesh.ulysses
    ring = _own_group([ranks[u::inside] for ranks in sharing for u in range(inside)])
    rows = range(0, mesh.cp, inside)
    ulysses = _own_group([ranks[r : r + inside] for ranks in sharing for r in rows])
    return Spread(
        kind=str(phase.technique("context-parallel").get("kind", "zigzag")),
        ring=None if ring is None else Peers.of(ring),
        ulysses=ulysses,
        rank=mesh.coordinates(dist.get_rank())["cp"],
    )


def _own_group(members: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """The group of this rank among several of one size; None where each is one rank alone."""
    if len(members[0]) == 1:
        return None
    own: dist.ProcessGroup | None = None
    for ranks in members:
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            assert isinstance(group, dist.ProcessGroup)
            own = group
    assert own is not None
    # a backend may connect all ranks at a group's first call; later rounds leave some out
    dist.barrier(group=own)
    return own
