"""Metrics of a training run, a line per step: JSONL, and event files for TensorBoard.

A run that goes on from step k keeps the lines up to k of what stands in the file already, so that a
restarted run leaves the file of one that was never interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import document
from ..errors import InputError

Row = dict[str, float]
COLUMNS = ("step", "loss", "step_s", "tokens_per_s", "memory_bytes")
"""`step_s` is the slowest part's: all ranks start a step together. `memory_bytes` is of the fullest
rank: allocated on the device, or resident on a CPU."""


class Metrics:
    """Writes one row per step, on rank 0."""

    def __init__(
        self, path: Path | None, events: Path | None, step: int, note: Callable[[str], None]
    ) -> None:
        """Goes on after `step`; `note` hears when a file can no longer be written."""
        self.path, self.note = path, note
        if path is not None:
            document.write_bytes(path, kept_lines(path, step))
        self.events: Any = event_writer(events, step) if events is not None else None

    def write(self, row: Row) -> None:
        """Append the row of a step."""
        try:
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps({name: row[name] for name in COLUMNS}) + "\n")
        except OSError as error:
            self.note(f"warning: metrics={self.path}: {error.strerror}; nothing more is written")
            self.path = None
        if self.events is not None:
            for name in COLUMNS[1:]:
                self.events.add_scalar(name, row[name], int(row["step"]))

    def close(self) -> None:
        """Have everything on disk."""
        if self.events is not None:
            self.events.close()


def kept_lines(path: Path, step: int) -> bytes:
    """The whole lines of a metrics file up to a step; none without a file."""
    if step == 0 or not path.exists():
        return b""
    kept: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break  # the end of a file whose writer was killed
        if not isinstance(row, dict) or row.get("step", step + 1) > step:
            break
        kept.append(line if line.endswith(b"\n") else line + b"\n")
    return b"".join(kept)


def event_writer(folder: Path, step: int) -> Any:
    """TensorBoard's writer, which drops what an earlier run wrote beyond `step`."""
    check_tensorboard(folder)
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def check_tensorboard(folder: Path) -> None:
    """Raise InputError when TensorBoard is not installed."""
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        raise InputError("tensorboard", folder, "the package tensorboard is not installed",
                         "pip install 'forerun[tensorboard]', or use --metrics")  # fmt: skip
