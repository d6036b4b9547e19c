"""What the parent and the ranks of a run hand each other: files in one temporary folder.

job.json         the plan and how many steps           parent -> ranks
launch.json      how many ranks, on which nodes         parent -> agent
corpus.bin       the training text                      parent -> ranks
stop             end after this step                    parent -> ranks
progress.jsonl   one line per step or note, by rank 0   ranks -> parent
result-R.json    what rank R measured                   ranks -> parent
end.json         why training ended, by rank 0          ranks -> parent
failure-R.json   why rank R failed, where it could say   ranks -> parent
exits.json       how processes ended                    agent -> parent
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Literal

from .. import document
from ..document import Value
from ..errors import InputError, RunFailed
from ..plan import Plan
from .pacing import Pace

JOB = "job.json"
LAUNCH = "launch.json"
CORPUS = "corpus.bin"
STOP = "stop"
PROGRESS = "progress.jsonl"
END = "end.json"
EXITS = "exits.json"

Kind = Literal["input", "run", "memory", "disk", "shared memory", "peer", "other"]

POLL_S = 0.02

NODE = "FORERUN_NODE"
"""The variable by which the agent tells its ranks the place of their node."""
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
"""The variable by which torch's agent tells how often the ranks were restarted."""


class Training(Value, frozen=True, kw_only=True):
    """What a run does besides measuring: how long it trains, and what it keeps."""

    checkpoint: str | None = None
    """The folder that checkpoints are written into; None = none are."""
    every: int = 100
    """Steps between checkpoints; one more is written at the end."""
    keep: int = 3
    """Checkpoints kept, the newest."""
    resume: str | None = None
    """The folder whose newest whole checkpoint training goes on from; None = it starts anew."""
    until_loss: float | None = None
    """Ends training when the mean loss of `LOSS_WINDOW` steps is no higher."""
    until_s: float | None = None
    """Ends training after that time, counted from the start of the run."""
    metrics: str | None = None
    """A JSONL file with a line per step."""
    tensorboard: str | None = None
    """A folder for event files."""


LOSS_WINDOW = 10
"""Steps over which the loss is averaged before it is compared with `until_loss`."""


class Job(Value, frozen=True, kw_only=True):
    """What every rank is to do."""

    plan: Plan
    device: Literal["cpu", "cuda"]
    warmup_steps: int
    steps: int | None
    """Timed steps; with `training` the step at which it ends (None = never by itself)."""
    counted: bool = True
    """Whether one more step is counted, and `profiled_steps` are profiled."""
    profiled_steps: int = 3
    """Their mean is less at the mercy of a busy machine than one."""
    static_memory: Literal["report", "run"] | None = None
    """Whether to say what allocators need for a step, or to run it out of one arena as well."""
    base: str | None = None
    """The folder of the weights that adapters train beside; None: initial ones."""
    offload_folder: str | None = None
    """Where files of offloaded tensors lie; None = with the run's other temporary files."""
    pace: Pace | None = None
    """What chunks are held to; None: they take their time."""
    emulates_links: bool = False
    """Whether connections between the plan's nodes, all on this machine, are held to its rate."""
    training: Training | None = None
    started_s: float = 0.0
    """Wall clock at the start of the run."""
    data_digest: str = ""
    ranks_per_node: tuple[int, ...] = ()
    """Empty on one node."""


class Launch(Value, frozen=True, kw_only=True):
    """How the agent of one node starts its ranks."""

    num_ranks: int
    """On this node."""
    module: str | None = None
    session: bool = False
    """Whether the ranks run one plan after another, each in a folder below (`item`)."""
    max_restarts: int = 0
    num_nodes: int = 1
    node: int = 0
    rendezvous: str = "localhost:0"
    address: str = "localhost"
    """At which the ranks of other nodes reach this one."""


class End(Value, frozen=True, kw_only=True):
    """Why training ended."""

    reason: Literal["steps", "loss", "time", "interrupted"]
    step: int
    checkpoint: str | None


class Failure(Value, frozen=True, kw_only=True):
    """Why a rank failed, in its own words."""

    rank: int
    attempt: int = 0
    """How often the ranks had been restarted before."""
    step: int
    time_s: float
    kind: Kind
    message: str
    input: tuple[str, str, str, str] | None = None
    """Field, value, problem and remedy of an InputError."""

    @property
    def is_final(self) -> bool:
        """Whether starting the ranks again would end the same."""
        return self.kind not in ("peer", "other")


class Exit(Value, frozen=True, kw_only=True):
    """How a rank's process ended, as the agent saw it; negative codes are signals."""

    rank: int
    exit_code: int


def item(folder: Path, number: int) -> Path:
    """The folder of a session's plan."""
    return folder / f"item-{number}"


def next_item(folder: Path, number: int) -> Path | None:
    """The folder of a session's plan, once the parent has written it; None when there are no more.

    Every rank of the machine sees the same files.
    """
    place = item(folder, number)
    while not (place / JOB).exists():
        if (folder / STOP).exists():
            return None
        time.sleep(POLL_S)
    return place


def result_name(rank: int) -> str:
    """The file of a rank's result."""
    return f"result-{rank}.json"


def failure_name(rank: int) -> str:
    """The file of a rank's failure."""
    return f"failure-{rank}.json"


def failures(folder: Path) -> list[Failure]:
    """What ranks said of their failure, those of the last attempt."""
    said = [document.read(Failure, path) for path in sorted(folder.glob("failure-*.json"))]
    last = max((failure.attempt for failure in said), default=0)
    return [failure for failure in said if failure.attempt == last or failure.is_final]


def describe(error: Exception, rank: int, step: int) -> Failure:
    """An exception of a rank as a Failure."""
    text = " ".join(str(error).split()) or type(error).__name__
    known = isinstance(error, (InputError, RunFailed))
    given = None
    if isinstance(error, InputError):
        given = (error.field, str(error.value), error.problem, error.remedy)
    return Failure(
        rank=rank,
        attempt=int(os.environ.get(ATTEMPT, "0")),
        step=step,
        time_s=time.time(),
        kind=_kind(error, text.lower()),
        message=text if known else f"{type(error).__name__}: {text[:300]}",
        input=given,
    )


def _kind(error: Exception, text: str) -> Kind:
    if isinstance(error, InputError):
        return "input"
    if isinstance(error, RunFailed):
        return "run"
    if "/dev/shm" in text or "shared memory" in text:
        return "shared memory"
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
        """A step was done, of `steps` (0 = nobody knows how many)."""
        self._append([step, steps, loss])

    def note(self, text: str) -> None:
        """Something the user should know."""
        self._append({"note": text})

    def _append(self, line: object) -> None:
        if self.rank == 0:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
