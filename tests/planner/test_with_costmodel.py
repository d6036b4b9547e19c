"""The search over the real cost model: equal to simulating everything, and proven at scale."""

from __future__ import annotations

import numpy as np
import pytest

from forerun.catalogs import load_cluster, load_model
from forerun.planner import Pins, search
from forerun.planner.candidates import OwnCost, Request, bound_all, nearest_to_fit
from forerun.workload import Workload


@pytest.fixture(autouse=True)
def no_user_profile(monkeypatch, tmp_path):
    monkeypatch.setenv("FORERUN_DATA", str(tmp_path))


@pytest.mark.parametrize(
    ("model", "gpus", "seq_tokens", "batch"),
    [
        ("tiny-1m", "2xcpu", 128, 4),
        pytest.param("llama-3.1-8b", "4xH100", 4096, 2, marks=pytest.mark.slow),
    ],
)
def test_best_of_all_simulated(model: str, gpus: str, seq_tokens: int, batch: int):
    workload = Workload(seq_tokens=seq_tokens, global_batch_seqs=batch)
    noun, cluster = load_model(model), load_cluster(gpus)
    candidates = bound_all(Request(noun, cluster, workload, Pins(), OwnCost()))
    estimates = [candidates.simulate(index).estimate for index in range(len(candidates))]
    steps = [estimate.step_s.median for estimate in estimates if candidates.fits(estimate)]
    result = search(noun, cluster, workload, tolerance=0.0)
    assert result.stats.proven and result.stats.bounded == candidates.evaluated
    assert result.plans[0].estimate.step_s.median == pytest.approx(min(steps), rel=1e-9)
    for estimate, time_s, peak in zip(
        estimates, candidates.time_s, candidates.memory_bytes, strict=True
    ):
        assert time_s <= estimate.step_s.median * (1 + 1e-9)
        assert min(peak, candidates.capacity_bytes) <= estimate.peak_memory_bytes.median * (
            1 + 1e-9
        )


@pytest.mark.slow
def test_sixteen_thousand_gpus_are_planned_with_a_proof():
    workload = Workload(seq_tokens=8192, global_batch_seqs=2048)
    model, cluster = load_model("llama-3.1-405b"), load_cluster("2048x8xH100")
    result = search(model, cluster, workload)
    assert result.stats.gap is not None and result.stats.gap <= 0.01
    best = result.plans[0]
    best.plan.check()
    assert best.estimate.fits != "no" and best.plan.phase.mesh.world == 16384


def test_the_proposed_change_leads_to_a_plan():
    workload = Workload(seq_tokens=4096, global_batch_seqs=16)
    model = load_model("llama-3.1-70b")
    result = search(model, load_cluster("8xH100"), workload)
    assert result.infeasible is not None and "short by" in result.infeasible.reason
    spelled = result.infeasible.smallest_change.removeprefix("--gpus ").split(" (")[0]
    assert spelled.startswith("4x8xH100")  # two nodes would do by the median
    assert search(model, load_cluster(spelled), workload, keep=1).plans


def test_a_first_guess_changes_no_answer(monkeypatch: pytest.MonkeyPatch):
    """Pruned by a first guess or bounded as a whole: the same plans; a plan known to fit is the
    nearest one, whatever was pruned."""
    workload = Workload(seq_tokens=8192, global_batch_seqs=64)
    model, cluster = load_model("llama-3.1-70b"), load_cluster("8x8xH100")
    whole = search(model, cluster, workload, tolerance=0.0, keep=3)
    monkeypatch.setattr("forerun.planner.candidates.SMALL_GRID", 0)
    guessed = search(model, cluster, workload, tolerance=0.0, keep=3)
    assert [plan.label for plan in guessed.plans] == [plan.label for plan in whole.plans]
    assert guessed.stats.proven and guessed.stats.bounded <= whole.stats.bounded
    candidates = bound_all(Request(model, cluster, workload, Pins(), OwnCost()))
    assert np.any(candidates.memory_bytes == 0)  # pruned before its memory was bounded
    nearest = nearest_to_fit(candidates, [])
    assert nearest is not None and candidates.fits(nearest.estimate)
