"""Marks of what a rank is doing, for whoever times it: forward, backward, recompute, optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Observer(Protocol):
    """Hears of the begin and end of a piece of work; names are those of the time terms."""

    def begin(self, name: str) -> None: ...

    def end(self, name: str) -> None: ...


class Silent:
    """An observer that does nothing."""

    def begin(self, name: str) -> None:
        pass

    def end(self, name: str) -> None:
        pass


class Marks:
    """Passes marks to the observer of the moment, which may be exchanged between steps."""

    def __init__(self) -> None:
        self.observer: Observer = Silent()

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """A context that begins `name` and ends it, also when an exception passes."""
        observer = self.observer
        observer.begin(name)
        try:
            yield
        finally:
            observer.end(name)
