"""Saved tensors from a CSV file: `id,bytes,recompute_s,needs`, and more columns if one likes.

id               the tensor's name
bytes            of one micro-batch
recompute_s      seconds to make it again; empty where that cannot be
needs            tensors that it is made from, separated by spaces; they stand above it
compressed_bytes bytes in the compressed form; empty where it has none
compress_s       seconds to compress it, and as much to decompress it
needed           no where backward does not read it; yes otherwise
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from ...document import read_bytes
from ...errors import InputError, unknown_name
from .problem import LayerType, Maker, SavedTensor

WANTED = ("id", "bytes")
COLUMNS = (*WANTED, "recompute_s", "needs", "compressed_bytes", "compress_s", "needed")
WORDS = {"": True, "yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def read_tensors(
    path: Path, *, layers: int = 1, forward_s: float = 0.0, backward_s: float = 0.0
) -> LayerType:
    """`layers` equal layers with the tensors of a CSV file.

    `forward_s` and `backward_s` are what copies can hide behind in one layer.

    Raises
    ------
    InputError : the file cannot be read, or a row is wrong; the field names row and column.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("file", path, "not UTF-8 text", "give a CSV file") from error
    rows = csv.DictReader(io.StringIO(text))
    names = [name.strip() for name in rows.fieldnames or ()]
    rows.fieldnames = names
    for name in WANTED:
        if name not in names:
            raise InputError("column", name, f"not in {path}", f"write {', '.join(COLUMNS[:4])}")
    for name in names:
        if name not in COLUMNS:
            raise unknown_name("column", name, COLUMNS)
    tensors: list[SavedTensor] = []
    makers: list[Maker] = []
    try:
        for number, row in enumerate(rows, start=2):
            tensor, maker = _row(number, row)
            tensors.append(tensor)
            makers += [maker] if maker is not None else []
    except csv.Error as error:
        raise InputError("file", path, f"not CSV ({error})", "correct the file") from error
    if not tensors:
        raise InputError("file", path, "no tensor in it", "write one row per tensor")
    return LayerType(
        name=path.stem, count=layers, tensors=tuple(tensors), makers=tuple(makers),
        forward_s=forward_s, backward_s=backward_s,
    )  # fmt: skip


def _row(number: int, row: dict[str, str | None]) -> tuple[SavedTensor, Maker | None]:
    """One tensor, and what makes it again where it says so."""

    def cell(name: str) -> str:
        return (row.get(name) or "").strip()

    def value(name: str, otherwise: float) -> float:
        if not cell(name):
            return otherwise
        try:
            found = float(cell(name))
        except ValueError:
            found = float("nan")
        if not 0 <= found < float("inf"):
            raise InputError(f"row {number}, {name}", cell(name), "not a number of 0 or more",
                             "correct the cell")  # fmt: skip
        return found

    if not cell("id") or not cell("bytes"):
        raise InputError(f"row {number}", cell("id") or "(empty)", "id or bytes is missing",
                         "fill both cells")  # fmt: skip
    if cell("needed").lower() not in WORDS:
        raise InputError(f"row {number}, needed", cell("needed"), "neither yes nor no",
                         "correct the cell")  # fmt: skip
    tensor = SavedTensor(
        name=cell("id"),
        bytes=value("bytes", 0.0),
        needed=WORDS[cell("needed").lower()],
        compressed_bytes=value("compressed_bytes", 0.0) if cell("compressed_bytes") else None,
        compress_s=value("compress_s", 0.0),
        decompress_s=value("compress_s", 0.0),
    )
    if not cell("recompute_s"):
        return tensor, None
    needs = tuple(cell("needs").replace(";", " ").split())
    return tensor, Maker(
        name=cell("id"), inputs=needs, outputs=(tensor.name,), seconds=value("recompute_s", 0.0)
    )
