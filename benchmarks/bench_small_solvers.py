"""How long the solvers of precision and of experts take, and how far they are from their bounds.

python benchmarks/bench_small_solvers.py

Medians of five runs over the median random instance of five; processor time of one thread, so that
a busy machine does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import process_time

import numpy as np

from forerun.planner.experts import Layout, Loads, place_experts
from forerun.planner.precision import Limits, Option, solve_precision

SEEDS = range(5)
RUNS = 5


def options_of(seed: int, num_groups: int, style: str) -> list[Option]:
    """Six options per group: `bits` falls in time as its error grows, `random` is unrelated,
    `alike` gives every group the same."""
    rng = np.random.default_rng(seed)
    options: list[Option] = []
    for group in range(num_groups):
        size, sensitivity = rng.lognormal(size=2)
        for index, bits in enumerate((32, 16, 12, 8, 6, 4)):
            time, memory, error = rng.random(3)
            if style == "bits":
                time, memory = size * bits / 32, size * bits / 8 * (1 + 0.1 * memory)
                error = sensitivity * size * 4.0**-bits
            elif style == "alike":
                time, memory, error = bits / 32, bits / 8 + (bits == 12), 4.0**-bits
            options.append(
                Option(
                    group=f"g{group}",
                    name=f"o{index}",
                    time_s=float(time),
                    memory_bytes=float(memory),
                    error=float(error),
                )
            )
    return options


def limits_of(options: list[Option], with_memory: bool) -> Limits:
    """An error that the middle options reach, and if asked two fifths of the range of memory."""
    errors = np.array([o.error for o in options]).reshape(-1, 6)
    memory = np.array([o.memory_bytes for o in options]).reshape(-1, 6)
    least, most = memory.min(axis=1).sum(), memory.max(axis=1).sum()
    return Limits(
        error=float(np.median(errors, axis=1).sum()),
        memory_bytes=float(least + 0.4 * (most - least)) if with_memory else None,
    )


def measured(solve: Callable[[], float]) -> tuple[float, float]:
    """Median seconds of one solver call, and the gap that it reports."""
    times: list[float] = []
    gap = 0.0
    for _ in range(RUNS):
        started = process_time()
        gap = solve()
        times.append(process_time() - started)
    return statistics.median(times), gap


def line(name: str, results: list[tuple[float, float]]) -> None:
    seconds = [result[0] for result in results]
    gaps = [result[1] for result in results]
    print(f"{name:<46} {statistics.median(seconds):8.3f} {max(seconds):8.3f} "
          f"{100 * statistics.median(gaps):9.4f} {100 * max(gaps):9.4f}")  # fmt: skip


def precision(style: str, with_memory: bool, num_groups: int) -> None:
    results: list[tuple[float, float]] = []
    for seed in SEEDS:
        options = options_of(seed, num_groups, style)
        limits = limits_of(options, with_memory)
        results.append(measured(lambda o=options, m=limits: solve_precision(o, m).gap or 0.0))
    line(f"precision {num_groups} x 6 {style}{', memory limit' * with_memory}", results)


def experts(draw: str, num_experts: int, layout: Layout, num_layers: int = 61) -> None:
    results: list[tuple[float, float]] = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape = (num_layers, num_experts)
        tokens = rng.pareto(1.5, shape) + 0.1 if draw == "pareto" else rng.lognormal(0, 1, shape)
        loads = Loads(
            experts=tuple(map(str, range(num_experts))),
            layers=tuple(map(str, range(num_layers))),
            tokens=tokens,
        )
        results.append(measured(lambda w=loads: max(p.gap for p in place_experts(w, layout))))
    nodes = f", {layout.groups} groups on {layout.nodes} nodes" if layout.groups else ""
    size = f"{num_experts} on {layout.ranks} x {layout.slots} x {num_layers}"
    line(f"experts {size} {draw}{nodes}", results)


def main() -> None:
    print(f"{'':<46} {'s':>8} {'worst s':>8} {'gap %':>9} {'worst %':>9}")
    for with_memory in (False, True):
        for style in ("bits", "random", "alike"):
            precision(style, with_memory, 500)
    precision("bits", False, 5000)
    for draw in ("lognormal", "pareto"):
        experts(draw, 256, Layout(ranks=32, slots=10))
        experts(draw, 256, Layout(ranks=64, slots=5))
        experts(draw, 256, Layout(ranks=160, slots=2))
        experts(draw, 256, Layout(ranks=32, slots=10, nodes=4, groups=8))
        experts(draw, 8, Layout(ranks=4, slots=3))


if __name__ == "__main__":
    main()
