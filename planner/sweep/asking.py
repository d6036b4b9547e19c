"""How a sweep is asked - conditions that hold for all of it - and how its rows become a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from ..candidates import CostModel
from .result import Answer, Question, SweepResult
from .rows import TIME_IS_UP, Ask, Asker, Fit, Report, Row, TimeIsUp


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What holds for every ask of a sweep."""

    fit: Fit = "yes"
    """What a plan must be predicted to do: fit for certain (yes), or by its median (marginal)."""
    tokens: float | None = None
    """Length of a run, for its duration and cost."""
    time_limit_s: float | None = None
    """Seconds by `clock` for all asks together."""
    report: Report | None = None
    cost: CostModel | None = None
    clock: Callable[[], float] = perf_counter

    def asker(self, started: float) -> Asker:
        """An asker whose time begins at `started`."""
        deadline = None if self.time_limit_s is None else started + self.time_limit_s
        return Asker(
            clock=self.clock, deadline=deadline, fit=self.fit, report=self.report,
            cost=self.cost, rows=[],
        )  # fmt: skip


def ask_each(
    question: Question,
    asks: Sequence[Ask],
    answer: Callable[[Asker, Ask], Answer],
    conditions: Conditions,
) -> SweepResult:
    """An inverse question for every ask, one after another within one time limit."""
    started = conditions.clock()
    asker = conditions.asker(started)
    answers = tuple(answer(asker, ask) for ask in asks)
    return finish(question, asker, answers, conditions.tokens, started)


def finish(
    question: Question,
    asker: Asker,
    answers: tuple[Answer, ...],
    tokens: float | None,
    started: float,
) -> SweepResult:
    """The rows as a result. Raises the last InputError when every ask was refused."""
    if asker.refusal is not None and all(row.status == "refused" for row in asker.rows):
        raise asker.refusal
    return SweepResult(
        question=question,
        rows=tuple(asker.rows),
        answers=answers,
        tokens=tokens,
        limit="time" if asker.struck else None,
        seconds=asker.clock() - started,
    )


def until_time(find: Callable[[], int | None]) -> tuple[int | None, bool]:
    """What is found, and whether the time limit ended the search before."""
    try:
        return find(), False
    except TimeIsUp:
        return None, True


def unless_done(stopped: bool) -> str:
    """What an answer adds when the time limit ended its search."""
    return "; best so far when the time limit struck" if stopped else ""


def last_reason(rows: Sequence[Row], seen: dict[int, int]) -> str:
    """Why the row asked last has no plan."""
    return rows[max(seen.values())].reason if seen else TIME_IS_UP


def doubled(sizes: Sequence[float]) -> list[int]:
    """Indexes of rising sizes that are each at least twice the one before, and of the last.

    >>> doubled([1, 2, 3, 4, 5, 6, 7, 8, 9])
    [0, 1, 3, 7, 8]
    """
    chosen = [0]
    for index, size in enumerate(sizes):
        if size >= 2 * sizes[chosen[-1]]:
            chosen.append(index)
    return sorted({*chosen, len(sizes) - 1})
