"""What documents packed into sequences make of the attention's work.

A token attends to its own document alone. With documents of l_i tokens in a sequence of S, causal
attention works on sum l_i^2 / 2 pairs instead of S^2 / 2:

    attended   sum l_i^2 / S, the mean length of the document that a token is in
    slowest    work of the busiest rank over the mean: replicas draw different documents, and in a
               ring a rank has whatever documents its chunks meet

Both from the very sequences of the job's first steps, which depend on its seed alone. Ranks meet
after every micro-batch under ZeRO 3, pipelines and rings, else at the end of the step.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..lengths import Lengths
from ..workload import Workload
from .graph import Array, Sizes

if TYPE_CHECKING:
    from .layout import Layouts

SAMPLED = 256
"""Sequences that are looked at, in whole steps, one step at least."""
Work = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """All that the documents of a job depend on."""

    lengths: Lengths
    seq_tokens: int
    global_batch_seqs: int
    seed: int

    @staticmethod
    def of(workload: Workload) -> Packing | None:
        """The packing of a workload; None where a sequence is one document."""
        if workload.lengths is None:
            return None
        return Packing(
            lengths=workload.lengths,
            seq_tokens=workload.seq_tokens,
            global_batch_seqs=workload.global_batch_seqs,
            seed=workload.seed,
        )

    @property
    def attended_tokens(self) -> float:
        """Mean over tokens of the length of their document."""
        return float(_squares(self).mean()) / self.seq_tokens

    @property
    def documents_per_seq(self) -> float:
        """Documents of a sequence, the one that is cut included."""
        return float(np.mean([len(ends) for step in _ends(self) for ends in step]))


def packing_sizes(packing: Packing | None, kind: str, layouts: Layouts) -> Sizes:
    """Sizes of axes that the attention core is priced by where documents are packed."""
    if packing is None:
        return {}
    one = np.ones(len(layouts))
    return {
        "attended": one * packing.attended_tokens,
        "documents": one * packing.documents_per_seq,
        "slowest": slowest(packing, kind, layouts),
    }


def slowest(packing: Packing, kind: str, layouts: Layouts) -> Array:
    """Attention work of the busiest rank over the mean, of each layout."""
    meets = (layouts.zero == 3) | (layouts.pp > 1) | (layouts.ring > 1)
    columns = (layouts.replicas, layouts.num_microbatches, layouts.ring, meets)
    shapes = np.stack([np.asarray(c, dtype=np.int64) for c in columns], axis=1)
    distinct, where = np.unique(shapes, axis=0, return_inverse=True)
    found = [_slowest(packing, kind, *(int(n) for n in row)) for row in distinct]
    return np.array(found)[where.reshape(-1)]


@functools.lru_cache(maxsize=4096)
def _slowest(packing: Packing, kind: str, dp: int, micro: int, ring: int, meets: int) -> float:
    work = _squares(packing)[..., None] if ring == 1 else _over_ring(packing, kind, ring)
    steps, seqs, _ = work.shape
    if seqs % (dp * micro):
        return 1.0
    passes = work.reshape(steps, dp, micro, seqs // (dp * micro), ring).sum(axis=3)
    mean = float(passes.sum(axis=(1, 3)).sum(axis=1).mean()) / (dp * ring)
    if not meets:
        return float(passes.sum(axis=2).max(axis=(1, 2)).mean()) / mean
    return float(passes.max(axis=(1, 3)).sum(axis=1).mean()) / mean


@functools.lru_cache(maxsize=64)
def _ends(packing: Packing) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Ends of the documents by step and sequence."""
    steps = max(1, SAMPLED // packing.global_batch_seqs)
    return tuple(
        tuple(
            packing.lengths.packed(packing.seq_tokens, packing.seed, step, index)
            for index in range(packing.global_batch_seqs)
        )
        for step in range(steps)
    )


@functools.lru_cache(maxsize=64)
def _squares(packing: Packing) -> Work:
    """sum l^2 of every sequence, (steps, sequences)."""
    return np.array(
        [[sum((b - a) ** 2 for a, b in pairwise((0, *ends))) for ends in step]
         for step in _ends(packing)],
        dtype=np.float64,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _over_ring(packing: Packing, kind: str, ring: int) -> Work:
    """The same share of every rank of a ring, (steps, sequences, ring); pairs count twice."""
    return np.array(
        [[shares(ends, packing.seq_tokens, kind, ring) for ends in step]
         for step in _ends(packing)],
        dtype=np.float64,
    )  # fmt: skip


def shares(ends: tuple[int, ...], seq_tokens: int, kind: str, ring: int) -> list[float]:
    """Attention work of every rank of a ring, in pairs of which a triangle counts as a square."""
    chunks = 2 * ring if kind != "ring" and kind != "lightseq" else ring
    length = seq_tokens // chunks
    starts = (0, *ends)
    if kind == "lightseq":
        return _with_help(starts, length, ring)
    work = [_seen(starts, c * length, (c + 1) * length) for c in range(chunks)]
    if chunks == ring:
        return work
    return [work[r] + work[chunks - 1 - r] for r in range(ring)]


def _seen(starts: tuple[int, ...], first: int, stop: int) -> float:
    """Twice the keys that queries at places first..stop see, their own halves counted once."""
    total, at = 0.0, first
    while at < stop:
        index = bisect_right(starts, at)
        start, end = starts[index - 1], min(starts[index], stop)
        total += float((end - start) ** 2 - (at - start) ** 2)
        at = end
    return total


def _with_help(starts: tuple[int, ...], length: int, ring: int) -> list[float]:
    """Work of the ranks of LightSeq's schedule: far keys of late ranks are looked at by early ones.

    Of two different chunks the document of the later one's first token alone lies in both.
    """
    work = [_seen_inside(starts, r * length, (r + 1) * length) for r in range(ring)]
    for later in range(1, ring):
        first = later * length
        index = bisect_right(starts, first)
        start, end = starts[index - 1], min(starts[index], first + length)
        for earlier in range(later):
            keys = max(0, (earlier + 1) * length - max(start, earlier * length))
            distance = later - earlier
            worker = later if distance <= ring // 2 else earlier
            work[worker] += 2.0 * keys * (end - first)
    return work


def _seen_inside(starts: tuple[int, ...], first: int, stop: int) -> float:
    """The same among the tokens of one chunk."""
    inside = [s for s in starts if first < s < stop]
    return sum(float((b - a) ** 2) for a, b in pairwise([first, *inside, stop]))
