"""Ctrl-C and SIGTERM while ranks run: ask them to stop, then give them a while, then insist."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Stop:
    """A request to stop, as the parent of a run knows it."""

    def __init__(self, path: Path, grace_s: float) -> None:
        self.path, self.grace_s = path, grace_s
        self.asked_at: float | None = None

    def ask(self) -> None:
        """Tell the ranks to end after the step they are in."""
        self.path.touch()
        self.asked_at = time.monotonic()

    @property
    def is_overdue(self) -> bool:
        """Whether the ranks had their time."""
        return self.asked_at is not None and time.monotonic() - self.asked_at > self.grace_s


@contextmanager
def stopping_gently(stop: Stop | None) -> Iterator[None]:
    """While entered, the first Ctrl-C or SIGTERM asks the ranks to stop; the second is an error.

    Nothing changes for None, outside of the main thread, or where the process ignores a signal.
    """
    if stop is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def hear(number: int, _: object) -> None:
        if stop.asked_at is not None:
            raise KeyboardInterrupt
        stop.ask()

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, hear)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
