"""Running several plans in turns, to keep the fastest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from ..errors import InputError
from ..measurement import Measurement
from ..plan import PlanFile
from . import launch


def tune(
    plan_files: Sequence[PlanFile],
    *,
    rounds: int = 2,
    steps: int = 5,
    warmup_steps: int = 2,
    data: str | None = None,
    on_progress: launch.OnProgress | None = None,
    module: str | None = None,
) -> tuple[int, list[Measurement], float]:
    """Index of the fastest plan, one Measurement per plan, and the noise floor.

    Plans run in turns, all of them once per round, so that a machine that slows down hurts all
    alike. A plan is judged by the round with its middle median. The noise floor is the largest
    spread of one plan's medians, (max - min) / median, or with a single round that of its steps.
    `module` is as in `run`.
    """
    if not plan_files:
        raise InputError("plans", "[]", "nothing to run", "give one plan at least")
    if rounds < 1:
        raise InputError("rounds", rounds, "not positive", "give 1 or more")
    total = rounds * len(plan_files)
    measured: list[list[Measurement]] = [[] for _ in plan_files]
    for turn in range(total):
        index = turn % len(plan_files)
        measured[index].append(
            launch.run(
                plan_files[index],
                steps=steps,
                warmup_steps=warmup_steps,
                data=data,
                on_progress=_part_of(on_progress, turn, total),
                module=module,
            )
        )
    chosen = [middle(runs) for runs in measured]
    noise = max(spread(runs) for runs in measured)
    winner = min(range(len(chosen)), key=lambda index: chosen[index].step_s.median)
    return winner, chosen, noise


def middle(runs: Sequence[Measurement]) -> Measurement:
    """The run whose median step is the (lower) median of all."""
    median_s = statistics.median_low([run.step_s.median for run in runs])
    return next(run for run in runs if run.step_s.median == median_s)


def spread(runs: Sequence[Measurement]) -> float:
    """(max - min) / median of the runs' median steps; of one run, of its steps."""
    seconds = [run.step_s.median for run in runs] if len(runs) > 1 else list(runs[0].steps)
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def _part_of(
    on_progress: launch.OnProgress | None, turn: int, total: int
) -> Callable[[int, int, float], None] | None:
    if on_progress is None:
        return None
    return lambda step, steps, loss: on_progress(turn * steps + step, total * steps, loss)
