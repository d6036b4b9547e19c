"""Compute dtypes and optimisers as axes: what is allowed, what is chosen, against brute force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest

from forerun.catalogs import load_cluster, load_model
from forerun.cluster import Cluster
from forerun.costmodel import bound_layouts
from forerun.costmodel.layout import Layouts
from forerun.plan import Plan
from forerun.planner import Pins, risks, search
from forerun.planner.quality import classes_up_to
from forerun.planner.space import base_options, enumerate_grid
from forerun.planner.variants import RISK_WORTH, dtypes_of, ways
from forerun.workload import Workload

from .conftest import RandomCost, make_cluster, make_model

PUBLISHED = classes_up_to(["published"])
LLAMA = load_model("llama-2-7b")
WORK = Workload(seq_tokens=4096, global_batch_seqs=64)


@pytest.fixture(autouse=True)
def no_user_profile(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("FORERUN_DATA", str(tmp_path))


def allowing(*classes: str, **more: Any) -> Workload:
    return msgspec.structs.replace(WORK, quality=classes_up_to(classes), **more)


def chosen(model: Any, gpus: str, workload: Workload, **pins: Any) -> set[tuple[Any, ...]]:
    """(compute dtype, scaling, optimiser) of every way."""
    found = ways(model, load_cluster(gpus), workload, Pins(**pins))
    return {(way.pins.precision, way.pins.recipe, way.workload.optimizer) for way in found}


def test_the_default_class_leaves_what_there_was() -> None:
    assert chosen(LLAMA, "8xH100", WORK) == {(None, None, "adamw")}


def test_classes_open_dtypes_and_optimisers_of_their_evidence() -> None:
    published = chosen(LLAMA, "2x8xH100", allowing("published"))
    assert {p for p, _, _ in published} == {None, "fp8"}  # Hopper has no scales per block
    assert {o for _, _, o in published} == {"adamw", "adamw8bit", "adamw4bit", "adamw_fp8"}
    everything = chosen(LLAMA, "2x8xB200", allowing("unquantified"))
    assert {p for p, _, _ in everything} == {None, "fp8", "mxfp8", "nvfp4"}
    assert {o for _, _, o in everything} - {o for _, _, o in published} == {"adamw_fp8_block"}
    by_name = msgspec.structs.replace(WORK, accepted=("adamw-fp8",))
    assert chosen(LLAMA, "8xH100", by_name) == {(None, None, "adamw"), (None, None, "adamw_fp8")}


@pytest.mark.parametrize(
    ("gpus", "pins", "workload", "dtypes", "optimizers"),
    [
        ("8xA100-80GB", {}, {}, {None}, 4),  # without fp8 matmuls
        ("2xcpu", {}, {}, {None}, 4),  # which emulate them, and update in any optimiser
        ("8xH100", {"precision": "bf16"}, {}, {"bf16"}, 4),
        ("8xH100", {"optimizer": "adamw"}, {}, {None, "fp8"}, 1),
        ("8xH100", {}, {"optimizer": "sgd"}, {None, "fp8"}, 1),
        ("2x8xH100", {"offload_states": "optimizer"}, {}, {None, "fp8"}, 1),
        ("8xH100", {"runtime": "compiled", "run_only": True}, {}, {None}, 4),
        ("8xH100", {"offload": 0.5, "run_only": True}, {}, {None}, 4),
        ("8xH100", {"schedule": "zb-v", "run_only": True}, {}, {None}, 4),
    ],
)
def test_pins_devices_and_executors_bound_the_choice(
    gpus: str, pins: dict[str, Any], workload: dict[str, Any], dtypes: set[str], optimizers: int
) -> None:
    found = chosen(LLAMA, gpus, allowing("published", **workload), **pins)
    assert {p for p, _, _ in found} == dtypes
    assert len({o for _, _, o in found}) == optimizers


def test_what_runs_here_has_no_experts_in_8_bits() -> None:
    mixture = load_model("mixtral-8x7b")
    run = chosen(mixture, "8xH100", allowing("published"), run_only=True)
    assert run == {(None, None, "adamw")}
    assert len(chosen(mixture, "8xH100", allowing("published"))) > 4


def test_scales_per_row_are_never_faster() -> None:
    """So that leaving them to pins loses nothing."""
    cluster = load_cluster("8xH100")
    of: dict[str, Any] = {}
    for recipe in ("tensorwise", "coat", "rowwise"):
        pins = Pins(precision="fp8", recipe=recipe)
        grid = enumerate_grid(LLAMA, cluster, WORK, pins)
        own = base_options(cluster.pools, WORK, pins)
        of[recipe] = bound_layouts(LLAMA, cluster, WORK, grid, own)
    for recipe in ("tensorwise", "coat"):
        assert np.all(of[recipe].time_s <= of["rowwise"].time_s * (1 + 1e-12))
        assert np.all(of[recipe].memory_bytes <= of["rowwise"].memory_bytes * (1 + 1e-12))


def test_the_report_says_what_was_chosen_at_what_risk() -> None:
    model, cluster = load_model("llama-3.1-8b"), load_cluster("8xH100")
    published = allowing("published")
    few = Pins(tp=1, pp=1, cp=1, zero=3)
    exact = search(model, cluster, WORK, few, keep=1).plans[0]
    result = search(model, cluster, published, few, keep=1)
    best = result.plans[0]
    assert best.estimate.step_s.median < 0.95 * exact.estimate.step_s.median
    found = {risk.technique for risk in risks(best.plan)}
    assert "low-precision" in found
    assert {one["technique"] for one in result.document()["plans"][0]["quality"]} == found
    optimizer = best.plan.workload.optimizer
    assert optimizer == "adamw" or optimizer.replace("_", "-") in found
    pinned = msgspec.structs.replace(few, **dtypes_of(best.plan))
    assert search(model, cluster, published, pinned, keep=1).plans[0].label == best.label
    wide = msgspec.structs.replace(few, precision="bf16", optimizer="adamw")
    assert search(model, cluster, published, wide).plans[0].plan.phase.compute_dtype == "bf16"


@dataclass(frozen=True)
class CostOfDtypes(RandomCost):
    """Random costs that differ by compute dtype and optimiser."""

    close: bool = False
    """Whether they differ by less than a technique must gain."""

    def _factor(self, compute: str, optimizer: str) -> float:
        draw = np.random.default_rng([self.seed, *compute.encode(), *optimizer.encode()]).random()
        return 1.0 - (0.9 * RISK_WORTH if self.close else 0.3) * float(draw)

    def bound_layouts(self, model: Any, cluster: Any, workload: Workload, layouts: Layouts,
                      options: Any, *more: Any) -> Any:  # fmt: skip
        """Scaled."""
        found = RandomCost.bound_layouts(self, model, cluster, workload, layouts, options, *more)
        factor = self._factor(options[0].compute, workload.optimizer)
        return scaled(found, factor)

    def estimate(self, plan: Plan) -> Any:
        """Scaled."""
        found = RandomCost.estimate(self, plan)
        factor = self._factor(plan.phase.compute_dtype, plan.workload.optimizer)
        step = msgspec.structs.replace(found.step_s, median=found.step_s.median * factor)
        return msgspec.structs.replace(found, step_s=step)


def scaled(bounds: Any, factor: float) -> Any:
    return type(bounds)(bounds.time_s * factor, bounds.memory_bytes, bounds.capacity_bytes)


def fp8_cluster() -> Cluster:
    cluster = make_cluster(2)
    (pool,) = cluster.pools
    peaks = {**pool.device.peak_flops_per_s, "fp8": 2e14}
    device = msgspec.structs.replace(pool.device, peak_flops_per_s=peaks, capability=(9, 0))
    return msgspec.structs.replace(cluster, pools=(msgspec.structs.replace(pool, device=device),))


@pytest.mark.parametrize("close", [False, True])
def test_equals_brute_force_over_dtypes_and_optimisers(close: bool) -> None:
    """Each way searched alone; the best of them, where its techniques gain enough."""
    model, cluster = make_model(), fp8_cluster()
    workload = Workload(seq_tokens=64, global_batch_seqs=4, quality=PUBLISHED)
    for seed in range(5):
        cost: Any = CostOfDtypes(seed=seed, capacity_bytes=[60, 400, 900][seed % 3], close=close)
        alone: list[float] = []
        for way in ways(model, cluster, workload, Pins()):
            pins = msgspec.structs.replace(way.pins, optimizer=way.workload.optimizer)
            if pins.precision is None:
                pins = msgspec.structs.replace(pins, precision="bf16")
            found = search(model, cluster, workload, pins, keep=1, tolerance=0.0, cost=cost)
            if found.plans:
                alone.append(found.plans[0].estimate.step_s.median * way.handicap)
        result = search(model, cluster, workload, keep=2, tolerance=0.0, cost=cost)
        assert bool(result.plans) == bool(alone)
        if not alone:
            continue
        best = result.plans[0]
        num_risks = (best.plan.phase.compute_dtype != "bf16") + (
            best.plan.workload.optimizer != "adamw"
        )
        assert best.estimate.step_s.median * (1 + RISK_WORTH) ** num_risks == pytest.approx(
            min(alone), rel=1e-12
        )
        assert result.stats.proven
        assert not (close and num_risks)
