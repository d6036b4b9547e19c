"""Cells of a CSV file that a solver reads, each refused by its row and column when it is wrong."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..document import read_bytes
from ..errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The header of a file and its rows, whose cells are as many as the header's."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def read_rows(path: str | Path) -> Table:
    """A CSV file in UTF-8, blanks around cells removed and empty lines left out.

    Raises InputError when the file cannot be read, is no CSV text, has no rows, has a row longer or
    shorter than its header, or a header that is empty or stands twice.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError("file", path, f"not a CSV text in UTF-8 ({error})",
                         "save the table as CSV") from error  # fmt: skip
    cells = [tuple(cell.strip() for cell in line) for line in lines]
    cells = [line for line in cells if any(line)]
    if len(cells) < 2:
        raise InputError("file", path, "has no rows", "give a header and one row or more")
    header, *rows = cells
    for name in header:
        if not name or header.count(name) > 1:
            raise InputError("header", name or "(empty)", "a column needs a name of its own",
                             "name every column, each name once")  # fmt: skip
    for number, line in enumerate(rows, start=1):
        if len(line) != len(header):
            raise InputError(f"row {number}", len(line), f"cells where the header has "
                             f"{len(header)} columns", "fill or remove cells")  # fmt: skip
    return Table(header=header, rows=tuple(rows))


def check_header(table: Table, needed: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raise InputError when a needed column is absent or one is neither needed nor optional."""
    for name in needed:
        if name not in table.header:
            raise InputError("header", ",".join(table.header), f"no column {name}",
                             f"write {','.join(needed)}")  # fmt: skip
    for name in table.header:
        if name not in (*needed, *optional):
            raise InputError("header", name, "unknown column",
                             f"known: {', '.join((*needed, *optional))}")  # fmt: skip


def amount(text: str, column: str, row: int) -> float:
    """A cell as a finite number that is not negative; `row` counts from 1 below the header."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"row {row} {column}", text or "(empty)", "not a number of zero or more",
                         "correct the cell")  # fmt: skip
    return value
