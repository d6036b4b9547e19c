"""Buffers as CSV: `id,lower,upper,size` and optionally `alignment`; with `offset` on the way out.

The form is that of the public minimalloc benchmark (ASPLOS 2023): half-open lives, bytes.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from ... import document
from ...errors import InputError
from .buffers import Buffers, Ints, make_buffers

NEEDED = ("id", "lower", "upper", "size")
OPTIONAL = ("alignment",)


def read_buffers(path: Path) -> Buffers:
    """The buffers of a CSV file.

    Raises InputError with the line for what cannot be read, for columns that are missing, unknown
    or twice there, and for what `make_buffers` refuses.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError("file", path, error.strerror or str(error),
                         "give a CSV file that can be read") from error  # fmt: skip
    except UnicodeDecodeError as error:
        raise InputError("file", path, "not UTF-8 text", "give a CSV file") from error
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError("file", path, f"line {reader.line_num}: {error}",
                         "give a CSV file") from error  # fmt: skip
    if not rows:
        raise InputError("file", path, "empty", f"write the columns {','.join(NEEDED)}")
    columns = [cell.strip() for cell in rows[0][1]]
    _check_columns(path, columns)
    if len(rows) == 1:
        raise InputError("file", path, "no buffer below the header", "give one row per tensor")
    cells: dict[str, list[str]] = {name: [] for name in columns}
    places: list[str] = []
    for line, row in rows[1:]:
        if len(row) != len(columns):
            raise InputError("file", path, f"line {line}: {len(row)} cells for {len(columns)} "
                             "columns", f"give {','.join(columns)}")  # fmt: skip
        places.append(f"line {line}")
        for name, cell in zip(columns, row, strict=True):
            cells[name].append(cell.strip())
    numbers = {
        name: [_integer(name, cell, place) for cell, place in zip(values, places, strict=True)]
        for name, values in cells.items()
        if name != "id"
    }
    for name, place in zip(cells["id"], places, strict=True):
        if not name:
            raise InputError("id", "(empty)", place, "give every buffer an id of its own")
    return make_buffers(
        cells["id"],
        numbers["lower"],
        numbers["upper"],
        numbers["size"],
        numbers.get("alignment"),
        places,
    )


def _check_columns(path: Path, columns: list[str]) -> None:
    known = f"known: {', '.join(NEEDED + OPTIONAL)}"
    for name in NEEDED:
        if name not in columns:
            raise InputError("file", path, f"line 1: no column {name}",
                             f"start with {','.join(NEEDED)}")  # fmt: skip
    for index, name in enumerate(columns):
        if name not in NEEDED + OPTIONAL:
            raise InputError("column", name or "(empty)", "line 1: unknown", f"{known}; drop it")
        if name in columns[:index]:
            raise InputError("column", name, "line 1: there twice", "keep one")


def _integer(name: str, cell: str, place: str) -> int:
    """A whole number of a cell."""
    digits = cell[1:] if cell[:1] in ("-", "+") else cell
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 30:
        raise InputError(name, cell or "(empty)", f"{place}: not a whole number",
                         "write digits only")  # fmt: skip
    return int(cell)


def write_offsets(path: Path, buffers: Buffers, offsets: Ints) -> None:
    """Write the columns of the input and `offset`; `alignment` where one was asked for."""
    aligned = bool((buffers.alignment_bytes > 1).any())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*NEEDED, *(OPTIONAL if aligned else ()), "offset"])
    for i, name in enumerate(buffers.ids):
        row = [name, buffers.lower[i], buffers.upper[i], buffers.size_bytes[i]]
        writer.writerow([*row, *([buffers.alignment_bytes[i]] if aligned else []), offsets[i]])
    document.write_bytes(path, text.getvalue().encode())
