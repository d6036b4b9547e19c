"""Batches of the corpus; which bytes a sequence holds depends on (seed, step, sequence) alone.

Sequence i of the global batch of step k is the same whatever the layout, so that losses of
different layouts can be compared step by step. Data-parallel rank r takes the contiguous slice r of
the global batch, and micro-batch j the slice j of that.

Where documents are packed into a sequence, each is a stretch of its own from another place, and the
token after its last is that token's target: what a document is trained on does not depend on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..plan import Phase
from ..workload import Workload

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def open_corpus(path: Path) -> np.ndarray:
    """The corpus as a read-only array of bytes, mapped from its file: ranks share its pages."""
    return np.memmap(path, dtype=np.uint8, mode="r")


def sequence(corpus: np.ndarray, seed: int, step: int, index: int, num_tokens: int) -> np.ndarray:
    """`num_tokens` consecutive bytes from a place drawn by (seed, step, index)."""
    return stretch(corpus, np.random.default_rng((seed, step, index)), num_tokens)


def stretch(corpus: np.ndarray, random: np.random.Generator, num_tokens: int) -> np.ndarray:
    """`num_tokens` consecutive bytes from a random place."""
    start = int(random.integers(0, len(corpus) - num_tokens + 1))
    return np.asarray(corpus[start : start + num_tokens], dtype=np.int64)


class Rows(NamedTuple):
    """Sequences with their targets."""

    inputs_BS: Tensor
    targets_BS: Tensor
    documents_BN: Tensor | None
    """Ends of the documents of each sequence, the last of which is repeated to fill; on the host.
    None: a sequence is one document."""

    def to(self, device: torch.device) -> Rows:
        """The same with its tokens on a device."""
        return Rows(self.inputs_BS.to(device), self.targets_BS.to(device), self.documents_BN)

    def chunks(self, count: int) -> Iterator[Rows]:
        """The rows of each micro-batch."""
        inputs, targets = self.inputs_BS.chunk(count), self.targets_BS.chunk(count)
        documents = (None,) * count
        if self.documents_BN is not None:
            documents = self.documents_BN.chunk(count)
        return map(Rows, inputs, targets, documents)

    @staticmethod
    def of(tokens_BS1: Tensor) -> Rows:
        """Sequences of one document each, from one token more than they have."""
        return Rows(tokens_BS1[:, :-1], tokens_BS1[:, 1:], None)


def batch(corpus: np.ndarray, seed: int, step: int, phase: Phase, dp_rank: int) -> Tensor:
    """Tokens of one data-parallel rank, int64 (micro_batch_seqs * num_microbatches, S + 1)."""
    import torch

    rows = [
        sequence(corpus, seed, step, index, phase.seq_tokens + 1) for index in own(phase, dp_rank)
    ]
    return torch.from_numpy(np.stack(rows))


def own(phase: Phase, dp_rank: int) -> range:
    """The sequences of a data-parallel rank in the global batch."""
    local_seqs = phase.micro_batch_seqs * phase.num_microbatches
    return range(dp_rank * local_seqs, (dp_rank + 1) * local_seqs)


def packed_batch(
    corpus: np.ndarray, workload: Workload, step: int, phase: Phase, dp_rank: int
) -> Rows:
    """One data-parallel rank's sequences, packed with documents of the workload's lengths."""
    import torch

    assert workload.lengths is not None
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    every: list[tuple[int, ...]] = []
    for index in own(phase, dp_rank):
        ends = workload.lengths.packed(workload.seq_tokens, workload.seed, step, index)
        random = np.random.default_rng((workload.seed, step, index))
        parts = [stretch(corpus, random, end - start + 1) for start, end in pairwise((0, *ends))]
        inputs.append(np.concatenate([part[:-1] for part in parts]))
        targets.append(np.concatenate([part[1:] for part in parts]))
        every.append(ends)
    most = max(map(len, every))
    filled = [ends + ends[-1:] * (most - len(ends)) for ends in every]
    return Rows(
        torch.from_numpy(np.stack(inputs)),
        torch.from_numpy(np.stack(targets)),
        torch.tensor(filled),
    )
