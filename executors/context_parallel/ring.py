"""Attention over a ring: keys and values go round while each rank works on those it has.

At step t = 0, 1, ... rank r has the keys and values of rank r - t (mod R); those for step t + 1 are
under way meanwhile. In backward they go round again, and the gradients of a rank's keys and values
follow one step behind, each rank adding its part, until they are home.

    zigzag   every rank sends at every step: R - 1 times each way, and the gradients R - 1 times
    ring     rank r has no use for later tokens: what goes round stops at rank R - 1, and gradients
             go home from there; (R - 1) / 2 messages per rank in the mean

Source: Liu, Zaharia, Abbeel 2023 (Ring Attention with Blockwise Transformers).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .chunks import Block, Borders, blocks, held
from .flash import Partial, Rows
from .peers import Flight, Message, Peers, packed, unpacked


@dataclass(frozen=True, slots=True)
class Ring:
    """The attention of one rank of a ring: `zigzag`, or `ring` with contiguous blocks."""

    kind: str
    peers: Peers
    borders: Borders | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, H, S, D) and lse (B, H, S) of this rank's queries over all that they see."""
        here = packed(k, v)
        there, flight = self._pass_on(here, 0)
        partial = Partial.of(q, k, v, self._blocks(q, 0))
        for step in range(1, self.peers.size):
            flight.land()
            here = there
            there, flight = self._pass_on(here, step)
            if self._works(step):
                their_k, their_v = unpacked(here)
                partial.see(q, their_k, their_v, self._blocks(q, step))
        flight.land()
        return partial.out.to(q.dtype), partial.lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v."""
        # sums become results when all that went round is gone
        grad_q, grad_k, grad_v = self._sums(Rows(q, out, lse, grad_out), k, v)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _sums(self, rows: Rows, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = rows.q
        here = packed(k, v)
        there, flight = self._pass_on(here, 0)
        grad_q, grad_k, grad_v = rows.start(k, v, self._blocks(q, 0))
        coming: Tensor | None = None
        home: Tensor | None = None
        following = Flight()
        for step in range(1, self.peers.size):
            flight.land()
            here = there
            there, flight = self._pass_on(here, step)
            own: Tensor | None = None
            if self._works(step):
                own = here.new_zeros(here.shape)
                (their_k, their_v), (own_k, own_v) = unpacked(here), unpacked(own)
                rows.add(their_k, their_v, self._blocks(q, step), grad_q, own_k, own_v)
            following.land()
            if own is not None and coming is not None:
                own.add_(coming)
            _add(grad_k, grad_v, home)
            coming, home, following = self._gradients_on(own, here, step)
        following.land()
        _add(grad_k, grad_v, coming)
        _add(grad_k, grad_v, home)
        return grad_q, grad_k, grad_v

    def _works(self, step: int, ahead: int = 0) -> bool:
        """Whether this rank, or one some places ahead, has keys to look at in a step.

        Contiguous blocks are of no use to earlier ranks.
        """
        rank = self.peers.rank + ahead
        return self.kind == "zigzag" or step <= rank < self.peers.size

    def _blocks(self, q: Tensor, step: int) -> list[Block]:
        """What this rank's queries see of the keys that it has at a step."""
        size, rank = self.peers.size, self.peers.rank
        own, other = (held(self.kind, size, r) for r in (rank, (rank - step) % size))
        return blocks(own, other, q.shape[2] // len(own), self.borders)

    def _pass_on(self, here: Tensor, step: int) -> tuple[Tensor, Flight]:
        """Where the keys and values of the next step arrive, and the messages under way."""
        size, rank = self.peers.size, self.peers.rank
        if step + 1 == size:
            return here, Flight()
        sends: list[Message] = []
        receives: list[Message] = []
        there = here
        if self._works(step + 1, ahead=1):
            sends.append((here, (rank + 1) % size))
        if self._works(step + 1):
            there = here.new_empty(here.shape)
            receives.append((there, (rank - 1) % size))
        return there, self.peers.post(sends, receives)

    def _gradients_on(
        self, own: Tensor | None, like: Tensor, step: int
    ) -> tuple[Tensor | None, Tensor | None, Flight]:
        """Sums that arrive for the next step's block and for this rank's own, and the messages.

        `own` is the sum for this step's block up to this rank. That of a contiguous block is whole
        at the last rank.
        """
        size, rank, last = self.peers.size, self.peers.rank, self.peers.size - 1
        zigzag = self.kind == "zigzag"
        sends: list[Message] = []
        receives: list[Message] = []
        coming: Tensor | None = None
        home: Tensor | None = None
        if own is not None:
            sends.append((own, (rank + 1) % size if zigzag or rank < last else last - step))
        if zigzag or rank > step:
            coming = like.new_empty(like.shape)
            receives.append((coming, (rank - 1) % size))
        if not zigzag and rank == last - step:
            home = like.new_empty(like.shape)
            receives.append((home, last))
        return coming, home, self.peers.post(sends, receives)


def _add(grad_k: Tensor, grad_v: Tensor, message: Tensor | None) -> None:
    """Add gradients that came home to those of this rank's keys and values."""
    if message is not None:
        for total, part in zip((grad_k, grad_v), unpacked(message), strict=True):
            total.add_(part)
