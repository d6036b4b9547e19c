"""Orders in the text that torch's pipeline runtime reads: one row per rank, actions as `0F0`.

The grammar is that of `torch.distributed.pipelining.schedules._Action.from_str` (torch 2.13) for
computations: stage, one of F, I, W, B, micro-batch. `_PipelineScheduleRuntime._load_csv` with
format "compute_only" adds the transfers and infers from the rows which rank holds which stage.
"""

from __future__ import annotations

from pathlib import Path

from ... import document
from ...costmodel.schedule import Action, Orders


def action_text(action: Action) -> str:
    """An action as torch writes it.

    >>> action_text(("I", 3, 12))
    '3I12'
    """
    kind, stage, micro = action
    return f"{stage}{kind}{micro}"


def order_texts(orders: Orders) -> dict[str, list[str]]:
    """The actions of every rank as text, as plans hold them."""
    return {str(rank): [action_text(a) for a in actions] for rank, actions in enumerate(orders)}


def write_csv(path: str | Path, orders: Orders) -> None:
    """Write orders to a file that torch's pipeline runtime loads."""
    rows = [",".join(texts) + "\n" for texts in order_texts(orders).values()]
    document.write_bytes(path, "".join(rows).encode())
