"""Orders in the text that torch's pipeline runtime reads: one row per rank, actions as `0F0`.

The grammar is that of `torch.distributed.pipelining.schedules._Action.from_str` (torch 2.13) for
computations: stage, one of F, I, W, B, micro-batch. `_PipelineScheduleRuntime._load_csv` with
format "compute_only" adds the transfers and infers from the rows which rank holds which stage.
"""

from __future__ import annotations

from pathlib import Path

from ... import document
from ...errors import InputError
from ...orders import Orders, order_texts, parse_action


def write_csv(path: str | Path, orders: Orders) -> None:
    """Write orders to a file that torch's pipeline runtime loads."""
    rows = [",".join(texts) + "\n" for texts in order_texts(orders).values()]
    document.write_bytes(path, "".join(rows).encode())


def read_csv(path: str | Path) -> Orders:
    """The orders of a file: a row per rank, empty cells for bubbles."""
    try:
        text = document.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        remedy = "give the file that forerun solve pipeline --csv wrote"
        raise InputError("orders", str(path), "not a text of actions", remedy) from error
    rows = [row.split(",") for row in text.splitlines() if row.strip()]
    if not rows:
        raise InputError("orders", str(path), "holds no actions",
                         "give one row per pipeline rank, actions as 0F0")  # fmt: skip
    return [[parse_action(cell) for cell in row if cell.strip()] for row in rows]
