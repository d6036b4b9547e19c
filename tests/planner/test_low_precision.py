"""Bounds of layouts whose layers may work and store in 8 bits, under every optimiser."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.catalogs import load_cluster, load_model
from forerun.costmodel import bound_layouts, estimate
from forerun.costmodel.options import Options
from forerun.costmodel.techniques.precision import BY_SHAPE
from forerun.planner import Pins
from forerun.planner.grid_plans import plan_at
from forerun.planner.space import enumerate_grid
from forerun.workload import Optimizer, Workload

WORK = Workload(seq_tokens=4096, global_batch_seqs=32)
CLUSTERS = {name: load_cluster(name) for name in ("8xH100", "4xH100+4xH200")}
LLAMA = load_model("llama-3.1-8b")
WIDE, NARROW = (msgspec.structs.replace(LLAMA.layers[0], ffn_hidden=f) for f in (14336, 2048))
MODELS = {
    "alike": msgspec.structs.replace(LLAMA, layers=(msgspec.structs.replace(WIDE, repeat=4),)),
    "unlike": msgspec.structs.replace(
        LLAMA,
        layers=tuple(msgspec.structs.replace(layer, repeat=2) for layer in (NARROW, WIDE)),
    ),
    "tied": msgspec.structs.replace(
        load_model("llama-3.2-1b"),
        layers=(msgspec.structs.replace(load_model("llama-3.2-1b").layers[0], repeat=4),),
    ),
}
SIZES = {2: (1, 3), 4: (1, 1, 1, 1)}
"""Layers of each stage of a cut that is not the most even, where there is one."""
BASES = (
    Options(compute="bf16"),
    Options(compute="fp8", recipe="coat", linears=BY_SHAPE),
    Options(compute="fp8", recipe="rowwise", linears=BY_SHAPE),
)
INSTANCES: dict[str, Any] = {
    "model": st.sampled_from(sorted(MODELS)),
    "gpus": st.sampled_from(sorted(CLUSTERS)),
    "base": st.sampled_from(BASES),
    "optimizer": st.sampled_from(get_args(Optimizer)),
    "which": st.lists(st.integers(0, 3), min_size=4, max_size=4),
    "stages": st.sampled_from(["even", "free"]),
    "share": st.sampled_from([0.2, 0.4, 1.0]),
    "seed": st.integers(0, 2**16),
}


@pytest.fixture(autouse=True)
def no_user_profile(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("FORERUN_DATA", str(tmp_path))


@settings(max_examples=5)
@given(**INSTANCES)
def test_bounds_hold_for_whatever_layers_store(**instance: Any) -> None:
    check_bounds(**instance)


@pytest.mark.slow
@settings(max_examples=300)
@given(**INSTANCES)
def test_bounds_hold_on_hundreds_of_instances(**instance: Any) -> None:
    check_bounds(**instance)


def check_bounds(
    model: str, gpus: str, base: Options, optimizer: Optimizer, which: list[int], stages: Any,
    share: float, seed: int,
) -> None:  # fmt: skip
    decoder, cluster = MODELS[model], CLUSTERS[gpus]
    base = replace(base, optimizer=optimizer)
    kept = [base, replace(base, recompute="full"), replace(base, offload=0.5)]
    if base.recipe != "rowwise":
        kept.append(replace(base, activations="fp8"))
    work = msgspec.structs.replace(WORK, optimizer=optimizer)
    every = enumerate_grid(decoder, cluster, work, Pins(cp=1))
    grid = every.take(np.random.default_rng(seed).integers(0, len(every), 3))
    capacity = [share * pool.device.memory_bytes for pool in cluster.pools]
    bounds = bound_layouts(decoder, cluster, work, grid, kept, capacity, np.inf, stages)
    for row in range(len(grid)):
        layers = [kept[k % len(kept)] for k in which]
        sizes = SIZES.get(int(grid.pp[row])) if stages == "free" and grid.vpp[row] == 1 else None
        cost = estimate(plan_at(decoder, cluster, work, grid, row, layers, sizes))
        peak = cost.peak_memory_bytes.median
        full = peak / cost.capacity_bytes * cluster.pools[0].device.memory_bytes
        assert bounds.memory_bytes[row] <= full * (1 + 1e-9)
        if peak <= share * cost.capacity_bytes:
            assert bounds.time_s[row] <= cost.step_s.median * (1 + 1e-9)
