"""The best plan of every combination, and the cheapest of them that meets a deadline.

table       best plan of every ask
cheapest    min price / tokens_per_s   subject to  tokens / tokens_per_s <= deadline
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ...errors import InputError
from .asking import Conditions, finish
from .prices import check_prices
from .result import Answer, SweepResult
from .rows import TIME_IS_UP, Ask, Row, TimeIsUp, row_of

DAY_S = 86400


def sweep_table(asks: Sequence[Ask], conditions: Conditions) -> SweepResult:
    """The best plan for every ask, as a row each; those that have none say why.

    Raises InputError when every ask was refused: no legal layout, or pins that cannot be.
    """
    started = conditions.clock()
    asker = conditions.asker(started)
    for ask in asks:
        try:
            asker.ask(ask, total=len(asks))
        except TimeIsUp:
            asker.rows.append(row_of(ask, "left out", reason=TIME_IS_UP))
    return finish("table", asker, (), conditions.tokens, started)


def cheapest(
    asks: Sequence[Ask], conditions: Conditions, *, deadline_s: float | None = None
) -> SweepResult:
    """Of the clusters given, the one that trains `conditions.tokens` for the least money in time.

    One answer for each model, length and batch. Raises InputError where a price is not known.
    """
    tokens = conditions.tokens
    if tokens is None:
        raise InputError("tokens", "(missing)", "not given", "write --tokens 15T")
    check_prices((ask.cluster for ask in asks), needed=True)
    table = sweep_table(asks, conditions)
    jobs: dict[tuple[str, int, int], list[int]] = {}
    for index, row in enumerate(table.rows):
        jobs.setdefault((row.model, row.seq_tokens, row.global_batch_seqs), []).append(index)
    answers = tuple(_cheapest_of(table.rows, job, tokens, deadline_s) for job in jobs.values())
    return msgspec.structs.replace(table, question="cheapest", answers=answers)


def _cheapest_of(
    rows: Sequence[Row], job: Sequence[int], tokens: float, deadline_s: float | None
) -> Answer:
    priced = [(rows[i].run_usd(tokens), rows[i].run_s(tokens), i) for i in job]
    planned = [(usd, run_s, i) for usd, run_s, i in priced if usd is not None and run_s is not None]
    timely = [found for found in planned if deadline_s is None or found[1] <= deadline_s]
    if timely:
        usd, run_s, index = min(timely)
        text = f"{rows[index].gpus} costs USD {usd:,.0f} for {run_s / DAY_S:,.3g} days"
        return Answer(row=index, text=text)
    if not planned:
        return Answer(row=None, text=f"no cluster has a plan that fits: {rows[job[0]].reason}")
    _, run_s, index = min(planned, key=lambda found: (found[1], found[2]))
    return Answer(
        row=None,
        text=f"no cluster meets the deadline; the fastest, {rows[index].gpus}, takes "
        f"{run_s / DAY_S:,.3g} days",
    )
