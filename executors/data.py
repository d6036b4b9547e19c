"""Batches of the corpus; which bytes a sequence holds depends on (seed, step, sequence) alone.

Sequence i of the global batch of step k is the same whatever the layout, so that losses of
different layouts can be compared step by step. Data-parallel rank r takes the contiguous slice r of
the global batch, and micro-batch j the slice j of that.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..plan import Phase

if TYPE_CHECKING:
    from torch import Tensor


def open_corpus(path: Path) -> np.ndarray:
    """The corpus as a read-only array of bytes, mapped from its file: ranks share its pages."""
    return np.memmap(path, dtype=np.uint8, mode="r")


def sequence(corpus: np.ndarray, seed: int, step: int, index: int, num_tokens: int) -> np.ndarray:
    """`num_tokens` consecutive bytes from a place drawn by (seed, step, index)."""
    last_start = len(corpus) - num_tokens
    start = int(np.random.default_rng((seed, step, index)).integers(0, last_start + 1))
    return np.asarray(corpus[start : start + num_tokens], dtype=np.int64)


def batch(corpus: np.ndarray, seed: int, step: int, phase: Phase, dp_rank: int) -> Tensor:
    """Tokens of one data-parallel rank, int64 (micro_batch_seqs * num_microbatches, S + 1)."""
    import torch

    local_seqs = phase.micro_batch_seqs * phase.num_microbatches
    first = dp_rank * local_seqs
    rows = [
        sequence(corpus, seed, step, index, phase.seq_tokens + 1)
        for index in range(first, first + local_seqs)
    ]
    return torch.from_numpy(np.stack(rows))
