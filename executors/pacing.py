"""Paced ranks: chunks and messages that last as long as predicted for another device.

With more processes than cores a clock on the wall measures the operating system's scheduler. A
paced rank does all of its real work - data, chunks, messages, collectives - and then sleeps until
its chunk would have ended on the emulated device. What follows from the lengths of chunks is real:
who waits for whom, what overlaps, where bubbles are. All times are those of the cost model,
multiplied by one scale that makes them long against the real work.

    with marks.chunk("forward", "F3"):      # a mark that is also a chunk, see `marks.py`
        ...

A chunk starts when the one before it has ended on the emulated device and the messages that it
waits for are there, and ends its predicted time later. Real work that is over by then waits for it;
work that is not is late, and has until the ends of the next chunks to catch up, so that what
Python, sockets and the scheduler take between chunks does not add up. A step ends when the real
work has ended: what never caught up makes it longer. A message is there its predicted time after
the chunk that made it ended: the ranks of one machine share a clock, and a rank posts the end of
such a chunk on a `Board` before it sends. Whether and when a message really comes still decides:
the rank waits for it as ever.

Chunks may nest: an outer one lasts until its inner ones have ended, and one without a predicted
time takes just as long as they do. Any part of an executor can be paced so: a step of a ring of
attention, an expert's batch, a micro-batch of its own length; it needs a name and, in
`Pace.chunks`, its seconds by term. Collectives inside a chunk are part of its predicted time, those
between chunks are real and short; `U`, the chunk after all others, starts when they are done.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..document import Value
from .marks import plain_wait

AFTER_COLLECTIVES = ("U",)
"""Chunks that start when the rank comes to them, having met others."""


class Pace(Value, frozen=True, kw_only=True):
    """The predicted times of one plan on the emulated device."""

    device: str
    chunks: tuple[dict[str, dict[str, float]], ...]
    """Per pipeline rank: seconds by term of each chunk."""
    hop_s: float
    step_s: float
    """What the simulator predicts for the step."""
    scale: float | None = None
    """Seconds on the wall per predicted second; None: chosen from the real work."""


class Board:
    """Ends of chunks by name, which the ranks of one pipeline show each other: a mapped file."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.places = {name: place for place, name in enumerate(names)}
        path.touch()  # rank by rank, and of one size
        with path.open("r+b") as file:
            file.truncate(8 * len(self.places))
        self.ends_s: Any = np.memmap(path, dtype=np.float64, mode="r+", shape=len(self.places))

    def post(self, name: str, end_s: float) -> None:
        """Show when a chunk ended; before what it made is sent."""
        self.ends_s[self.places[name]] = end_s

    def read(self, name: str) -> float:
        """When a chunk ended whose message has arrived."""
        return float(self.ends_s[self.places[name]])


class Stopwatch:
    """A tempo that lets everything take its time, and keeps it."""

    def __init__(self) -> None:
        self.taken_s: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def chunk(self, key: str, post: str | None = None) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self.taken_s[key].append(time.perf_counter() - start_s)

    def message(self, works: list[Any], after: str) -> Callable[[], None]:
        return plain_wait(works)


class Pacer:
    """A tempo that holds chunks and messages to their predicted time."""

    def __init__(
        self,
        chunks: Mapping[str, Mapping[str, float]],
        hop_s: float,
        scale: float,
        board: Board | None = None,
    ) -> None:
        self.chunks, self.hop_s, self.scale, self.board = chunks, hop_s * scale, scale, board
        self.begin_step()

    def begin_step(self) -> None:
        """All ranks start here."""
        self.begun_s = self.free_s = self.ended_s = time.perf_counter()
        self.there_s = 0.0
        """When the last message that was waited for was there."""
        self.late_s = 0.0
        """How far real work was behind at most."""
        self.terms: dict[str, float] = defaultdict(float)

    @contextmanager
    def chunk(self, key: str, post: str | None = None) -> Iterator[None]:
        """The context of a chunk; it ends no earlier than predicted, and its end is posted."""
        start_s = max(self.free_s, self.there_s)
        if key in AFTER_COLLECTIVES:
            start_s = max(start_s, time.perf_counter())
        self._wait_until(start_s)
        terms = self.chunks.get(key, {})
        end_s = start_s + self.scale * sum(terms.values())
        yield
        now_s, end_s = time.perf_counter(), max(end_s, self.free_s)
        if terms:
            self.late_s = max(self.late_s, now_s - end_s)
        time.sleep(max(0.0, end_s - now_s))
        for name, seconds in terms.items():
            self.terms[name] += seconds * self.scale
        self.free_s, self.ended_s = end_s, max(end_s, now_s)
        if post is not None and self.board is not None:
            self.board.post(post, end_s)

    def _wait_until(self, start_s: float) -> None:
        """Account for the time in which the rank had nothing to do."""
        idle_s = start_s - self.free_s
        hop_s = min(idle_s, self.hop_s) if start_s == self.there_s else 0.0
        self.terms["exposed.pp"] += hop_s
        self.terms["bubble"] += idle_s - hop_s
        self.free_s = start_s

    def message(self, works: list[Any], after: str) -> Callable[[], None]:
        """What waits until a message of the chunk `after` is there."""
        arrive = plain_wait(works)

        def wait() -> None:
            arrive()
            sent_s = time.perf_counter() if self.board is None else self.board.read(after)
            self.there_s = max(self.there_s, sent_s + self.hop_s)

        return wait

    def end_step(self) -> dict[str, float]:
        """Seconds of the emulated device by term; they end with the last chunk."""
        return {name: seconds / self.scale for name, seconds in self.terms.items()}
