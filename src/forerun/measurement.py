"""Measurement: what a run really did, under the same names as the Estimate."""

from __future__ import annotations

from typing import ClassVar

from .document import Document, Value

REFERENCE_MATMUL = "reference_matmul"
"""Seconds of one fp32 matmul of 256 x 256 on one thread: the machine's speed at a moment.

Stands in `Profile.host_s` (median over the profile) and in `Measurement.environment` (around the
timed steps); their ratio tells how much of an error is a shared machine's drift.
"""


EMULATED_LINKS = "emulated_links"
"""The rate that links between nodes were held to, in `Measurement.environment` of a run whose nodes
were processes of one machine."""


class StepTimes(Value, frozen=True, kw_only=True):
    """Step times over the timed steps, in seconds."""

    median: float
    p10: float
    p90: float


class RankMeasurement(Value, frozen=True, kw_only=True):
    """What one rank counted."""

    rank: int
    coordinates: dict[str, int]
    peak_memory_bytes: int
    """Live tensors at their peak: each storage once on a CPU, `max_memory_allocated` on CUDA."""
    process_peak_bytes: int
    """Resident set of the process, or memory reserved on the device."""
    memory_terms_bytes: dict[str, float]
    time_terms_s: dict[str, float]
    bytes_on_wire: dict[str, float]
    bytes_copied: dict[str, float] = {}
    bytes_off_device: dict[str, float] = {}


class ExpertLoad(Value, frozen=True, kw_only=True):
    """What the router of one layer did over the timed steps."""

    layer: int
    ep: int = 1
    """Expert-parallel ranks of the run."""
    tokens: tuple[int, ...]
    """Choices that fell on each expert, of all ranks; what a full expert turned away included."""
    imbalance: float
    """Rows of the fullest expert-parallel rank over the mean, mean over forward passes; 1 where
    ranks exchange no rows."""
    dropped: float = 0.0
    """Fraction of the choices that a full expert turned away."""
    balance: float = 0.0
    """E sum f p, mean over forward passes: 1 when choices are even."""


class Measurement(Document, frozen=True, kw_only=True):
    """One executed plan."""

    SCHEMA: ClassVar[str] = "forerun.measurement/1"

    schema: str = "forerun.measurement/1"
    label: str
    plan_digest: str
    """SHA-256 of the plan's JSON, so that `diff` can tell a plan it does not belong to."""
    step_s: StepTimes
    tokens_per_s: float
    peak_memory_bytes: int
    """Of the fullest rank."""
    process_peak_bytes: int
    time_terms_s: dict[str, float]
    """Mean over ranks; sums to the median step."""
    memory_terms_bytes: dict[str, float]
    """Of the fullest rank at its peak."""
    bytes_on_wire: dict[str, float]
    """Per rank and step, mean over ranks."""
    bytes_copied: dict[str, float] = {}
    """Moved off the device (`out@tier`) and back (`in@tier`) per rank and step, mean over ranks."""
    bytes_off_device: dict[str, float] = {}
    """By tier, what the fullest rank took of it."""
    allocator: dict[str, float] = {}
    """What allocators need for one step's tensors on the fullest rank, where it was asked for:
    `max_live_bytes`, `static_plan_bytes` at solved offsets, `caching_bytes` reserved (on a CPU by a
    model of the caching allocator), and of a run out of one arena its size and what lay in it."""
    steps: tuple[float, ...]
    """Seconds of every timed step (the slowest rank's)."""
    loss: tuple[float, ...]
    """Mean loss per token of every step, warm-up included."""
    ranks: tuple[RankMeasurement, ...]
    environment: dict[str, str]
    experts: tuple[ExpertLoad, ...] = ()
    """Of every layer with routed experts; `forerun solve experts` places them by it."""
    emulated: bool = False
