"""Which tokens a rank of context parallelism holds, and which of its queries see which keys.

A sequence is cut into equal chunks. Rank r of a ring of R holds

    zigzag           chunks r and 2R - 1 - r of 2R: as much causal work as any other rank
    ring, lightseq   chunk r of R

With ulysses inside the ring, rank (r, u) of R x U holds the u-th part of what ring rank r holds;
the exchange puts these together. Chunks of a rank lie in ascending order, so that causal attention
of its tokens among themselves is plain causal attention.

Of two different chunks either all queries see all keys or none does. Where documents are packed
into one sequence, a query sees keys of its own document alone: of two different chunks the only
document that can lie in both is the one that holds the first token of the later chunk, which makes
one rectangle; a chunk and itself make one triangle per document.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

Borders = tuple[tuple[int, ...], ...]
"""Per row of a batch: 0, the ends of its documents in order, the last of which is its length."""


def as_borders(ends_BN: Tensor) -> Borders:
    """Borders from the ends of each row's documents, the last of which may be repeated to fill.

    >>> as_borders(torch.tensor([[3, 8, 8], [2, 5, 8]]))
    ((0, 3, 8), (0, 2, 5, 8))
    """
    return tuple((0, *dict.fromkeys(ends)) for ends in ends_BN.tolist())


@dataclass(frozen=True, slots=True)
class Block:
    """Some queries and the keys they see: places in what two ranks hold, of one row or all."""

    q: tuple[int, int]
    k: tuple[int, int]
    causal: bool
    row: int | None = None

    def queries(self, *tensors: Tensor) -> list[Tensor]:
        """The block's part of tensors (B, H, S, ...)."""
        return [_part(tensor, self.row, self.q) for tensor in tensors]

    def keys(self, *tensors: Tensor) -> list[Tensor]:
        """The block's part of tensors (B, G, T, ...)."""
        return [_part(tensor, self.row, self.k) for tensor in tensors]

    def covers(self, num_queries: int) -> bool:
        """Whether all queries of all rows are in it."""
        return self.row is None and self.q == (0, num_queries)


def _part(tensor: Tensor, row: int | None, span: tuple[int, int]) -> Tensor:
    rows = tensor if row is None else tensor[row : row + 1]
    return rows[:, :, span[0] : span[1]]


def held(kind: str, ring: int, rank: int) -> tuple[int, ...]:
    """The chunks of a ring rank, in order.

    >>> [held("zigzag", 2, r) for r in range(2)], held("ring", 2, 1)
    ([(0, 3), (1, 2)], (1,))
    """
    return (rank, 2 * ring - 1 - rank) if kind == "zigzag" and ring > 1 else (rank,)


def places(kind: str, ring: int, ulysses: int, rank: int, seq_tokens: int) -> list[int]:
    """Places in the sequence of the tokens that rank `rank` of ring * ulysses holds, ascending."""
    chunks = held(kind, ring, rank // ulysses)
    length = seq_tokens // (ring * len(chunks))
    every = [at for c in chunks for at in range(c * length, (c + 1) * length)]
    part = len(every) // ulysses
    first = rank % ulysses * part
    return every[first : first + part]


def blocks(
    own: Sequence[int], other: Sequence[int], chunk_tokens: int, borders: Borders | None = None
) -> list[Block]:
    """What queries in the chunks `own` see of keys in the chunks `other`.

    >>> blocks((0, 3), (0, 3), 8)
    [Block(q=(0, 16), k=(0, 16), causal=True, row=None)]
    >>> blocks((1, 2), (0, 3), 8)
    [Block(q=(0, 16), k=(0, 8), causal=False, row=None)]
    """
    if borders is not None:
        return [
            block
            for row, ends in enumerate(borders)
            for block in _of_documents(own, other, chunk_tokens, ends, row)
        ]
    if own == other:
        whole = (0, len(own) * chunk_tokens)
        return [Block(whole, whole, True)]
    found: list[Block] = []
    for at, chunk in enumerate(own):
        seen = sum(c < chunk for c in other) * chunk_tokens
        span = (at * chunk_tokens, (at + 1) * chunk_tokens)
        if found and found[-1].k[1] == seen:
            found[-1] = Block((found[-1].q[0], span[1]), (0, seen), False)
        elif seen:
            found.append(Block(span, (0, seen), False))
    return found


def _of_documents(
    own: Sequence[int], other: Sequence[int], chunk_tokens: int, ends: Sequence[int], row: int
) -> list[Block]:
    found: list[Block] = []
    for i, later in enumerate(own):
        first = later * chunk_tokens
        for j, earlier in enumerate(other):
            if earlier > later:
                continue
            q_at, k_at = (i - later) * chunk_tokens, (j - earlier) * chunk_tokens
            if earlier == later:
                inside = [e for e in ends if first < e < first + chunk_tokens]
                for a, b in pairwise([first, *inside, first + chunk_tokens]):
                    found.append(Block((q_at + a, q_at + b), (k_at + a, k_at + b), True, row))
                continue
            at = bisect_right(ends, first)
            start, end = ends[at - 1], ends[at]
            last = (earlier + 1) * chunk_tokens
            if start < last:
                seen = (k_at + max(start, earlier * chunk_tokens), k_at + last)
                asking = (q_at + first, q_at + min(end, first + chunk_tokens))
                found.append(Block(asking, seen, False, row))
    return found
