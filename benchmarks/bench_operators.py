"""Operators at sizes that the profile does not hold: predicted from it against measured.

    forerun profile
    python benchmarks/bench_operators.py [--device cuda] [--json FILE]

Sizes are those of real layers, away from the profile's grid. Prints a Markdown table: per operator
and dtype the number of sizes, and median and worst error of forward and backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import product
from pathlib import Path

import numpy as np

from forerun.catalogs import load_cluster, load_user_profile
from forerun.cluster import OperatorCurve
from forerun.costmodel.prices import Prices
from forerun.executors.profiling.runner import Request, run_request

CUDA_LAYERS = ((3072, 3072), (1024, 3072), (8192, 3072), (3072, 8192), (2048, 8192), (4864, 896),
               (11008, 4096), (128256, 2048), (151936, 896))  # fmt: skip
"""(out, in) of linears: Llama 3B and 1B, Qwen 0.5B, Llama 2 7B, two heads."""
CUDA_GRID = {
    "linear": [(m, n, k) for m, (n, k) in product((1536, 6144, 12288), CUDA_LAYERS)],
    "linear_wgrad": [(m, n, k) for m, (n, k) in product((1536, 6144, 12288), CUDA_LAYERS)],
    "attention": [
        (24, 3072, 128), (24, 6144, 128), (32, 12288, 64), (14, 2560, 64), (8, 24576, 128),
    ],
    "rmsnorm": [(1536, 3072), (6144, 3072), (12288, 2048), (24576, 896)],
    "swiglu": [(m * 8192,) for m in (384, 1536, 6144, 12288)],
    "rope": [(m * 3072,) for m in (384, 1536, 6144, 12288)],
    "cross_entropy": [(1536, 128256), (3072, 151936)],
    "embedding": [(3072, 3072, 128256), (6144, 896, 151936)],
}  # fmt: skip
CPU_LAYERS = ((96, 96), (192, 96), (320, 160), (160, 448), (384, 384), (640, 256))
CPU_GRID = {
    "linear": [(m, n, k) for m, (n, k) in product((384, 1536), CPU_LAYERS)],
    "linear_wgrad": [(m, n, k) for m, (n, k) in product((384, 1536), CPU_LAYERS)],
    "attention": [(12, 96, 32), (24, 192, 32), (8, 384, 64)],
    "rmsnorm": [(384, 96), (1536, 192), (1536, 640)],
    "swiglu": [(3 * 2**count,) for count in (11, 14, 17, 19)],
    "rope": [(3 * 2**count,) for count in (11, 14, 17, 19)],
    "cross_entropy": [(96, 256), (1536, 256)],
}


def errors(curve: OperatorCurve, prices: Prices) -> dict[str, list[float]]:
    """Relative errors of an operator's forward and backward at the sizes of a measured curve."""
    columns = [np.array([size[i] for size in curve.sizes]) for i in range(len(curve.axes))]
    forward, backward = prices.operator(curve.operator, columns, curve.dtype)
    found = {"forward": list(forward / np.array(curve.forward_s) - 1)}
    if curve.backward_s:
        found["backward"] = list(backward / np.array(curve.backward_s) - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gpus", default="1xH200", help="the cluster whose profile is checked")
    parser.add_argument("--json", type=Path, help="write all errors here")
    options = parser.parse_args()
    on_cuda = options.device == "cuda"
    cluster = load_cluster(options.gpus if on_cuda else "1xcpu")
    pool = cluster.pools[0]
    profile = load_user_profile(pool.device.name)
    if profile is None:
        raise SystemExit(f"no profile of {pool.device.name}: run forerun profile first")
    grid = {name: tuple(sizes) for name, sizes in (CUDA_GRID if on_cuda else CPU_GRID).items()}
    dtypes = ("bf16",) if on_cuda else ("fp32",)
    request = Request(device=options.device, quick=False, grid=grid, busy=(1,), dtypes=dtypes,
                      collectives=False, host=False)  # fmt: skip
    measured = run_request(request)
    prices = Prices(pool, profile)
    print("| operator | dtype | sizes | forward median | worst | backward median | worst |")
    print("|---|---|---|---|---|---|---|")
    kept: dict[str, dict[str, list[float]]] = {}
    every: list[float] = []
    for curve in measured.operators:
        found = kept[f"{curve.operator} {curve.dtype}"] = errors(curve, prices)
        cells = []
        for way in ("forward", "backward"):
            sizes = [abs(error) for error in found.get(way, [])]
            every += sizes
            cells += [f"{statistics.median(sizes):.1%}", f"{max(sizes):.1%}"] if sizes else ["", ""]
        print(f"| {curve.operator} | {curve.dtype} | {len(curve.sizes)} | {' | '.join(cells)} |")
    print(f"\nAll {len(every)}: median {statistics.median(every):.1%}, worst {max(every):.1%}.")
    if options.json is not None:
        options.json.write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
