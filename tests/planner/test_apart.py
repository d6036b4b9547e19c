"""Replicas that train apart as an axis of the search."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from forerun import Cluster, InputError, Layer, Model, Workload
from forerun.catalogs import load_cluster
from forerun.costmodel import estimate
from forerun.costmodel.simulate import Simulation
from forerun.local_sgd import LocalSgd
from forerun.planner import Pins, search
from forerun.planner.quality import risks

MODEL = Model(
    name="small",
    hidden=256,
    vocab=1024,
    layers=(Layer(repeat=4, heads=4, kv_heads=4, head_dim=64, ffn_hidden=512),),
)


def cluster(rate: float = 12.5e6) -> Cluster:
    """Two nodes of one process, joined by a slow link."""
    found = load_cluster("2x1xcpu")
    (pool,) = found.pools
    link = replace(pool.intra_node, bytes_per_s=rate)
    return replace(found, pools=(replace(pool, inter_node=link),), profile=None)


def workload(*accepted: str) -> Workload:
    return Workload(seq_tokens=256, global_batch_seqs=8, accepted=accepted)


def test_a_slow_link_is_hidden_where_it_is_allowed() -> None:
    plain = search(MODEL, cluster(), workload()).plans
    assert all(ranked.plan.phase.local_sgd is None for ranked in plain)
    best = search(MODEL, cluster(), workload("diloco")).plans[0]
    local = best.plan.phase.local_sgd
    assert local is not None and best.plan.phase.mesh.dp_replicate == 2
    assert best.estimate.step_s.median < plain[0].estimate.step_s.median
    synchronous = search(MODEL, cluster(), workload(), Pins(dp=2)).plans[0]
    assert best.estimate.step_s.median < 0.3 * synchronous.estimate.step_s.median
    assert {risk.technique for risk in risks(best.plan)} == {"diloco"}
    assert estimate(best.plan) == best.estimate


def test_the_period_is_the_shortest_that_hides_the_link() -> None:
    best = search(MODEL, cluster(), workload("diloco"), Pins(dp=2)).plans[0]
    local = best.plan.phase.local_sgd
    assert local is not None
    sim = Simulation(best.plan, best.plan.phase)
    inner_s = sim.inner_step_s(sim.played())
    assert sim.meetings is not None
    for message in sim.meetings.messages:
        beyond = message.seconds - message.busy_s
        assert message.exposed_s(inner_s) == pytest.approx(message.busy_s)
        assert local.steps_late == 0 or beyond > (local.steps_late - 1) * inner_s
    one = max(m.seconds - m.busy_s for m in sim.meetings_by(LocalSgd(period=1)).messages)
    assert local.period <= 1.25 * (math.ceil(one / inner_s) + 1)


def test_a_faster_link_is_hidden_by_a_shorter_period() -> None:
    periods: list[int] = []
    for rate in (3e6, 12e6, 100e6):
        best = search(MODEL, cluster(rate), workload("diloco"), Pins(dp=2)).plans[0]
        assert best.plan.phase.local_sgd is not None
        periods.append(best.plan.phase.local_sgd.period)
    assert periods == sorted(periods, reverse=True) and periods[0] > periods[-1]


def test_pinned_settings_are_kept() -> None:
    pinned = LocalSgd(period=12, fragments=2, delay=3, bits=4)
    found = search(MODEL, cluster(), workload(), Pins(local_sgd=pinned)).plans
    assert found and all(ranked.plan.phase.local_sgd == pinned for ranked in found)
    with pytest.raises(InputError, match="--local-sgd 12 --outer diloco"):
        search(MODEL, cluster(), workload(), Pins(local_sgd=pinned, pp=2))
