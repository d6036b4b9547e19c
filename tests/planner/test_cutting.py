"""Cuts of pipelines: the best of all ways, bounds below every one, unlike pools."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.catalogs import load_cluster, load_model
from forerun.cluster import Cluster, Link
from forerun.costmodel import Layouts, bound_layouts, estimate
from forerun.costmodel.cuts import held_by, makespan_s, ways_of
from forerun.costmodel.fleet import Fleet
from forerun.costmodel.options import Options
from forerun.costmodel.priced_pieces import Known
from forerun.errors import InputError
from forerun.model import Layer, Model
from forerun.plan import even_sizes
from forerun.planner import Pins, search
from forerun.planner.cutting import best_cuts
from forerun.planner.grid_plans import plan_at
from forerun.planner.space import routes
from forerun.schedules import SCHEDULES, V_SCHEDULES
from forerun.workload import Workload

BF16 = Options(compute="bf16")
POLICIES = (BF16, Options(compute="bf16", recompute="full"))
WHOLE = ("gpipe", "1f1b", "zb-h1", "zb-h2")
"""Schedules of one chunk per rank."""
WORK = Workload(seq_tokens=2048, global_batch_seqs=16)


@pytest.fixture(autouse=True)
def no_user_profile(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("FORERUN_DATA", str(tmp_path))


def decoder(layers: int, vocab: int, light: int = 0) -> Model:
    """A small decoder, its first layers lighter."""
    layer = Layer(repeat=layers, heads=16, kv_heads=16, head_dim=64, ffn_hidden=4096)
    thin = msgspec.structs.replace(layer, repeat=light, ffn_hidden=1024)
    groups = (thin, layer) if light else (layer,)
    return Model(name="small", hidden=1024, vocab=vocab, layers=groups)


def pools(gpus: str) -> Cluster:
    """A cluster with a slow link between its pools, if it has several."""
    cluster = load_cluster(gpus)
    return msgspec.structs.replace(cluster, between_pools=Link(latency_s=1e-5, bytes_per_s=5e9))


def chain_s(fleet: Fleet, cut: tuple[int, ...]) -> float:
    """The longest chain of a cut, whatever the table of ways holds."""
    ways = ways_of(fleet, fleet.model.num_layers)
    ends = np.cumsum(held_by(fleet, cut))
    begins = [0, *ends[:-1]]
    places = {(r, i, j): x for r, i, j, x in
              zip(ways.rank, ways.first, ways.stop, ways.extra_s, strict=True)}  # fmt: skip
    extra_s = np.array([places[r, i, j] for r, (i, j) in enumerate(zip(begins, ends, strict=True))])
    return makespan_s(fleet, cut, extra_s)


def one_layout(pp: int, vpp: int, schedule: str, micro_batches: int, world: int) -> Layouts:
    values = {
        "micro_batch_seqs": 1, "num_microbatches": micro_batches, "dp_replicate": world // pp,
        "dp_shard": 1, "tp": 1, "pp": pp, "vpp": vpp, "zero": 0, "sequence_parallel": 0,
        "schedule": SCHEDULES.index(schedule), "cp": 1, "ulysses": 1, "ep": 1,
    }  # fmt: skip
    return Layouts(**{name: np.array([value]) for name, value in values.items()})


def every_cut(num_layers: int, pp: int, vpp: int, schedule: str) -> list[tuple[int, ...]]:
    """All cuts; of ranks with several chunks those that share a rank's layers out evenly."""
    found: list[tuple[int, ...]] = []
    for inner in combinations(range(1, num_layers), pp * vpp - 1):
        cut = tuple(b - a for a, b in pairwise([0, *inner, num_layers]))
        if vpp == 1 or _is_even(cut, pp, vpp, schedule):
            found.append(cut)
    return found


def _is_even(cut: tuple[int, ...], pp: int, vpp: int, schedule: str) -> bool:
    """Chunks of ranks without the head fall by one at most; the head's rank may be cut anyhow, its
    last chunk no larger than its first."""
    folded = schedule in V_SCHEDULES
    for rank in range(pp):
        own = [cut[rank], cut[2 * pp - 1 - rank]] if folded else list(cut[rank::pp])
        has_head = rank == (0 if folded else pp - 1)
        if own != sorted(own, reverse=True) or (not has_head and own[0] > own[-1] + 1):
            return False
    return True


SHAPES = [
    *((pp, 1, schedule) for pp in (2, 3, 4) for schedule in WHOLE),
    (2, 2, "interleaved"), (2, 3, "interleaved"), (3, 2, "interleaved"), (2, 2, "interleaved-zb"),
    (2, 2, "zb-v"), (3, 2, "zb-v"), (2, 2, "dualpipev"),
]  # fmt: skip


