"""Workload: what the user fixes - lengths, batch, optimiser, data, allowed quality, objective."""

from __future__ import annotations

from typing import ClassVar, Literal

from .document import Document
from .errors import InputError
from .lengths import Lengths

Quality = Literal["exact", "equivalent-start", "measured-here", "published", "unquantified"]
Objective = Literal["throughput", "cost", "memory"]
Optimizer = Literal["adamw", "adamw8bit", "adamw_fp8", "sgd"]


class Workload(Document, frozen=True, kw_only=True):
    """One training job, independent of how it is run."""

    SCHEMA: ClassVar[str] = "forerun.workload/1"

    schema: str = "forerun.workload/1"
    seq_tokens: int
    """Tokens per sequence; images and towers of fixed length keep their own (docs/models.md)."""
    lengths: Lengths | None = None
    """How long documents are; None = a sequence is one document of `seq_tokens`."""
    packed: bool = True
    """With `lengths`: documents fill sequences of `seq_tokens`, and attention stays within a
    document; else each document, cut at `seq_tokens`, is a sequence of its own length."""
    buckets: int = 1
    """With sequences of their own lengths: into so many classes they are sorted by length; a step
    draws from one class, as many as make an equal number of tokens. 1 = steps draw from all."""
    global_batch_seqs: int
    steps: int = 10
    optimizer: Optimizer = "adamw"
    """AdamW with fp32, 8-bit or fp8 moments, or plain SGD."""
    learning_rate: float = 3e-4
    seed: int = 0
    data: str | None = None
    """File or folder of text or JSONL; None = the Python standard library's own source."""
    objective: Objective = "throughput"
    quality: tuple[Quality, ...] = ("exact",)
    """Classes of techniques that the planner may use."""

    def __post_init__(self) -> None:
        if self.lengths is None and not self.packed:
            raise InputError("lengths", "(missing)", "sequences of their own lengths need them",
                             "give --lengths")  # fmt: skip
        if self.buckets > 1 and self.packed:
            raise InputError("buckets", self.buckets, "sort sequences of their own lengths",
                             "use --unequal, or drop --buckets")  # fmt: skip
        for field in ("seq_tokens", "global_batch_seqs", "steps", "buckets"):
            if getattr(self, field) < 1:
                raise InputError(field, getattr(self, field), "not positive", "give 1 or more")

    @property
    def global_batch_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.seq_tokens * self.global_batch_seqs
