"""What layers keep: the relaxed bound is below every plan, the choice is the best of all."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from forerun.catalogs import load_cluster, load_model
from forerun.costmodel.fleet import Fleet
from forerun.costmodel.mixed import Mixed
from forerun.planner import Pins, search
from forerun.planner.candidates import Candidates, OwnCost, Request, bound_all
from forerun.planner.mixing import choose_layers
from forerun.workload import Workload


@pytest.fixture(autouse=True)
def no_user_profile(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("FORERUN_DATA", str(tmp_path))


def candidates_of(
    model: str, gpus: str, seq_tokens: int, batch: int, pins: Pins | None = None
) -> Candidates:
    workload = Workload(seq_tokens=seq_tokens, global_batch_seqs=batch)
    request = Request(load_model(model), load_cluster(gpus), workload, pins or Pins(), OwnCost())
    return bound_all(request)


@pytest.mark.parametrize(
    ("model", "gpus", "seq_tokens", "batch"),
    [
        ("llama-3.1-8b", "8xH100", 8192, 32),
        ("llama-3.1-70b", "8x8xH100", 8192, 64),
        ("mixtral-8x7b", "4x8xA100-80GB", 4096, 64),
        pytest.param("deepseek-v3", "32x8xH100", 4096, 512, marks=pytest.mark.slow),
    ],
)
def test_no_plan_is_faster_than_its_bound(
    model: str, gpus: str, seq_tokens: int, batch: int
) -> None:
    candidates = candidates_of(model, gpus, seq_tokens, batch)
    mixed = 0
    for index in random.Random(5).sample([int(i) for i in candidates.in_order()], 25):
        ranked = candidates.simulate(index)
        if ranked.estimate.peak_memory_bytes.median > candidates.capacity_bytes * (1 + 1e-9):
            continue
        assert candidates.time_s[index] <= ranked.estimate.step_s.median * (1 + 1e-9), ranked.label
        mixed += "solved" in ranked.label
    assert mixed >= 2


def test_the_choice_is_the_best_of_all_mixtures_of_a_rank() -> None:
    """All ways to give 4 layers one of 4 policies, on a device in which some do not fit."""
    pins = Pins(tp=1, pp=8, cp=1, micro_batch=1, schedule="1f1b", zero=0)
    candidates = candidates_of("llama-2-7b", "8xA100-80GB", 16384, 16, pins)
    (index,) = range(len(candidates))
    row = candidates.grid.take(slice(index, index + 1))
    request, (policies,) = candidates.request, candidates.policies

    def fleet_of(capacity_bytes: float) -> Fleet:
        return Fleet.of(
            request.model, request.cluster, request.workload, row, policies, [capacity_bytes]
        )

    mixed = Mixed.of(fleet_of(1.0).grids[0])
    every = [c for c in product(range(5), repeat=len(policies)) if sum(c) == 4]
    counts = np.array(every, dtype=float)[:, :, None]
    first = np.zeros(len(every), dtype=np.intp)
    peaks, seconds = mixed.peaks(counts, first), mixed.seconds(counts, first)
    for share in (0.35, 0.5, 0.75, 1.0):
        capacity = share * peaks.max()
        fitting = peaks <= capacity
        chosen = choose_layers(fleet_of(capacity), "throughput")[:4]
        found = np.array([[chosen.count(policy) for policy in policies]], dtype=float)[:, :, None]
        if fitting.any():
            assert mixed.peaks(found, first[:1])[0] <= capacity
            best = seconds[fitting].min()
            assert mixed.seconds(found, first[:1])[0] == pytest.approx(best, rel=0.02)


def test_nothing_is_dropped_where_everything_fits() -> None:
    workload = Workload(seq_tokens=2048, global_batch_seqs=8)
    result = search(load_model("llama-3.2-1b"), load_cluster("8xH100"), workload, keep=1)
    assert "ac-" not in result.plans[0].label and "offload" not in result.plans[0].label


def test_plans_fit_for_certain_unless_told() -> None:
    model, cluster = load_model("llama-3.1-8b"), load_cluster("8xH100")
    workload = Workload(seq_tokens=8192, global_batch_seqs=64)
    sure = search(model, cluster, workload).plans[0].estimate
    likely = search(model, cluster, workload, fit="marginal").plans[0].estimate
    assert sure.fits == "yes" and sure.fit_probability >= 0.95
    assert likely.step_s.median <= sure.step_s.median
    assert likely.peak_memory_bytes.median <= likely.capacity_bytes
