"""A pipeline to be scheduled: durations of its stages, their placement on ranks, its actions.

An action is (kind, stage, micro-batch) as in `costmodel.schedule`: F forward, I backward for the
input, W backward for the weights, B both at once. Every action has a slot, a number by which the
loops index their arrays:

    slot(kind, stage, micro) = (k S + stage) m + micro      k = 0 for F, 1 for I and B, 2 for W

with S stages and m micro-batches. Each action waits for at most one other: F(i, j) for F(i-1, j),
I(i, j) for I(i+1, j) or, on the last stage, for F(i, j), W(i, j) for I(i, j).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ...errors import InputError
from ...orders import Action, Orders

KINDS = "FIW"


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Stages on ranks, and what each costs; times in any one unit, here called seconds."""

    num_ranks: int
    num_micro_batches: int
    rank_of: tuple[int, ...]
    """Rank of every stage."""
    forward_s: tuple[float, ...]
    """Per stage and micro-batch; likewise the next two."""
    input_s: tuple[float, ...]
    weight_s: tuple[float, ...]
    activation: tuple[float, ...]
    """What one micro-batch keeps on a stage from F to W, in units of the memory limit."""
    comm_s: float = 0.0
    """Transfer between two ranks; it delays the receiver and occupies nobody."""

    @property
    def num_stages(self) -> int:
        """Stages in the model's order, all ranks together."""
        return len(self.rank_of)

    @cached_property
    def stages_of(self) -> tuple[tuple[int, ...], ...]:
        """The stages of every rank, ascending."""
        return tuple(
            tuple(stage for stage, rank in enumerate(self.rank_of) if rank == which)
            for which in range(self.num_ranks)
        )

    def busy_s(self, rank: int) -> float:
        """The work of a rank in one micro-batch."""
        stages = self.stages_of[rank]
        return sum(self.forward_s[i] + self.input_s[i] + self.weight_s[i] for i in stages)

    def hop_s(self, stage: int, other: int) -> float:
        """Transfer between neighbouring stages: nothing when one rank holds both."""
        return 0.0 if self.rank_of[stage] == self.rank_of[other] else self.comm_s

    def duration_s(self, action: Action) -> float:
        """How long an action occupies its rank."""
        kind, stage, _ = action
        if kind == "F":
            return self.forward_s[stage]
        inputs, weights = self.input_s[stage], self.weight_s[stage]
        return {"I": inputs, "W": weights, "B": inputs + weights}[kind]

    def slot(self, action: Action) -> int:
        """The action's number in the arrays of the loops."""
        kind, stage, micro = action
        row = (0 if kind == "F" else 2 if kind == "W" else 1) * self.num_stages + stage
        return row * self.num_micro_batches + micro

    def action(self, slot: int) -> Action:
        """The action of a slot, with the backward pass split."""
        row, micro = divmod(slot, self.num_micro_batches)
        kind, stage = divmod(row, self.num_stages)
        return KINDS[kind], stage, micro

    @cached_property
    def waits_for(self) -> tuple[int, ...]:
        """Per slot: the slot that it waits for, or -1."""
        found: list[int] = []
        for slot in range(3 * self.num_stages * self.num_micro_batches):
            kind, stage, micro = self.action(slot)
            if kind == "W":
                before = self.slot(("I", stage, micro))
            elif kind == "F":
                before = self.slot(("F", stage - 1, micro)) if stage else -1
            elif stage == self.num_stages - 1:
                before = self.slot(("F", stage, micro))
            else:
                before = self.slot(("I", stage + 1, micro))
            found.append(before)
        return tuple(found)

    @cached_property
    def transfers_s(self) -> tuple[float, ...]:
        """Per slot: the transfer between what it waits for and itself."""
        found: list[float] = []
        for slot, before in enumerate(self.waits_for):
            other = self.action(before)[1] if before >= 0 else self.action(slot)[1]
            found.append(self.hop_s(self.action(slot)[1], other))
        return tuple(found)


