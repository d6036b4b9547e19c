"""Estimate: what a plan should cost, term by term."""

from __future__ import annotations

from typing import Literal

from .document import Value

Evidence = Literal["measured", "catalog", "assumed"]

TIME_TERMS: tuple[str, ...] = (
    "forward", "backward", "recompute", "optimizer",
    "exposed.dp", "exposed.tp", "exposed.cp", "exposed.ep", "exposed.pp", "exposed.copy",
    "bubble", "host", "data",
)  # fmt: skip
"""Terms of a step; each moment of a rank is in one of them, so that they sum to the step."""

MEMORY_TERMS: tuple[str, ...] = (
    "parameters", "gradients", "optimizer", "activations", "gathered_parameters",
    "comm_buffers", "logits_loss", "workspace", "fragmentation", "context",
)  # fmt: skip
"""Terms of memory at the peak of the fullest rank; they sum to the peak."""


class Interval(Value, frozen=True, kw_only=True):
    """A median with the bounds of a 90 % interval."""

    median: float
    low: float
    high: float


class Estimate(Value, frozen=True, kw_only=True):
    """The cost of one optimiser step."""

    step_s: Interval
    tokens_per_s: float
    model_flops_per_s_per_device: float
    mfu: float
    """Model FLOPs (causal attention counted half) over the device's dense peak of the dtype."""
    peak_memory_bytes: Interval
    """Live tensors at the peak of the fullest rank, allocator waste and context included."""
    fits: Literal["yes", "marginal", "no"]
    fit_probability: float
    capacity_bytes: int
    time_terms_s: dict[str, float]
    memory_terms_bytes: dict[str, float]
    bytes_on_wire: dict[str, float]
    """Per rank and step, `collective@axis`: bytes of the full logical buffer handed over."""
    bytes_copied: dict[str, float] = {}
    """Per rank and step, `out@tier` and `in@tier`: bytes that offload moves off the device and
    back."""
    bytes_off_device: dict[str, float] = {}
    """By tier, the most that the fullest rank holds there."""
    evidence: dict[str, Evidence]
