"""The search against brute force, and what it promises about its answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.cluster import Cluster
from forerun.costmodel.layout import Layouts
from forerun.document import to_json
from forerun.errors import InputError
from forerun.mesh import Mesh
from forerun.model import Model
from forerun.plan import Phase, Plan, even_stages
from forerun.planner import Pins, search, why
from forerun.schedules import LOOPED_SCHEDULES, SCHEDULES, V_SCHEDULES
from forerun.workload import Workload


def workload_of(global_batch_seqs: int, objective: str = "throughput") -> Workload:
    return Workload(
        seq_tokens=64, global_batch_seqs=global_batch_seqs, objective=objective  # type: ignore[arg-type]
    )  # fmt: skip


def all_plans(model: Model, cluster: Cluster, workload: Workload) -> Iterator[Plan]:
    """Every plan that `Plan.check` accepts, by plain loops over all degrees (tp within a node)."""
    world, layers = cluster.num_devices, model.num_layers
    degrees = [n for n in range(1, world + 1) if world % n == 0]
    node = cluster.pools[0].devices_per_node
    for tp, pp, shard in product([n for n in degrees if node % n == 0], degrees, degrees):
        replicas, rest = divmod(world, tp * pp * shard)
        if rest or not replicas:
            continue
        for sp, zero, schedule, micro in product(
            (False, True), range(4), SCHEDULES, range(1, workload.global_batch_seqs + 1)
        ):
            count, rest = divmod(workload.global_batch_seqs, replicas * shard * micro)
            if rest or not count or (zero and shard == 1) or (pp == 1 and schedule != "1f1b"):
                continue
            chunked = schedule in (*LOOPED_SCHEDULES, *V_SCHEDULES)
            for vpp in range(1, (layers // pp if chunked else 1) + 1):
                mesh = Mesh(dp_replicate=replicas, dp_shard=shard, tp=tp, pp=pp, vpp=vpp)
                phase = Phase(
                    steps=1, seq_tokens=workload.seq_tokens, micro_batch_seqs=micro,
                    num_microbatches=count, mesh=mesh, zero=zero,  # type: ignore[arg-type]
                    sequence_parallel=sp, schedule=schedule,  # type: ignore[arg-type]
                    stages=even_stages(layers, min(mesh.num_stages, layers), "pool"),
                )  # fmt: skip
                plan = Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))
                try:
                    plan.check()
                except InputError:
                    continue
                yield plan


def join(plans: list[Plan]) -> Layouts:
    rows = [Layouts.of(plan.phase) for plan in plans]
    return Layouts(
        **{
            name: np.concatenate([getattr(row, name) for row in rows])
            for name in Layouts.__dataclass_fields__
        }
    )


def brute_force(cost: Any, layouts: Layouts, objective: str) -> float | None:
    """The best value over all layouts and recompute modes that fit."""
    best: list[float] = []
    for recompute in ("none", "full"):  # selective gains nothing with a flash kernel
        time_s, memory_bytes = cost.exact(layouts, recompute)
        value = memory_bytes if objective == "memory" else time_s
        best += [float(v) for v in value[memory_bytes <= cost.capacity_bytes]]
    return min(best, default=None)


SHAPES = [(2, 1, 2, 4), (4, 1, 6, 4), (4, 2, 4, 8), (2, 2, 5, 6), (3, 2, 4, 12), (8, 1, 3, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_brute_force(shape: tuple[int, int, int, int], random_cost, cluster_of, model_of):
    per_node, nodes, num_layers, batch = shape
    model, cluster = model_of(layers=num_layers), cluster_of(per_node, nodes)
    layouts = join(list(all_plans(model, cluster, workload_of(batch))))
    for seed in range(40):
        capacity = random.Random(seed).choice([2, 20, 200, 900])
        cost = random_cost(seed=seed, capacity_bytes=capacity)
        objective = "memory" if seed % 5 == 0 else "throughput"
        workload = workload_of(batch, objective)
        expected = brute_force(cost, layouts, objective)
        result = search(model, cluster, workload, keep=3, tolerance=0.0, cost=cost)
        if expected is None:
            assert result.plans == () and result.infeasible is not None
            continue
        best = result.plans[0].estimate
        found = best.peak_memory_bytes if objective == "memory" else best.step_s
        assert found.median == expected
        assert result.stats.proven and result.stats.gap == 0 and result.stats.limit is None
        assert all(ranked.estimate.fits != "no" for ranked in result.plans)


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (3, 1, 4, 6)])
def test_equals_brute_force_over_every_cut(
    shape: tuple[int, int, int, int], random_cost, cluster_of, model_of
):
    per_node, nodes, num_layers, batch = shape
    model, cluster = model_of(layers=num_layers), cluster_of(per_node, nodes)
    plans = list(all_plans(model, cluster, workload_of(batch)))
    for seed in range(12):
        cost = random_cost(seed=seed, capacity_bytes=[20, 200, 900][seed % 3], cuts=True)
        objective = "memory" if seed % 5 == 0 else "throughput"
        values: list[float] = []
        for plan in plans:
            for cut in cost.every_cut(num_layers, len(plan.phase.stages)):
                for recompute in ("none", "full"):
                    (time_s,), (peak,) = cost.of_cut(Layouts.of(plan.phase), recompute, cut)
                    if peak <= cost.capacity_bytes:
                        values.append(float(peak if objective == "memory" else time_s))
        workload = workload_of(batch, objective)
        result = search(model, cluster, workload, keep=2, tolerance=0.0, cost=cost)
        if not values:
            assert result.plans == ()
            continue
        best = result.plans[0].estimate
        found = best.peak_memory_bytes if objective == "memory" else best.step_s
        assert found.median == min(values) and result.stats.proven
        even = search(model, cluster, workload, Pins(stages="even"), keep=2, cost=cost)
        if even.plans and objective == "throughput":
            assert min(values) <= even.plans[0].estimate.step_s.median


def test_prunes_with_tight_bounds(random_cost, cluster_of, model_of):
    model, cluster, workload = model_of(layers=8), cluster_of(8, 2), workload_of(32)
    result = search(
        model, cluster, workload, cost=random_cost(seed=1, slack=0.01), tolerance=0.0
    )  # fmt: skip
    assert result.stats.proven
    assert result.stats.simulated < result.stats.bounded / 10


def test_same_request_same_bytes(random_cost, cluster_of, model_of):
    documents = []
    for _ in range(2):
        result = search(
            model_of(),
            cluster_of(8),
            workload_of(16),
            cost=random_cost(seed=3),
            clock=lambda: 0.0,
        )
        documents.append(to_json(result.document()))
    assert documents[0] == documents[1]


def test_document_has_the_fields_of_the_contract(random_cost, cluster_of, model_of):
    document = search(
        model_of(), cluster_of(4), workload_of(8), cost=random_cost(seed=2)
    ).document()  # fmt: skip
    assert set(document) == {"plans", "search", "infeasible"}
    assert {"label", "plan", "estimate"} <= set(document["plans"][0])
    assert set(document["search"]) == {
        "bounded", "solved", "simulated", "gap", "proven", "limit", "seconds"
    }  # fmt: skip
    assert document["infeasible"] is None


def test_runners_up_are_other_layouts_in_order_and_say_why(random_cost, cluster_of, model_of):
    result = search(model_of(), cluster_of(8), workload_of(16), keep=5, cost=random_cost(seed=5))
    times = [ranked.estimate.step_s.median for ranked in result.plans]
    assert len(result.plans) == 5 and times == sorted(times)
    assert len({ranked.label for ranked in result.plans}) == 5
    assert result.plans[0].lost == ""
    growth_s = times[1] - times[0]
    lost = result.plans[1].lost
    assert lost.startswith(f"{100 * growth_s / times[0]:+.1f} % step: bubble +")


def test_time_limit_is_said_with_its_gap(random_cost, cluster_of, model_of):
    ticks = iter(range(10_000))
    result = search(
        model_of(), cluster_of(8), workload_of(16), time_limit_s=7.0, tolerance=0.0,
        cost=random_cost(seed=5, capacity_bytes=2000), clock=lambda: float(next(ticks)),
    )  # fmt: skip
    assert result.stats.limit == "time" and not result.stats.proven
    assert result.stats.simulated == 6
    assert result.stats.gap is not None and result.stats.gap > 0
    assert any("time limit" in line for line in why(result))


def test_gap_covers_the_true_optimum(random_cost, cluster_of, model_of):
    model, cluster, workload = model_of(), cluster_of(4), workload_of(8)
    for seed in range(20):
        cost = random_cost(seed=seed)
        exact = search(model, cluster, workload, tolerance=0.0, cost=cost)
        loose = search(model, cluster, workload, tolerance=0.2, keep=1, cost=cost)
        best_s = exact.plans[0].estimate.step_s.median
        assert loose.stats.gap is not None and loose.stats.gap <= 0.2
        assert loose.plans[0].estimate.step_s.median <= best_s * (1 + loose.stats.gap) + 1e-12
        assert loose.stats.proven == (loose.stats.limit is None)


def test_why_names_the_layout_that_memory_ruled_out(random_cost, cluster_of, model_of):
    model, cluster, workload = model_of(), cluster_of(8), workload_of(16)
    tight = search(model, cluster, workload, cost=random_cost(seed=4, capacity_bytes=30))
    assert tight.ruled_out is not None and tight.ruled_out.memory_bytes > 30
    assert tight.ruled_out.step_s < tight.plans[0].estimate.step_s.median
    assert why(tight)[0].startswith("Memory binds: ")
    roomy = search(model, cluster, workload, cost=random_cost(seed=4, capacity_bytes=2000))
    assert roomy.ruled_out is None and why(roomy)[0].startswith("Time binds: ")


PIN_VALUES: dict[str, list[Any]] = {
    "tp": [1, 2, 4], "sp": [False, True], "pp": [1, 2, 4], "vpp": [1, 2],
    "schedule": list(SCHEDULES), "dp": [1, 2, 4, 8], "dp_shard": [1, 2, 4], "zero": [0, 1, 2, 3],
    "micro_batch": [1, 2, 4], "recompute": ["none", "full"], "precision": ["fp32", "bf16"],
}  # fmt: skip
PINS = st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in PIN_VALUES.items()})


def axis(plan: Plan, name: str) -> Any:
    phase = plan.phase
    return {
        "tp": phase.mesh.tp, "sp": phase.sequence_parallel, "pp": phase.mesh.pp,
        "vpp": phase.mesh.vpp, "schedule": phase.schedule, "dp": phase.mesh.dp,
        "dp_shard": phase.mesh.dp_shard, "zero": phase.zero,
        "micro_batch": phase.micro_batch_seqs, "recompute": phase.recompute,
        "precision": phase.compute_dtype,
    }[name]  # fmt: skip


@settings(max_examples=50)
@given(pins=PINS, seed=st.integers(0, 1000))
def test_pins_are_honoured_and_freeing_one_never_hurts(
    pins: dict[str, Any], seed: int, random_cost, cluster_of, model_of
):
    model, cluster, workload = model_of(), cluster_of(4, 2), workload_of(16)

    def best_s(some: dict[str, Any]) -> float:
        result = search(
            model, cluster, workload, Pins(**some), keep=2, tolerance=0.0,
            cost=random_cost(seed=seed),
        )  # fmt: skip
        for ranked in result.plans:
            ranked.plan.check()
            assert {name: axis(ranked.plan, name) for name in some} == some
        return result.plans[0].estimate.step_s.median if result.plans else np.inf

    try:
        pinned_s = best_s(pins)
    except InputError:
        return
    for name in pins:
        assert best_s({k: v for k, v in pins.items() if k != name}) <= pinned_s


def test_a_pinned_degree_may_leave_the_node(random_cost, cluster_of, model_of):
    model, cluster, workload = model_of(heads=8, kv_heads=8), cluster_of(4, 2), workload_of(8)
    result = search(model, cluster, workload, Pins(tp=8), cost=random_cost(seed=1))
    assert {ranked.plan.phase.mesh.tp for ranked in result.plans} == {8}
    free = search(model, cluster, workload, keep=10_000, cost=random_cost(seed=1))
    assert max(ranked.plan.phase.mesh.tp for ranked in free.plans) == 4


def test_compute_dtype_is_bf16_on_gpus_and_fp32_on_cpus_unless_pinned(
    random_cost, cluster_of, model_of
):
    cost = random_cost(seed=1, capacity_bytes=2000)
    for kind, pin, expected in (
        ("gpu", None, "bf16"), ("cpu", None, "fp32"), ("cpu", "bf16", "bf16"),
        ("gpu", "fp32", "fp32"),
    ):  # fmt: skip
        cluster = cluster_of(2, kind=kind)
        result = search(model_of(), cluster, workload_of(4), Pins(precision=pin), cost=cost)
        assert {ranked.plan.phase.compute_dtype for ranked in result.plans} == {expected}
