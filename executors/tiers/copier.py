"""Copies beside compute: submitted in order, waited for where their result is needed.

On a CPU, and for disks, a thread per direction copies while the main thread computes; on CUDA a
stream per direction does, between page-locked memory and the device. A copy that is submitted sees
everything that was computed before it; after `Ticket.wait` everything that is computed sees the
copy. Whoever submits keeps source and target until then.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal, Protocol

import torch

from .tier import PinnedTier, Tier

Job = Callable[[], None]
Direction = Literal["out", "in"]


class Ticket(Protocol):
    """One submission."""

    def wait(self) -> None:
        """Return when its copies are done (on CUDA: have the current stream wait for them)."""
        ...


class Copier(Protocol):
    """Runs copies in the order of each direction."""

    def submit(self, direction: Direction, jobs: Sequence[Job]) -> Ticket: ...


class ThreadTicket:
    """Done when a thread says so; an error of the thread is raised by whoever waits."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None

    def wait(self) -> None:
        self.done.wait()
        if self.error is not None:
            raise self.error


Work = tuple[list[Job], ThreadTicket, object]


class ThreadCopier:
    """A thread per direction, which ends with the copier."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.queues: dict[str, queue.SimpleQueue[Work | None]] = {}
        for direction in ("out", "in"):
            self.queues[direction] = queue.SimpleQueue()
            threading.Thread(
                target=_work,
                args=(self.queues[direction], device),
                daemon=True,
                name=f"forerun-copy-{direction}",
            ).start()

    def __del__(self) -> None:
        for waiting in self.queues.values():
            waiting.put(None)

    def submit(self, direction: Direction, jobs: Sequence[Job]) -> ThreadTicket:
        ticket = ThreadTicket()
        ready = None
        if self.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        self.queues[direction].put((list(jobs), ticket, ready))
        return ticket


def _work(waiting: queue.SimpleQueue[Work | None], device: torch.device) -> None:
    """Do what is submitted, until there is nothing more to come."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    while (work := waiting.get()) is not None:
        jobs, ticket, ready = work
        del work
        try:
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                if stream is not None and isinstance(ready, torch.cuda.Event):
                    stream.wait_event(ready)
                for job in jobs:
                    job()
                if stream is not None:
                    stream.synchronize()
        except BaseException as error:
            ticket.error = error
        finally:  # what the jobs refer to is let go before anybody hears that they are done
            job = None
            del jobs, ready
        ticket.done.set()
        del ticket


class StreamTicket:
    """Done when an event on a copy stream is."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)


class StreamCopier:
    """A CUDA stream per direction."""

    def __init__(self, device: torch.device) -> None:
        self.streams = {name: torch.cuda.Stream(device) for name in ("out", "in")}

    def submit(self, direction: Direction, jobs: Sequence[Job]) -> StreamTicket:
        stream = self.streams[direction]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for job in jobs:
                job()
            event = torch.cuda.Event()
            event.record(stream)
        return StreamTicket(event)


def make_copier(tier: Tier, device: torch.device) -> Copier:
    """What copies between a device and a tier."""
    return StreamCopier(device) if isinstance(tier, PinnedTier) else ThreadCopier(device)
