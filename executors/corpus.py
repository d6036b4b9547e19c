"""Text to train on, as bytes: the standard library's own source, or a file or folder of the user's.

The corpus is byte-level: a token is a byte, so any text works with any vocabulary of 256 or more.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .. import document
from ..errors import InputError
from ..model import Model

LIMIT_BYTES = 32 * 1024**2
"""Reading stops here: far more than a measured run draws from."""

NUM_SYMBOLS = 256
TEXT_ENDINGS = (".txt", ".text", ".md", ".rst", ".py", ".jsonl", ".json")


def load(data: str | None, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """The training text: `data` (file or folder of text or JSONL), or the standard library."""
    if data is None:
        return _join(_standard_library(), limit_bytes)
    text = _join(_files_of(data), limit_bytes)
    if not text.strip():
        endings = " ".join(TEXT_ENDINGS)
        raise InputError(
            "data", data, "holds no text", f"give a text file, or a folder of {endings}"
        )
    return text


def _files_of(data: str) -> list[Path]:
    """The files behind a path the user named; a path that may not be looked at is an InputError."""
    path = Path(data)
    try:
        if not path.exists():
            raise InputError("data", data, "no such file or folder", "give a path that exists")
        return _folder_files(path) if path.is_dir() else [path]
    except OSError as error:
        raise InputError("data", data, error.strerror or str(error),
                         "give a path that you may read") from error  # fmt: skip


def check_fits(text: bytes, model: Model, seq_tokens: int, data: str | None) -> None:
    """Raise InputError when the model cannot take bytes, or the text is shorter than a sequence."""
    if model.vocab < NUM_SYMBOLS:
        raise InputError("vocab", model.vocab, f"the byte-level corpus needs {NUM_SYMBOLS} or more",
                         "use a model with a larger vocabulary")  # fmt: skip
    if len(text) < seq_tokens + 1:
        raise InputError("data", data or "standard library",
                         f"holds {len(text)} bytes, a sequence takes {seq_tokens + 1}",
                         "give more text or a shorter --seq-len")  # fmt: skip


def _standard_library() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            yield path


def _folder_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in TEXT_ENDINGS and p.is_file())


def _join(paths: Iterator[Path] | list[Path], limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    total = 0
    for path in paths:
        part = _read(path, limit_bytes - total)
        parts.append(part)
        total += len(part)
        if total >= limit_bytes:
            break
    return b"".join(parts)[:limit_bytes]


def _read(path: Path, limit_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            if path.suffix == ".jsonl":
                return _jsonl_text(path, file, limit_bytes)
            return file.read(limit_bytes)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError("data", path, reason, "give a path that is readable") from error


def _jsonl_text(path: Path, lines: Iterator[bytes], limit_bytes: int) -> bytes:
    """The `text` fields of a JSONL file, one per line."""
    parts: list[bytes] = []
    total = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = document.parse_json(line, f"{path} line {number}")
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError("data", f"{path} line {number}", "has no string field `text`",
                             'write {"text": "..."} on each line')  # fmt: skip
        parts.append(text.encode() + b"\n")
        total += len(parts[-1])
        if total >= limit_bytes:
            break
    return b"".join(parts)