INSTANCES = {
    "shape": st.sampled_from(SHAPES),
    "layers": st.integers(7, 8),
    "light": st.integers(0, 2),
    "vocab": st.sampled_from([256, 16_384, 131_072]),
    "gpus": st.sampled_from(["12xH100", "6xH100+6xA100"]),
    "share": st.sampled_from([None, 0.3, 0.6, 0.9]),
}


@settings(max_examples=10)
@given(**INSTANCES)
def test_no_cut_beats_the_bound_and_the_chosen_one_is_the_best(**instance: Any) -> None:
    check_every_cut(**instance)


@pytest.mark.slow
@settings(max_examples=300)
@given(**INSTANCES)
def test_no_cut_beats_the_bound_on_hundreds_of_instances(**instance: Any) -> None:
    check_every_cut(**instance)


def check_every_cut(
    shape: tuple[int, int, str], layers: int, light: int, vocab: int, gpus: str, share: float | None
) -> None:
    pp, vpp, schedule = shape
    light = 0 if vpp > 1 else light
    if "+" in gpus and pp % 2:
        gpus = "12xH100"
    cluster = pools(gpus.replace("12x", "2x6x"))
    model = decoder(layers - light, vocab, light)
    known: Known = {}
    row = one_layout(pp, vpp, schedule, 2 * pp * (2 if vpp > 1 else 1), 12)
    work = msgspec.structs.replace(WORK, global_batch_seqs=int(row.num_microbatches[0]) * 12 // pp)
    for route in routes(cluster):
        cuts = every_cut(model.num_layers, pp, vpp, schedule)
        plans = [
            (cut, plan_at(model, route, work, row, 0, [policy], cut))
            for cut in cuts
            for policy in POLICIES
        ]
        found = [(cut, estimate(plan, known)) for cut, plan in plans]
        peaks = [e.peak_memory_bytes.median for _, e in found]
        capacity = max(peaks) if share is None else min(peaks) + share * (max(peaks) - min(peaks))
        capacities = [capacity] * len(route.pools)
        bound = bound_layouts(model, route, work, row, POLICIES, capacities, stages="free")
        fitting = [(cut, e) for cut, e in found if e.peak_memory_bytes.median <= capacity]
        best_s = min(e.step_s.median for _, e in fitting)
        assert bound.memory_bytes[0] <= min(peaks) * (1 + 1e-9)
        assert bound.time_s[0] <= best_s * (1 + 1e-9)
        worth = bound_layouts(model, route, work, row, POLICIES, capacities, best_s, "free")
        assert worth.time_s[0] <= best_s * (1 + 1e-9)
        given_cut = bound_layouts(model, route, work, row, POLICIES, capacities, stages=cuts[0])
        assert given_cut.time_s[0] <= min(
            (e.step_s.median for cut, e in fitting if cut == cuts[0]), default=np.inf
        ) * (1 + 1e-9)
        fleet = Fleet.of(model, route, work, row, POLICIES, capacities)
        values = {cut: chain_s(fleet, cut) for cut in cuts}
        chosen = best_cuts(fleet)[0] or even_sizes(model.num_layers, pp * vpp)
        if vpp == 1 and len(route.pools) == 1:
            assert values[chosen] <= min(values.values()) * (1 + 3e-3)
            assert bound.time_s[0] >= 0.98 * min(values.values()) * fleet.drift
        elif vpp == 1:  # what leads through both pools depends on the cut
            assert values[chosen] <= min(values.values()) * 1.05


def test_a_large_vocabulary_takes_layers_from_the_last_stage() -> None:
    """Llama-3.1-8B: the head of 128,256 words is as long as almost three layers."""
    model, cluster = load_model("llama-3.1-8b"), load_cluster("8xH100")
    workload = Workload(seq_tokens=8192, global_batch_seqs=64)
    for schedule, vpp in (("1f1b", 1), ("zb-h1", 1), ("interleaved", 2), ("zb-v", 2)):
        pins = Pins(pp=4, tp=1, schedule=schedule, vpp=vpp, micro_batch=1)
        even_pins = msgspec.structs.replace(pins, stages="even")
        free, even = (search(model, cluster, workload, p, keep=1) for p in (pins, even_pins))
        best = free.plans[0]
        assert best.estimate.step_s.median < 0.95 * even.plans[0].estimate.step_s.median
        sizes = [stage.num_layers for stage in best.plan.phase.stages]
        assert sizes[-1] < 32 // (4 * vpp) and "_stages" in best.label
        pinned = search(
            model, cluster, workload, msgspec.structs.replace(pins, stages=tuple(sizes)), keep=1
        )
        assert pinned.plans[0].estimate.step_s.median == pytest.approx(
            best.estimate.step_s.median, rel=2e-3
        )


def test_a_cut_lets_a_schedule_fit_that_even_stages_do_not() -> None:
    model, cluster = load_model("llama-3.1-8b"), load_cluster("8xH100")
    workload = Workload(seq_tokens=8192, global_batch_seqs=64)
    pins = Pins(pp=4, tp=1, dp=2, zero=1, schedule="zb-h1", micro_batch=1, cp=1)
    even = search(model, cluster, workload, msgspec.structs.replace(pins, stages="even"))
    assert even.infeasible is not None
    best = search(model, cluster, workload, pins, keep=1).plans[0]
    assert best.estimate.fits == "yes"


def test_two_pools_are_faster_than_each_alone_and_balanced() -> None:
    model, workload = load_model("llama-3.1-8b"), Workload(seq_tokens=8192, global_batch_seqs=96)
    pins = Pins(micro_batch=1, tp=1, cp=1)
    both = search(model, load_cluster("8xH100+16xA100"), workload, pins, keep=1)
    alone = [
        search(model, load_cluster(gpus), workload, pins, keep=1).plans[0].estimate.tokens_per_s
        for gpus in ("8xH100", "16xA100")
    ]
    best = both.plans[0]
    assert both.stats.gap is not None and both.stats.gap <= 0.01
    assert best.estimate.tokens_per_s > 0.85 * sum(alone) > max(alone)
    best.plan.check()
    held = {pool.name: 0 for pool in best.plan.cluster.pools}
    for stage in best.plan.phase.stages:
        held[stage.pool] += stage.num_layers
    per_device = {pool.name: held[pool.name] / pool.num_devices for pool in best.plan.cluster.pools}
    assert per_device["H100-SXM-80GB"] > 1.5 * per_device["A100-SXM-80GB"]
    evenly = search(model, load_cluster("8xH100+16xA100"), workload, Pins(stages="even"), keep=1)
    assert best.estimate.step_s.median < 0.9 * evenly.plans[0].estimate.step_s.median


def test_a_slower_link_between_pools_never_speeds_a_plan_up() -> None:
    model, workload = load_model("llama-2-7b"), Workload(seq_tokens=4096, global_batch_seqs=32)
    cluster = load_cluster("8xH100+8xA100")
    pins = Pins(micro_batch=1, pp=2, cp=1)
    best = search(model, cluster, workload, pins, keep=1).plans[0]
    steps = [
        estimate(
            msgspec.structs.replace(
                best.plan,
                cluster=msgspec.structs.replace(
                    best.plan.cluster, between_pools=Link(latency_s=1e-5, bytes_per_s=rate)
                ),
            )
        ).step_s.median
        for rate in (1e11, 1e10, 1e9, 1e8)
    ]
    assert steps == sorted(steps) and steps[-1] > 1.01 * steps[0]


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        (Pins(stages=(20, 11)), "stages=20,11: are 31 layers, llama-3.1-8b has 32"),
        (Pins(stages=(20, 0, 12)), "stages=20,0,12: a stage without a layer"),
        (Pins(stages=(20, 7, 5)), "no legal layout .* stages can be of 1, 2, 4"),
        (Pins(stages=(20, 12), pp=4), r"pp, stages=4, 20,12: contradict each other"),
    ],
)
def test_refuses_stages_that_no_layout_has(pins: Pins, words: str) -> None:
    workload = Workload(seq_tokens=8192, global_batch_seqs=64)
    with pytest.raises(InputError, match=words):
        search(load_model("llama-3.1-8b"), load_cluster("8xH100"), workload, pins)


def test_stages_in_the_wrong_pool_are_refused() -> None:
    model, workload = load_model("llama-2-7b"), Workload(seq_tokens=4096, global_batch_seqs=32)
    pins = Pins(micro_batch=1, pp=2, cp=1)
    plan = search(model, load_cluster("8xH100+8xA100"), workload, pins, keep=1).plans[0].plan
    phase = plan.phase
    first = phase.stages[0].pool
    everywhere = tuple(msgspec.structs.replace(stage, pool=first) for stage in phase.stages)
    wrong = msgspec.structs.replace(
        plan, phases=(msgspec.structs.replace(phase, stages=everywhere),)
    )
    with pytest.raises(InputError, match="ranks lie in a pool of 8 devices"):
        wrong.check()