def make_pipeline(
    num_ranks: int,
    num_micro_batches: int,
    forward_s: float | Sequence[float],
    input_s: float | Sequence[float],
    weight_s: float | Sequence[float],
    *,
    chunks: int = 1,
    folded: bool = True,
    comm_s: float = 0.0,
    activation: Sequence[float] | None = None,
) -> Pipeline:
    """A checked pipeline of `chunks` stages per rank.

    Parameters
    ----------
    forward_s, input_s, weight_s : one number, the time of a rank's share of the model; or one per
        rank, a stage each, which is cut into `chunks` equal parts; or one per chunk, in the model's
        order.
    folded : two chunks per rank lie in a V, stages r and 2p - 1 - r; else stage i is on i mod p.
    activation : per chunk; default 1 / chunks, so that a rank's share of the model is one unit.

    Raises
    ------
    InputError : a number is not positive and finite, or a list has another length.

    >>> make_pipeline(2, 4, 1.0, (1.0, 1.5), 1.0, chunks=2).input_s
    (0.5, 0.5, 0.75, 0.75)
    """
    for field, count in (("stages", num_ranks), ("micro-batches", num_micro_batches)):
        if count < 1:
            raise InputError(field, count, "not positive", "give at least 1")
    num_stages = num_ranks * chunks
    if chunks == 2 and folded:
        rank_of = tuple(min(i, num_stages - 1 - i) for i in range(num_stages))
    else:
        rank_of = tuple(i % num_ranks for i in range(num_stages))
    if not 0 <= comm_s < math.inf:
        raise InputError("comm", comm_s, "not a time", "give zero or a positive number")
    shares = (1.0 / chunks,) * num_stages if activation is None else tuple(activation)
    _check_times("activation", shares)
    if len(shares) != num_stages:
        raise InputError("activation", f"{len(shares)} numbers", "not one per stage",
                         f"give {num_stages}")  # fmt: skip
    return Pipeline(
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        rank_of=rank_of,
        forward_s=per_chunk("forward", forward_s, num_ranks, chunks),
        input_s=per_chunk("backward-input", input_s, num_ranks, chunks),
        weight_s=per_chunk("backward-weight", weight_s, num_ranks, chunks),
        activation=shares,
        comm_s=comm_s,
    )


def per_chunk(
    field: str, given: float | Sequence[float], num_ranks: int, chunks: int
) -> tuple[float, ...]:
    """One duration per chunk from one number, one per rank or one per chunk."""
    values = list(given) if isinstance(given, Sequence) else [given] * num_ranks
    _check_times(field, values)
    if len(values) == num_ranks and chunks > 1:
        values = [value / chunks for value in values for _ in range(chunks)]
    if len(values) != num_ranks * chunks:
        counts = " or ".join(str(num_ranks * each) for each in sorted({1, chunks}))
        raise InputError(field, f"{len(values)} numbers", f"not one per stage ({counts})",
                         f"give one number or {counts}")  # fmt: skip
    return tuple(map(float, values))


def _check_times(field: str, values: Sequence[float]) -> None:
    for value in values:
        if not 0 < value < math.inf:
            raise InputError(field, value, "not a positive number", "give positive numbers")


def split(orders: Orders) -> Orders:
    """The same orders with every B as I and W, one after the other: never slower."""
    return [
        [
            (part, stage, micro)
            for kind, stage, micro in actions
            for part in ("IW" if kind == "B" else kind)
        ]
        for actions in orders
    ]


def merged(orders: Orders) -> Orders:
    """The same orders with every I that its W follows at once as B: torch runs that as one pass.

    It takes as long on its rank, but the stage before waits for the whole of it.
    """
    result: Orders = []
    for actions in orders:
        row: list[Action] = []
        for action in actions:
            if action[0] == "W" and row and row[-1] == ("I", *action[1:]):
                row[-1] = ("B", *action[1:])
            else:
                row.append(action)
        result.append(row)
    return result
