"""What a sweep found: its rows, their Pareto front, and the answers to an inverse question."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

from ...document import Value, to_raw
from .pareto import fronts
from .rows import Row

Question = Literal["table", "fewest-gpus", "longest-context", "largest-model", "cheapest"]
Axis = Literal["tokens_per_s", "seq_tokens", "num_params"]
Cost = Literal["usd_per_hour", "gpus"]
AXES: dict[Question, Axis] = {"longest-context": "seq_tokens", "largest-model": "num_params"}
"""What is wanted more of; the others want tokens_per_s."""


class Answer(Value, frozen=True, kw_only=True):
    """The answer for one model, kind of GPU, length and batch that were given."""

    row: int | None
    """Index of the row; None when nothing answers."""
    text: str
    """The answer, or what came nearest, in words."""


class SweepResult(Value, frozen=True, kw_only=True):
    """All rows in the order in which they were asked."""

    question: Question
    rows: tuple[Row, ...]
    answers: tuple[Answer, ...] = ()
    """Empty for a table."""
    tokens: float | None = None
    """Length of the run that times and costs of whole runs are for."""
    limit: Literal["time"] | None = None
    """What ended the sweep early."""
    seconds: float

    @property
    def planned(self) -> list[int]:
        """Rows that hold a plan."""
        return [i for i, row in enumerate(self.rows) if row.status == "planned"]

    @property
    def answered(self) -> list[int]:
        """Rows that answer the question; of a table, every plan."""
        if self.question == "table":
            return self.planned
        return sorted({a.row for a in self.answers if a.row is not None})

    @property
    def wanted(self) -> Axis:
        """What the front wants more of."""
        return AXES.get(self.question, "tokens_per_s")

    @property
    def paid(self) -> Cost:
        """What the front wants less of: money per hour, or devices where a price is missing."""
        priced = all(self.rows[i].price_usd_per_hour is not None for i in self.planned)
        return "usd_per_hour" if priced and self.planned else "gpus"

    @property
    def compared(self) -> list[int]:
        """Rows among which the front is chosen: where length or size is the answer, answers."""
        return self.planned if self.wanted == "tokens_per_s" else self.answered

    @property
    def pareto(self) -> list[int]:
        """Rows on the front of their job: same model, length and batch, unless that is searched."""
        return fronts((self.job(i), i, self.cost(i), self.value(i)) for i in self.compared)

    def job(self, index: int) -> Hashable:
        """What a row shares with the rows that it is compared with."""
        row, wanted = self.rows[index], self.wanted
        if wanted == "seq_tokens":
            return (row.model,)
        model = "" if wanted == "num_params" else row.model
        return model, row.seq_tokens, row.global_batch_seqs

    def cost(self, index: int) -> float:
        """The row on the axis that is paid."""
        row = self.rows[index]
        if self.paid == "gpus" or row.price_usd_per_hour is None:
            return float(row.num_devices)
        return row.price_usd_per_hour

    def value(self, index: int) -> float:
        """The row on the axis that is wanted."""
        return float(getattr(self.rows[index], self.wanted))

    def document(self) -> dict[str, Any]:
        """The JSON document of `forerun sweep`."""
        return {
            "rows": [row.document(self.tokens) for row in self.rows],
            "pareto": self.pareto,
            "pareto_axes": [self.paid, self.wanted],
            "question": self.question,
            "answers": [to_raw(answer) for answer in self.answers],
            "limit": self.limit,
            "seconds": self.seconds,
        }


def why_none(rows: Sequence[Row]) -> tuple[str, str]:
    """The reason and the smallest change for a sweep without any plan, from its first row."""
    asked = [row for row in rows if row.status != "left out"]
    if not asked:
        return "the time limit struck before the first plan", "raise --time-limit"
    first = next((row for row in asked if row.status == "infeasible"), asked[0])
    count = f"none of {len(rows)} combinations has a plan; " if len(rows) > 1 else ""
    change = first.smallest_change or "give more devices, or shorter sequences"
    return f"{count}{first.model} on {first.gpus}: {first.reason}", change
