"""Rows of a table of published runs: a CSV file whose columns docs/validation.md describes.

A row that cannot be read becomes an `Unread` with its reason; the others are scored without it. An
empty cell is None: unknown, never zero.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...document import read_bytes
from ...errors import InputError, unknown_name

REQUIRED = ("hardware", "gpus", "model", "seq_len", "metric", "value")
TIME_METRICS = ("iter_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu_pct")
METRICS = (*TIME_METRICS, "peak_mem_gib")
RECOMPUTE = ("none", "selective", "elementwise", "per_op", "full")
LARGEST = 10**9
"""Of a whole number in a cell."""
MORE_CELLS = "(more cells)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of one published run; None where the cell is empty."""

    id: str
    source: str
    source_ref: str
    hardware: str
    gpus: int
    gpus_per_node: int | None
    interconnect_note: str
    model: str
    n_params_b: float | None
    layers: int | None
    hidden: int | None
    heads: int | None
    kv_heads: int | None
    ffn_hidden: int | None
    vocab: int | None
    seq_len: int
    global_batch_seqs: int | None
    micro_batch_seqs: int | None
    dp: int | None
    tp: int | None
    pp: int | None
    vpp: int | None
    cp: int | None
    ep: int | None
    zero_stage: int | None
    sequence_parallel: int | None
    recompute: str | None
    precision: str
    optimizer: str
    offload: str
    attention_kernel: str
    stack: str
    """Name of the software stack to price with; empty = chosen from the source and the layout."""
    metric: str
    value: float
    notes: str

    @property
    def is_time(self) -> bool:
        """Whether the metric follows from the step time (otherwise it is peak memory)."""
        return self.metric in TIME_METRICS

    def note(self, key: str) -> str | None:
        """The value of `key=value` among the notes, which `;` separates."""
        for part in self.notes.split(";"):
            name, equals, value = part.partition("=")
            if equals and name.strip() == key:
                return value.strip()
        return None

    def says(self, words: str) -> bool:
        """Whether the notes contain these words, in any letter case."""
        return words.lower() in self.notes.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """A row that cannot be read, and why."""

    id: str
    source: str
    metric: str
    measured: float | None
    reason: str


def read_table(path: str | Path) -> tuple[Row | Unread, ...]:
    """The rows of a CSV file in order; raises InputError when the file is not such a table."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey=MORE_CELLS)
        lines = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError("file", path, f"not a CSV text in UTF-8 ({error})",
                         "save the table as CSV") from error  # fmt: skip
    if not lines:
        raise InputError("file", path, "has no rows", "give a header and one row or more")
    return tuple(_read(line, number) for number, line in enumerate(lines, start=1))


def _read(cells: Mapping[str, object], number: int) -> Row | Unread:
    clean = {str(k).strip(): v.strip() for k, v in cells.items() if isinstance(v, str)}
    name = clean.get("id") or f"row-{number}"
    try:
        if MORE_CELLS in cells:
            raise InputError("row", number, "has more cells than the header has columns",
                             "quote cells that contain commas")  # fmt: skip
        return parse_row(clean, name)
    except InputError as error:
        return Unread(
            id=name,
            source=clean.get("source", ""),
            metric=clean.get("metric", ""),
            measured=_or_none(clean.get("value", "")),
            reason=str(error),
        )


def parse_row(cells: Mapping[str, str], name: str) -> Row:
    """One row from its cells by column name; raises InputError naming the column."""
    for column in REQUIRED:
        if not cells.get(column):
            problem = "the cell is empty" if column in cells else "no such column"
            raise InputError(column, "(missing)", problem, "fill it; see docs/validation.md")
    if cells["metric"] not in METRICS:
        raise unknown_name("metric", cells["metric"], METRICS)
    recompute = cells.get("recompute", "").lower() or None
    if recompute is not None and recompute not in RECOMPUTE:
        raise unknown_name("recompute", recompute, RECOMPUTE)

    def whole(column: str, least: int = 1, most: int = LARGEST) -> int | None:
        return _whole(cells, column, least, most)

    def needed(column: str) -> int:
        return _whole(cells, column, 1, LARGEST) or 1

    return Row(
        id=name,
        source=cells.get("source", ""),
        source_ref=cells.get("source_ref", ""),
        hardware=cells["hardware"],
        gpus=needed("gpus"),
        gpus_per_node=whole("gpus_per_node"),
        interconnect_note=cells.get("interconnect_note", ""),
        model=cells["model"],
        n_params_b=_number(cells, "n_params_b"),
        layers=whole("layers", most=10_000),
        hidden=whole("hidden"),
        heads=whole("heads"),
        kv_heads=whole("kv_heads"),
        ffn_hidden=whole("ffn_hidden"),
        vocab=whole("vocab"),
        seq_len=needed("seq_len"),
        global_batch_seqs=whole("global_batch_seqs"),
        micro_batch_seqs=whole("micro_batch_seqs"),
        dp=whole("dp"),
        tp=whole("tp"),
        pp=whole("pp"),
        vpp=whole("vpp"),
        cp=whole("cp"),
        ep=whole("ep"),
        zero_stage=whole("zero_stage", 0, 3),
        sequence_parallel=whole("sequence_parallel", 0, 1),
        recompute=recompute,
        precision=cells.get("precision", "").lower(),
        optimizer=cells.get("optimizer", "").lower(),
        offload=cells.get("offload", "").lower(),
        attention_kernel=cells.get("attention_kernel", "").lower(),
        stack=cells.get("stack", ""),
        metric=cells["metric"],
        value=_number(cells, "value") or 0.0,
        notes=cells.get("notes", ""),
    )


def _or_none(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _number(cells: Mapping[str, str], column: str) -> float | None:
    """A positive number, or None for an empty cell."""
    text = cells.get(column, "")
    if not text:
        return None
    number = _or_none(text)
    if number is None or number <= 0:
        raise InputError(column, text, "not a positive number", "correct the cell")
    return number


def _whole(cells: Mapping[str, str], column: str, least: int, most: int) -> int | None:
    """A whole number between `least` and `most` (8 and 8.0 alike), or None for an empty cell."""
    text = cells.get(column, "")
    if not text:
        return None
    if not re.fullmatch(r"[+-]?\d{1,12}(\.0*)?", text):
        raise InputError(column, text, "not a whole number", "correct the cell")
    number = int(text.partition(".")[0])
    if not least <= number <= most:
        raise InputError(column, text, f"not between {least} and {most}", "correct the cell")
    return number
