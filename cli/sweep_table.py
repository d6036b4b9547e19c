"""A sweep as a table on a terminal and as a CSV file."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from ..units import GIB

if TYPE_CHECKING:
    from ..planner.sweep import Row, SweepResult

CSV_COLUMNS = (
    "model", "num_params", "gpus", "num_devices", "seq_tokens", "global_batch_seqs",
    "global_batch_tokens", "status", "label", "tokens_per_s", "mfu", "step_s",
    "peak_memory_bytes", "capacity_bytes", "fits", "price_usd_per_hour",
    "usd_per_billion_tokens", "run_s", "run_usd", "pareto", "answer", "reason",
)  # fmt: skip
DAY_S = 86400
NONE = "-"


def table_csv(result: SweepResult) -> str:
    """Every row of a sweep in SI units and bytes; empty cells where there is no number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list[str](CSV_COLUMNS), lineterminator="\n")
    writer.writeheader()
    front = set(result.pareto)
    answers = {answer.row for answer in result.answers}
    for index, row in enumerate(result.rows):
        raw = row.document(result.tokens)
        cells: dict[str, Any] = {name: raw.get(name) for name in CSV_COLUMNS}
        if row.estimate is not None:
            cells |= {
                "tokens_per_s": row.tokens_per_s,
                "mfu": row.estimate.mfu,
                "step_s": row.estimate.step_s.median,
                "peak_memory_bytes": row.estimate.peak_memory_bytes.median,
                "capacity_bytes": row.estimate.capacity_bytes,
                "fits": row.estimate.fits,
            }
        cells |= {"pareto": int(index in front), "answer": int(index in answers)}
        writer.writerow(cells)
    return text.getvalue()


def shown_rows(result: SweepResult, top: int | None) -> list[int]:
    """The rows to print: a table in its own order, a question's answers, `top` the fastest."""
    rows = list(range(len(result.rows)))
    if result.question not in ("table", "cheapest"):
        rows = sorted({*result.answered, *result.pareto})
    if top is None:
        return rows
    return sorted(rows, key=lambda i: (-result.rows[i].tokens_per_s, i))[:top]


def print_sweep(result: SweepResult, top: int | None) -> None:
    """Print the rows, then their plans or why there is none, then the answers."""
    from . import render

    shown = shown_rows(result, top)
    front = set(result.pareto)
    columns, rows = table_cells(result, shown)
    if rows:
        render.print_table(columns, rows)
    for number, index in enumerate(shown, start=1):
        row = result.rows[index]
        note = f"  ({row.reason})" if row.label and row.reason else ""
        render.print_line(f"{number}  {row.label or row.reason}{note}")
    if shown:
        render.print_line()
    for line in legend(result, front & set(shown), shown):
        render.print_line(line)
    for answer in result.answers:
        render.print_line(answer.text)


def table_cells(result: SweepResult, shown: list[int]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns and the cells; columns that say nothing are left out."""
    rows = [result.rows[i] for i in shown]
    front, answers = set(result.pareto), {answer.row for answer in result.answers}
    priced = any(row.price_usd_per_hour is not None for row in rows)
    models = len({row.model for row in rows}) > 1 or result.question == "largest-model"
    columns = ["#", "model", "GPUs", "seq", "batch", "tokens/s", "MFU", "GiB", "USD/h", "USD/Btok"]
    columns += ["days", "USD"]
    dropped = set() if models else {"model"}
    dropped |= set() if priced else {"USD/h", "USD/Btok", "USD"}
    dropped |= set() if result.tokens is not None else {"days", "USD"}
    cells: list[list[str]] = []
    for number, (index, row) in enumerate(zip(shown, rows, strict=True), start=1):
        mark = (" *" if index in front else "") + (" >" if index in answers else "")
        line = dict(zip(columns, row_cells(row, f"{number}{mark}", result.tokens), strict=True))
        cells.append([cell for name, cell in line.items() if name not in dropped])
    return [name for name in columns if name not in dropped], cells


def row_cells(row: Row, mark: str, tokens: float | None) -> list[str]:
    """All cells of one row."""
    from .render import percent

    speed = [NONE, NONE, "left out" if row.status == "left out" else "no"]
    if row.estimate is not None:
        fits = {"yes": "", "marginal": " ?", "no": " !"}[row.estimate.fits]
        peak = f"{row.estimate.peak_memory_bytes.median / GIB:.2f}{fits}"
        speed = [f"{row.tokens_per_s:,.0f}", percent(row.estimate.mfu), peak]
    run_s = None if tokens is None else row.run_s(tokens)
    run_usd = None if tokens is None else row.run_usd(tokens)
    return [
        mark,
        row.model,
        row.gpus,
        f"{row.seq_tokens:,}",
        f"{row.global_batch_seqs:,}",
        *speed,
        number(row.price_usd_per_hour),
        number(row.usd_per_billion_tokens),
        number(None if run_s is None else run_s / DAY_S),
        number(run_usd),
    ]


def number(value: float | None) -> str:
    """A number for people, a dash for none.

    >>> number(1234567.8), number(98.76), number(0.01234), number(None)
    ('1,234,568', '98.76', '0.01234', '-')
    """
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def legend(result: SweepResult, marked: set[int], shown: list[int]) -> list[str]:
    """What the marks mean, as far as they are used."""
    wanted = {"tokens_per_s": "tokens/s", "seq_tokens": "tokens per sequence",
              "num_params": "parameters"}[result.wanted]  # fmt: skip
    paid = {"usd_per_hour": "the least USD per hour",
            "gpus": "the fewest GPUs (not all prices are known)"}[result.paid]  # fmt: skip
    lines: list[str] = []
    if marked:
        lines.append(f"*  Pareto front of its job: most {wanted} for {paid}")
    if any(answer.row in shown for answer in result.answers):
        lines.append(">  answers the question")
    estimates = [result.rows[i].estimate for i in shown]
    if any(estimate is not None and estimate.fits != "yes" for estimate in estimates):
        lines.append("?  may not fit")
    if len(result.rows) > len(shown):
        lines.append(f"{len(shown)} of {len(result.rows)} rows shown; -o FILE.csv has all")
    return lines
