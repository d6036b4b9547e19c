"""Whether orders are a valid schedule, how long they take and how much they keep: no solver.

    every F(i, j), and I and W or else B of (i, j), exactly once and on the rank of stage i
    F before I before W of one (i, j) on its rank; no cycle of waiting among ranks
    live(rank, t) = sum of activation(i) over (i, j) between the start of F and the end of W or B
    live <= limit at all times

Times are found by resolving each action's start recursively from the two that it waits for (the
one before it on its rank, the one it depends on), which shares nothing with the solver's loops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ...orders import Action, Orders
from .actions import Pipeline

TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What orders amount to; `problems` is empty when they are valid."""

    problems: tuple[str, ...]
    makespan_s: float
    peak_activations: tuple[float, ...]
    """Per rank, in the unit of `Pipeline.activation`."""


def check(pipeline: Pipeline, orders: Orders, limit: float | None = None) -> Checked:
    """Check orders against a pipeline and a memory limit (None: no limit)."""
    problems = _missing_or_twice(pipeline, orders)
    if problems:
        return Checked(problems=problems, makespan_s=float("inf"), peak_activations=())
    peaks = tuple(peak_activation(pipeline, actions) for actions in orders)
    if limit is not None:
        problems = tuple(
            f"rank {rank} keeps {peak:g} of {limit:g}"
            for rank, peak in enumerate(peaks)
            if peak > limit + TOLERANCE
        )
    ends = _ends(pipeline, orders)
    if ends is None:
        problems += ("the ranks wait for each other",)
        return Checked(problems=problems, makespan_s=float("inf"), peak_activations=peaks)
    return Checked(problems=problems, makespan_s=max(ends.values()), peak_activations=peaks)


def _missing_or_twice(pipeline: Pipeline, orders: Orders) -> tuple[str, ...]:
    """What is wrong with the set of actions, its ranks, or the order within one micro-batch."""
    problems: list[str] = []
    if len(orders) != pipeline.num_ranks:
        return (f"{len(orders)} rows for {pipeline.num_ranks} ranks",)
    seen: Counter[Action] = Counter()
    for rank, actions in enumerate(orders):
        for kind, stage, micro in actions:
            if not 0 <= stage < pipeline.num_stages or pipeline.rank_of[stage] != rank:
                problems.append(f"stage {stage} is not on rank {rank}")
                continue
            for part in "IW" if kind == "B" else kind:
                needed = {"F": None, "I": "F", "W": "I"}.get(part, "?")
                if needed is not None and not seen[needed, stage, micro]:
                    problems.append(f"{stage}{part}{micro} stands before what it needs")
                seen[part, stage, micro] += 1
    wanted = {
        (kind, stage, micro)
        for kind in "FIW"
        for stage in range(pipeline.num_stages)
        for micro in range(pipeline.num_micro_batches)
    }
    for action in sorted(wanted ^ set(seen)):
        problems.append(f"{_text(action)} is {'missing' if action in wanted else 'unknown'}")
    problems += [f"{_text(action)} stands {n} times" for action, n in seen.items() if n > 1]
    return tuple(problems)


def _text(action: Action) -> str:
    kind, stage, micro = action
    return f"{stage}{kind}{micro}"


def peak_activation(pipeline: Pipeline, actions: Sequence[Action]) -> float:
    """The most that one rank keeps at once, in the unit of `Pipeline.activation`."""
    live: Counter[int] = Counter()
    peak = 0.0
    for kind, stage, _ in actions:
        live[stage] += (kind == "F") - (kind in "WB")
        peak = max(peak, sum(pipeline.activation[i] * count for i, count in live.items()))
    return peak


def _ends(pipeline: Pipeline, orders: Orders) -> dict[Action, float] | None:
    """End of every action; None when some wait in a circle."""
    whole = {(stage, micro) for row in orders for kind, stage, micro in row if kind == "B"}
    before: dict[Action, list[tuple[Action, float]]] = {}
    for actions in orders:
        previous: Action | None = None
        for action in actions:
            needs = [] if previous is None else [(previous, 0.0)]
            before[action] = needs + _needs(pipeline, action, whole)
            previous = action
    ends: dict[Action, float] = {}
    opened: set[Action] = set()
    for wanted in before:
        stack = [wanted]
        while stack:
            action = stack[-1]
            if action in ends:
                stack.pop()
                continue
            waiting = [need for need, _ in before[action] if need not in ends]
            if waiting and action in opened:
                return None
            opened.add(action)
            if waiting:
                stack += waiting
                continue
            start = max((ends[need] + hop for need, hop in before[action]), default=0.0)
            ends[action] = start + pipeline.duration_s(action)
            opened.discard(action)
            stack.pop()
    return ends


def _needs(
    pipeline: Pipeline, action: Action, whole: set[tuple[int, int]]
) -> list[tuple[Action, float]]:
    """The actions of other stages, or of the own one, that must end first; with the transfer."""
    kind, stage, micro = action
    if kind == "F":
        return [(("F", stage - 1, micro), pipeline.hop_s(stage, stage - 1))] if stage else []
    if kind == "W":
        return [(("I", stage, micro), 0.0)]
    needs: list[tuple[Action, float]] = [(("F", stage, micro), 0.0)]
    if stage < pipeline.num_stages - 1:
        after = "B" if (stage + 1, micro) in whole else "I"
        needs.append(((after, stage + 1, micro), pipeline.hop_s(stage, stage + 1)))
    return needs
