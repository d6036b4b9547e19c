"""Balanced causal attention on contiguous blocks: ranks that are done help those that are not.

Of P ranks (an even number) rank r has r + 1 blocks of keys to look at. At step t = 0 .. P / 2

    r >= t             works on its own queries with the keys of rank r - t, sent by that rank
    r < t, t < P / 2   helps rank o = r - t + P: gets its queries, works on them with its own keys
                       and sends the partial output back, which o adds one step later
    r < P / 2 = t      has nothing to do

so that all ranks are done after P / 2 + 1 steps, the first of which is half a block: P / (P + 1) of
the work that a perfect balance would do in that time, where a plain ring does about half.

Messages of all ranks in forward: X of keys and values, Y of queries, Y of outputs with their lse,

    X = P (P/2 - 1) - (P/2) (P/2 - 1) / 2 + P/2,      Y = (P/2) (P/2 - 1) / 2

In backward X of keys and values and X of their gradients; Y of (queries, outputs, gradients of
outputs, lse) and Y of the queries' gradients.

Source: Li et al. 2023 (LightSeq, DistFlashAttention), sections 3.1 and 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .chunks import Block, Borders, blocks
from .flash import Partial, Rows, zeros_like
from .peers import Flight, Message, Peers, packed, unpacked


def keys_of(rank: int, step: int) -> int | None:
    """The rank whose keys a rank looks at in a step, with its own queries."""
    return rank - step if rank >= step else None


def helped(rank: int, step: int, size: int) -> int | None:
    """The rank whose queries a rank works on in a step, with its own keys."""
    return rank - step + size if rank < step < size // 2 else None


def messages(size: int) -> tuple[int, int]:
    """X and Y: messages of keys, and of queries (as many outputs come back), of all ranks.

    >>> messages(8)
    (22, 6)
    """
    half = size // 2
    steps = range(1, half + 1)
    keys = sum(keys_of(r, t) is not None for t in steps for r in range(size))
    queries = sum(helped(r, t, size) is not None for t in steps for r in range(size))
    return keys, queries


@dataclass(frozen=True, slots=True)
class LightSeq:
    """The attention of one rank under the balanced schedule."""

    peers: Peers
    borders: Borders | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, H, S, D) and lse (B, H, S) of this rank's queries over all that they see."""
        rank = self.peers.rank
        mine = _Mine(k, v, [q])
        given, flight = self._inputs(mine, 1)
        partial = Partial.of(q, k, v, self._blocks(q, rank, rank))
        arriving: list[Tensor] = []
        returning = Flight()
        for step in range(1, self.peers.size // 2 + 1):
            flight.land()
            here = given
            given, flight = self._inputs(mine, step + 1)
            source, other, helper = self._roles(step)
            sends: list[Message] = []
            if source is not None:
                their_k, their_v = unpacked(here[0])
                partial.see(q, their_k, their_v, self._blocks(q, rank, source))
            elif other is not None:
                (theirs,) = unpacked(here[0])
                helping = Partial.of(theirs, k, v, self._blocks(q, other, rank))
                sends = [(_laid(helping.out.to(q.dtype)), other), (_laid(helping.lse), other)]
            returning.land()
            _take(partial, arriving)
            arriving = [] if helper is None else [_empty(q), _empty(partial.lse)]
            receives = [(x, helper) for x in arriving if helper is not None]
            returning = self.peers.post(sends, receives)
        returning.land()
        _take(partial, arriving)
        return partial.out.to(q.dtype), partial.lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v."""
        # sums become results when all messages are gone
        grad_q, grad_k, grad_v = self._sums(Rows(q, out, lse, grad_out), k, v)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _sums(self, rows: Rows, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rank, size, q = self.peers.rank, self.peers.size, rows.q
        mine = _Mine(k, v, [q, rows.out, rows.grad_out], rows.lse)
        given, flight = self._inputs(mine, 1)
        grad_q, grad_k, grad_v = rows.start(k, v, self._blocks(q, rank, rank))
        returned = _Returned()
        returning = Flight()
        for step in range(1, size // 2 + 1):
            flight.land()
            here = given
            given, flight = self._inputs(mine, step + 1)
            source, other, helper = self._roles(step)
            sends: list[Message] = []
            if source is not None:
                grads = here[0].new_zeros(here[0].shape)
                seen = self._blocks(q, rank, source)
                their_k, their_v = unpacked(here[0])
                their_grad_k, their_grad_v = unpacked(grads)
                rows.add(their_k, their_v, seen, grad_q, their_grad_k, their_grad_v)
                sends.append((grads, source))
            elif other is not None:
                their_q, their_out, their_grad = unpacked(here[0])
                theirs = Rows(their_q, their_out, here[1].transpose(1, 2), their_grad)
                answer = zeros_like(their_q)
                theirs.add(k, v, self._blocks(q, other, rank), answer, grad_k, grad_v)
                sends.append((answer.transpose(1, 2), other))
            returning.land()
            returned.add(grad_q, grad_k, grad_v)
            receives: list[Message] = []
            if rank + step < size:
                returned.keys = _empty(k, 2)
                receives.append((returned.keys, rank + step))
            if helper is not None:
                returned.queries = _empty(q)
                receives.append((returned.queries, helper))
            returning = self.peers.post(sends, receives)
        returning.land()
        returned.add(grad_q, grad_k, grad_v)
        return grad_q, grad_k, grad_v

    def _roles(self, step: int) -> tuple[int | None, int | None, int | None]:
        """In a step: whose keys this rank looks at, or whom it helps, and who helps it."""
        rank, size = self.peers.rank, self.peers.size
        helper = rank + step - size
        is_helped = helper >= 0 and helped(helper, step, size) == rank
        return keys_of(rank, step), helped(rank, step, size), helper if is_helped else None

    def _blocks(self, q: Tensor, own: int, other: int) -> list[Block]:
        return blocks((own,), (other,), q.shape[2], self.borders)

    def _inputs(self, mine: _Mine, step: int) -> tuple[list[Tensor], Flight]:
        """What this rank needs in a step, as it arrives, and the messages under way."""
        rank, size = self.peers.rank, self.peers.size
        if step > size // 2:
            return [], Flight()
        source, other, helper = self._roles(step)
        sends: list[Message] = []
        if rank + step < size:
            sends.append((mine.keys(), rank + step))
        if helper is not None:
            sends += [(x, helper) for x in mine.queries()]
        receives: list[Message] = []
        if source is not None:
            receives.append((_empty(mine.k, 2), source))
        elif other is not None:
            receives.append((_empty(mine.of_queries[0], len(mine.of_queries)), other))
            if mine.lse is not None:
                receives.append((_empty(mine.lse), other))
        return [x for x, _ in receives], self.peers.post(sends, receives)


class _Mine:
    """What other ranks may ask this one for, packed when they do."""

    def __init__(
        self, k: Tensor, v: Tensor, of_queries: list[Tensor], lse: Tensor | None = None
    ) -> None:
        self.k, self.v, self.of_queries, self.lse = k, v, of_queries, lse
        self._keys: Tensor | None = None
        self._queries: list[Tensor] = []

    def keys(self) -> Tensor:
        """Keys and values, (2, B, S, G, D)."""
        if self._keys is None:
            self._keys = packed(self.k, self.v)
        return self._keys

    def queries(self) -> list[Tensor]:
        """What belongs to queries, (parts, B, S, H, D), and lse (B, S, H) where there is one."""
        if not self._queries:
            alone = len(self.of_queries) == 1
            parts = _laid(self.of_queries[0])[None] if alone else packed(*self.of_queries)
            self._queries = [parts] if self.lse is None else [parts, _laid(self.lse)]
        return self._queries


@dataclass(slots=True)
class _Returned:
    """Gradients of this rank's tensors that others worked out."""

    keys: Tensor | None = None
    queries: Tensor | None = None

    def add(self, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
        """Add what has arrived, once."""
        if self.keys is not None:
            for total, part in zip((grad_k, grad_v), unpacked(self.keys), strict=True):
                total.add_(part)
        if self.queries is not None:
            grad_q.add_(self.queries.transpose(1, 2))
        self.keys = self.queries = None


def _laid(x: Tensor) -> Tensor:
    """(B, H, S, ...) as a message (B, S, H, ...)."""
    return x.transpose(1, 2).contiguous()


def _empty(x: Tensor, parts: int = 0) -> Tensor:
    """Room for a message (B, S, H, ...) of the form of (B, H, S, ...), or of several such."""
    form = x.transpose(1, 2).shape
    return x.new_empty((parts, *form) if parts else form)


def _take(partial: Partial, arrived: list[Tensor]) -> None:
    """Merge a helper's output and lse."""
    if arrived:
        out, lse = (x.transpose(1, 2) for x in arrived)
        whole = (0, out.shape[2])
        partial.add(Block(whole, whole, False), out, lse)
