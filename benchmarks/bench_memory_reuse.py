"""How long memory reuse takes and how small the arenas are: medians, compiled loops loaded before.

python benchmarks/bench_memory_reuse.py [--numpy] [--runs 3]

`--numpy` leaves numba out, as on a machine without it. The published instances stop at their
capacity, the traces at the smallest arena.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from forerun.planner import jit
from forerun.planner.memory_reuse import (
    Buffers,
    MemoryPlan,
    bilevel,
    make_buffers,
    read_buffers,
    solve,
)
from forerun.planner.memory_reuse.bilevel import Pass, flat
from forerun.planner.memory_reuse.traces import TRACES, equal_layers, random_lives

INSTANCES = Path(__file__).parent.parent / "tests" / "validation" / "minimalloc"
CAPACITY = 1048576


def print_row(label: str, plan: MemoryPlan, seconds: float) -> None:
    gap = 100 * (plan.peak_bytes / plan.lower_bound_bytes - 1)
    print(
        f"{label:24} {len(plan.buffers):7,} {plan.peak_bytes:15,} {gap:8.3f} % {plan.nodes:9,} "
        f"{seconds:9.3f} s  {plan.method}"
    )


def measure(label: str, buffers: Buffers, runs: int, capacity_bytes: int | None = None) -> None:
    plans = [solve(buffers, capacity_bytes=capacity_bytes) for _ in range(runs)]
    print_row(label, plans[0], statistics.median(plan.seconds for plan in plans))


def two_levels(num_layers: int, runs: int) -> None:
    """Equal layers: the transient buffers of a pass as one block, against all in one problem."""
    layer = equal_layers(1)
    short = [i for i in range(len(layer)) if layer.upper[i] - layer.lower[i] <= 12]
    inner = make_buffers(
        [layer.ids[i] for i in short],
        layer.lower[short],
        layer.upper[short],
        layer.size_bytes[short],
    )
    length = int(layer.upper.max())
    passes = [Pass(name=f"{i}", inner=inner, start=i * length) for i in range(num_layers)]
    outer = make_buffers(
        [f"kept{i}" for i in range(num_layers)],
        [i * length for i in range(num_layers)],
        [num_layers * length + num_layers - i for i in range(num_layers)],
        [2**26] * num_layers,
    )
    everything = flat(outer, passes)
    both = [bilevel(outer, passes) for _ in range(runs)]
    both_s = [two.plan.seconds + sum(p.seconds for p in two.inner_plans) for two in both]
    print_row(f"two levels, {num_layers} layers", both[0].plan, statistics.median(both_s))
    measure(f"  the same in one, n = {len(everything):,}", everything, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numpy", action="store_true", help="leave numba out")
    parser.add_argument("--runs", type=int, default=3, help="runs per row")
    flags = parser.parse_args()
    if flags.numpy:
        jit.has_numba = lambda: False
    else:
        solve(random_lives(300, 0))
        solve(read_buffers(INSTANCES / "G.1048576.csv"), capacity_bytes=CAPACITY)
    print(f"{'':24} {'buffers':>7} {'arena, bytes':>15} {'gap':>10} {'nodes':>9} {'median':>11}")
    for path in sorted(INSTANCES.glob("*.csv")):
        measure(f"minimalloc {path.name[0]}", read_buffers(path), flags.runs, CAPACITY)
    for count in (70, 280, 1_000, 10_000):
        for kind, make in TRACES.items():
            for seed in (0, 1):
                measure(f"{kind}, seed {seed}", make(count, seed), flags.runs)
    for seed in range(4):
        measure(f"rnd, many alive, {seed}", random_lives(10_000, seed, 5_000.0), flags.runs)
    for num_layers in (32, 128):
        two_levels(num_layers, flags.runs)


if __name__ == "__main__":
    main()
