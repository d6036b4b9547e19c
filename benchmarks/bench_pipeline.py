"""Pipeline schedules of eight ranks and 32 micro-batches: gains, gaps to the bound, times.

    python benchmarks/bench_pipeline.py [--plain] [--repeats N]

Prints one row per case and memory limit: makespans of 1F1B, ZB-H1 and the best known schedule
within the limit, the makespan found, the lower bound, the gap, and the median time of the repeats.
--plain runs the loops without numba. Compile time is not counted: a first solve warms up.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from statistics import median

from forerun.planner import jit
from forerun.planner.pipeline import Solution, solve_pipeline

Times = tuple[list[float], list[float], list[float]]


def cases() -> dict[str, Times]:
    """Forward, backward-input and backward-weight times of the 16 chunks."""

    def head(value: float) -> list[float]:
        return [value + 0.03, *[value] * 14, value + 0.3]

    def scaled(seed: int, width: float, parts: tuple[float, float, float]) -> Times:
        draw = random.Random(seed)
        factors = [1 + draw.uniform(-width, width) for _ in range(16)]
        forward, inputs, weights = ([part * x for x in factors] for part in parts)
        return forward, inputs, weights

    slow = [1.25 if chunk in (3, 12) else 1.0 for chunk in range(16)]
    return {
        "equal": ([0.5] * 16, [0.5] * 16, [0.5] * 16),
        "longctx": ([0.5] * 16, [0.75] * 16, [0.3] * 16),
        "head": (head(0.5), head(0.5), head(0.5)),
        "head+ctx": (head(0.5), head(0.7), head(0.35)),
        "rand15": scaled(0, 0.15, (0.5, 0.55, 0.45)),
        "rand30": scaled(1, 0.3, (0.5, 0.5, 0.5)),
        "slowchunks": ([0.5 * x for x in slow], [0.6 * x for x in slow], [0.45 * x for x in slow]),
    }


def row(name: str, limit: float, found: Solution, seconds: float) -> str:
    """One line of the table."""
    known = {schedule.name: schedule for schedule in found.builtin}
    fitting = [schedule.makespan_s for schedule in found.builtin if found.fits(schedule)]
    best = f"{min(fitting):.2f}" if fitting else "-"
    one_f_one_b = known["1F1B"].makespan_s
    return (
        f"| {name} | {limit:g} | {one_f_one_b:.1f} | {known['ZB-H1'].makespan_s:.1f} | {best} "
        f"| {found.makespan_s:.2f} ({found.placement}) | {found.lower_bound_s:.2f} "
        f"| {100 * found.gap:.1f} % | {100 * (one_f_one_b / found.makespan_s - 1):+.1f} % "
        f"| {100 * (known['ZB-H1'].makespan_s / found.makespan_s - 1):+.1f} % | {seconds:.2f} |"
    )


def main(print_row: Callable[[str], None] = print) -> None:
    """Parse the options, solve every case, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", action="store_true", help="run the loops without numba")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.plain:
        jit.has_numba = lambda: False
    solve_pipeline(4, 9, 1.0, 1.3, 0.7, memory_limit=3)
    print_row(
        "| case | limit | 1F1B | ZB-H1 | best known within it | found | bound | gap | over 1F1B "
        "| over ZB-H1 | s |"
    )
    print_row("|---|---|---|---|---|---|---|---|---|---|---|")
    for limit in (8.0, 6.0, 4.0):
        for name, times in cases().items():
            runs = [solve_pipeline(8, 32, *times, memory_limit=limit)
                    for _ in range(options.repeats)]  # fmt: skip
            print_row(row(name, limit, runs[0], median(found.seconds for found in runs)))


if __name__ == "__main__":
    main()
