"""Progress bars on stderr, only where that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(title: str) -> Iterator[Callable[[float, float, str], None]]:
    """A callback (done, total, what) that moves a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    screen = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=None)

        def move(done: float, total: float, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title}  {what}")

        yield move


@contextmanager
def step_progress(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """A callback (step, steps, loss) that moves a bar on stderr; steps is 0 where none were set."""
    with progress(title) as move:

        def tell(step: int, steps: int, loss: float) -> None:
            of = f"/{steps}" if steps else ""
            move(step, steps or step, f"step {step}{of}  loss {loss:.3f}")

        yield tell
