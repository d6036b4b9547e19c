"""Lengths of the sequences of a step, from a file."""

from __future__ import annotations

from pathlib import Path

from ...document import read_bytes
from ...errors import InputError

MOST_TOKENS = 2**40


def read_lengths(path: str | Path) -> tuple[int, ...]:
    """One length in tokens per line; empty lines are left out.

    Raises InputError that names the line of what is not a positive whole number.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("file", path, "not a text file", "give one length per line") from error
    lengths: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.strip()
        if not word:
            continue
        if not (word.isascii() and word.isdigit()) or not 0 < int(word[:20]) <= MOST_TOKENS:
            raise InputError(f"line {number} of {path}", word[:40], "not a positive whole number",
                             "give one length in tokens per line")  # fmt: skip
        lengths.append(int(word))
    if not lengths:
        raise InputError("file", path, "no lengths", "give one length in tokens per line")
    return tuple(lengths)
