"""Workload: what the user fixes - lengths, batch, optimiser, data, allowed quality, objective."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from .document import Document
from .errors import InputError
from .evidence import Evidence
from .lengths import Lengths

Quality = Literal["exact", "equivalent-start", "measured-here", "published", "unquantified"]
Objective = Literal["throughput", "cost", "memory"]
Optimizer = Literal[
    "adamw", "adamw8bit", "adamw4bit", "adamw_fp8", "adamw_fp8_block", "adamw_offload", "sgd"
]
BalanceLoss = Literal["none", "micro-batch", "global-batch"]


class Workload(Document, frozen=True, kw_only=True):
    """One training job, independent of how it is run."""

    SCHEMA: ClassVar[str] = "forerun.workload/1"

    schema: str = "forerun.workload/1"
    seq_tokens: int
    """Tokens per sequence; images and towers of fixed length keep their own (docs/models.md)."""
    lengths: Lengths | None = None
    """How long documents are that fill a sequence, attention staying within each; None = a sequence
    is one document."""
    global_batch_seqs: int
    steps: int = 10
    optimizer: Optimizer = "adamw"
    """AdamW with moments in fp32; in 8 bits, 4 bits or 8-bit floats by block (torchao); in 8-bit
    floats of expanded range (adamw_fp8, COAT); or on the host (torchao). Or SGD, no momentum."""
    learning_rate: float = 3e-4
    clip_norm: float | None = None
    """Largest norm of all gradients together, above which they are scaled down; None: as they are.
    """
    seed: int = 0
    data: str | None = None
    """File or folder of text or JSONL; None = the Python standard library's own source."""
    objective: Objective = "throughput"
    quality: tuple[Quality, ...] = ("exact",)
    """Classes of techniques that the planner may use (`planner/quality.py`)."""
    accepted: tuple[str, ...] = ()
    """Single techniques that it may use whatever their class, by the names of their records."""
    evidence: tuple[Evidence, ...] = ()
    """What was measured of techniques on models like this one on these devices (`forerun probe`):
    harmless ones are of class measured-here."""
    balance_loss: BalanceLoss = "none"
    """Load-balancing loss of every router, E sum_i f_i p_i: the fractions f of choices that fall on
    an expert are those of one micro-batch, or of all replicas and of the step's micro-batches so
    far (Qiu et al. 2025, Demons in the Detail)."""
    balance_loss_coef: float = 0.01
    """Its weight beside the loss of tokens; `router_aux_loss_coef` of Hugging Face models."""
    router_z_loss_coef: float = 0.0
    """Weight of the mean squared log-sum-exp of router logits (Zoph et al. 2022, ST-MoE)."""

    def __post_init__(self) -> None:
        for field in ("seq_tokens", "global_batch_seqs", "steps"):
            if getattr(self, field) < 1:
                raise InputError(field, getattr(self, field), "not positive", "give 1 or more")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise InputError("clip-norm", self.clip_norm, "not a positive number",
                             "give one such as 1.0, or leave it out")  # fmt: skip
        for field in ("balance_loss_coef", "router_z_loss_coef"):
            weight: float = getattr(self, field)
            if not 0 <= weight < float("inf"):
                raise InputError(field, weight, "not a weight of zero or more", "give 0 for none")

    @property
    def global_batch_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.seq_tokens * self.global_batch_seqs
