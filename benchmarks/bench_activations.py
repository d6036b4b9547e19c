"""How long the choice per saved tensor takes: medians over memory limits, imports excluded.

python benchmarks/bench_activations.py
"""

from __future__ import annotations

import statistics
from time import perf_counter

from forerun.catalogs import load_model, resolve_gpus
from forerun.mesh import Mesh
from forerun.planner.activations import Limits, Problem, first_stage, frontier, solve

CASES = (
    ("llama-2-7b", 8192, 1, "flash"),
    ("llama-2-7b", 131072, 8, "flash"),
    ("gpt3-175b", 2048, 8, "unfused"),
    ("mixtral-8x7b", 4096, 1, "flash"),
)
KINDS = ((False, 0.0), (True, 0.0), (False, 20e9), (True, 20e9))
PARTS = (0.9, 0.7, 0.5, 0.35, 0.25)


def main() -> None:
    """Print one line per model and set of choices: seconds, and the largest gap left."""
    cluster = resolve_gpus("8xA100-80GB").cluster
    print(f"{'model':14} {'fp8':>5} {'offload':>7} {'points':>6} {'frontier':>9} "
          f"{'median':>8} {'worst':>8} {'gap':>7}")  # fmt: skip
    for name, seq, tp, attention in CASES:
        layers = first_stage(
            load_model(name), cluster, Mesh(tp=tp, dp_replicate=8 // tp), seq_tokens=seq,
            attention=attention,
        )  # fmt: skip
        keep = Problem(layers=layers, limits=Limits(device_bytes=0)).keep_all_bytes
        for compress, rate in KINDS:
            walls, gaps = [], []
            for part in PARTS:
                limits = Limits(device_bytes=part * keep, compress=compress, copy_bytes_per_s=rate)
                started = perf_counter()
                found = solve(Problem(layers=layers, limits=limits), time_limit_s=20)
                walls.append(perf_counter() - started)
                gaps.append(found.gap)
            median = statistics.median(walls)
            started = perf_counter()
            points = len(frontier(layers[0], limits).bytes)
            frontier_s = perf_counter() - started
            print(f"{name:14} {compress!s:>5} {rate > 0!s:>7} {points:6} {frontier_s:8.4f}s "
                  f"{median:7.3f}s {max(walls):7.3f}s {max(gaps):7.2%}")  # fmt: skip


if __name__ == "__main__":
    main()
