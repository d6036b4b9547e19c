"""Marks of what a rank is doing, for whoever times it: forward, backward, recompute, optimizer, and
receive for the waiting of a pipeline.

A *chunk* is a mark whose length the cost model predicts, known by a key such as `F3`: the forward
of stage 3. Who paces a run (`pacing.py`) holds chunks to their predicted time; otherwise they are
plain marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol


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


class Tempo(Protocol):
    """How long chunks and messages take."""

    def chunk(self, key: str, post: str | None = None) -> AbstractContextManager[None]:
        """The context of one chunk, whose end is shown to others as `post`."""
        ...

    def message(self, works: list[Any], after: str) -> Callable[[], None]:
        """What waits for a message, whose receives are posted, of the chunk shown as `after`."""
        ...


def plain_wait(works: list[Any]) -> Callable[[], None]:
    """What waits for works one after the other."""

    def wait() -> None:
        for work in works:
            work.wait()

    return wait


class Free:
    """As long as they take."""

    def chunk(self, key: str, post: str | None = None) -> AbstractContextManager[None]:
        return nullcontext()

    def message(self, works: list[Any], after: str) -> Callable[[], None]:
        return plain_wait(works)


class Marks:
    """Passes marks to the observer of the moment, which may be exchanged between steps."""

    def __init__(self) -> None:
        self.observer: Observer = Silent()
        self.tempo: Tempo = Free()

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """A context that begins `name` and ends it, also when an exception passes."""
        observer = self.observer
        observer.begin(name)
        try:
            yield
        finally:
            observer.end(name)

    @contextmanager
    def chunk(self, name: str, key: str, post: str | None = None) -> Iterator[None]:
        """The mark `name`, which takes as long as the chunk `key` does; see `Tempo`."""
        with self.mark(name), self.tempo.chunk(key, post):
            yield


class Message:
    """A message on its way, with the `wait` of a work; waiting for it is marked."""

    def __init__(self, marks: Marks, works: list[Any], after: str) -> None:
        self.marks, self.arrive = marks, marks.tempo.message(works, after)

    def wait(self) -> None:
        with self.marks.mark("receive"):
            self.arrive()
