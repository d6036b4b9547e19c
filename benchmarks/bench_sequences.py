"""Unequal groups for unequal sequences: time of the solve, gap, and gain over one degree.

python benchmarks/bench_sequences.py [--quick]

Costs are those published for a 7B GPT on nodes of eight A100 (`published_costs`), 5 ms per pass
without barriers; the last rows take them from the cost model, Llama-2-7B on H100. Times are CPU
seconds of one process, medians of five solves, numba's compilation not included; the bounds by
linear programming have a column of their own. `gap` is to the bound that holds for any
micro-batches, `cut gap` to that for the same ones. `gain` is the time of the best single degree,
balanced by the same rules, over ours.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from time import process_time

import numpy as np

from forerun.catalogs import entry, load_cluster, load_model
from forerun.planner import jit
from forerun.planner.sequences import (
    Assignment,
    Costs,
    best_static,
    model_costs,
    published_costs,
    solve_groups,
    solve_hybrid,
)

REPEATS = 5


def log_normal(count: int, seed: int) -> list[int]:
    """Median 4,000, sigma 1.2, cut at 196,608."""
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(4000), 1.2, count))
    return np.clip(drawn, 1, 196_608).astype(int).tolist()


def rare_long(count: int, seed: int) -> list[int]:
    """Log-normal with median 1,500, and one in a hundred uniform in the logarithm up to 1,048,576.

    The longest is always there.
    """
    random = np.random.default_rng(seed)
    short = np.exp(random.normal(np.log(1500), 1.0, count))
    long = np.exp(random.uniform(np.log(32_768), np.log(1_048_576), count))
    drawn = np.where(random.random(count) < 0.01, long, short)
    drawn[0] = 1_048_576
    return np.clip(drawn, 1, 1_048_576).astype(int).tolist()


def measured(count: int, seed: int) -> list[int]:
    """The catalog's measured corpus: files of Python's standard library, by its quantiles."""
    known = entry("lengths", "python-stdlib")
    at = np.random.default_rng(seed).random(count)
    drawn = np.exp(np.interp(at, known["quantiles"], np.log(known["lengths"])))
    return np.maximum(drawn, 1).astype(int).tolist()


def timed(solve: Callable[[], Assignment]) -> tuple[Assignment, float]:
    """The answer and the median seconds of it."""
    samples: list[float] = []
    found = solve()
    for _ in range(REPEATS):
        start = process_time()
        solve()
        samples.append(process_time() - start)
    return found, statistics.median(samples)


def row(name: str, lengths: list[int], costs: Costs, ranks: int, barriers: bool) -> None:
    """Print one line of the table."""
    bound_s = 0.0
    if barriers:
        found, seconds = timed(lambda: solve_groups(lengths, costs, ranks, certify=False))
        start = process_time()
        found = solve_groups(lengths, costs, ranks)
        bound_s = process_time() - start - seconds
    else:
        found, seconds = timed(lambda: solve_hybrid(lengths, costs, ranks, pack=False))
    static = best_static(lengths, costs, ranks, barriers=barriers, pack=False)
    gain = f"{static.makespan_s / found.makespan_s:5.2f} (d={static.degree})" if static else "-"
    print(
        f"{name:34} {'yes' if barriers else 'no':>8} {len(found.micro_batches):3} "
        f"{found.makespan_s:9.3f} {100 * found.gap:6.2f} {100 * found.cut_gap:8.2f} "
        f"{1e3 * seconds:9.1f} {bound_s:8.2f} {gain:>16}",
        flush=True,
    )


def main() -> None:
    sizes = [(64, 512)] if "--quick" in sys.argv else [(64, 512), (1024, 8192)]
    draws = {"log-normal": log_normal, "rare 1M": rare_long, "python-stdlib": measured}
    solve_groups([3000] * 20, published_costs(64, tokens_per_rank=16_384), 64)  # compiles
    print(f"numba: {'yes' if jit.has_numba() else 'no'}")
    print(
        f"{'GPUs x sequences, E, lengths':34} {'barriers':>8} {'M':>3} {'step s':>9} {'gap %':>6} "
        f"{'cut gap %':>8} {'solve ms':>8} {'bound s':>8} {'gain':>16}"
    )
    for ranks, count in sizes:
        for tokens in (16_384, 65_536):
            for name, draw in draws.items():
                for barriers, pass_s in ((False, 0.005), (True, None)):
                    costs = published_costs(ranks, tokens_per_rank=tokens, pass_s=pass_s)
                    title = f"{ranks} x {count}, {tokens}, {name}"
                    row(title, draw(count, 0), costs, ranks, barriers)
        model, cluster = load_model("llama-2-7b"), load_cluster(f"{ranks // 8}x8xH100")
        for name, draw in draws.items():
            for barriers in (False, True):
                costs = model_costs(model, cluster, zero=3 if barriers else 1, recompute="full")
                title = f"{ranks} x {count}, llama-2-7b, {name}"
                row(title, draw(count, 0), costs, ranks, barriers)


if __name__ == "__main__":
    main()
