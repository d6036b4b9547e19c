"""What the parent and the ranks of a run hand each other: files in one temporary folder.

job.json         the plan and how many steps           parent -> ranks
corpus.bin       the training text                      parent -> ranks
progress.jsonl   one line per step, by rank 0           ranks -> parent
result-R.json    what rank R measured                   ranks -> parent
failure-R.json   why rank R failed, where it could say   ranks -> parent
exits.json       how processes ended                    agent -> parent
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal

from ..document import Value
from ..errors import InputError, RunFailed
from ..plan import Plan
from .pacing import Pace

JOB = "job.json"
CORPUS = "corpus.bin"
PROGRESS = "progress.jsonl"
EXITS = "exits.json"


class Job(Value, frozen=True, kw_only=True):
    """What every rank is to do."""

    plan: Plan
    device: Literal["cpu", "cuda"]
    warmup_steps: int
    steps: int
    """Timed steps."""
    pace: Pace | None = None
    """What chunks are held to; None: they take their time."""


class Failure(Value, frozen=True, kw_only=True):
    """Why a rank failed, in its own words."""

    rank: int
    step: int
    time_s: float
    kind: Literal["input", "run", "memory", "disk", "peer", "other"]
    message: str
    input: tuple[str, str, str, str] | None = None
    """Field, value, problem and remedy of an InputError."""


class Exit(Value, frozen=True, kw_only=True):
    """How a rank's process ended, as the agent saw it; negative codes are signals."""

    rank: int
    exit_code: int


def result_name(rank: int) -> str:
    """The file of a rank's result."""
    return f"result-{rank}.json"


def failure_name(rank: int) -> str:
    """The file of a rank's failure."""
    return f"failure-{rank}.json"


def describe(error: Exception, rank: int, step: int) -> Failure:
    """An exception of a rank as a Failure."""
    text = " ".join(str(error).split()) or type(error).__name__
    known = isinstance(error, (InputError, RunFailed))
    given = None
    if isinstance(error, InputError):
        given = (error.field, str(error.value), error.problem, error.remedy)
    return Failure(
        rank=rank,
        step=step,
        time_s=time.time(),
        kind=_kind(error, text.lower()),
        message=text if known else f"{type(error).__name__}: {text[:300]}",
        input=given,
    )


def _kind(
    error: Exception, text: str
) -> Literal["input", "run", "memory", "disk", "peer", "other"]:
    if isinstance(error, InputError):
        return "input"
    if isinstance(error, RunFailed):
        return "run"
    out_of_memory = (
        "out of memory",
        "not enough memory",
        "cannot allocate memory",
        "can't allocate",
    )
    if isinstance(error, MemoryError) or any(words in text for words in out_of_memory):
        return "memory"
    if isinstance(error, OSError) and "no space left" in text:
        return "disk"
    lost_peer = (
        "connection closed",
        "connection reset",
        "broken pipe",
        "connect",
        "nccl",
        "timed out",
    )
    if type(error).__name__.startswith("Dist") or any(words in text for words in lost_peer):
        return "peer"
    return "other"


class Progress:
    """Tells the parent how far the run is; only rank 0 writes."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path, self.rank = folder / PROGRESS, rank
        self.step = 0

    def report(self, step: int, steps: int, loss: float) -> None:
        """Append one line."""
        if self.rank == 0:
            with self.path.open("a") as file:
                file.write(json.dumps([step, steps, loss]) + "\n")
