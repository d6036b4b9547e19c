"""Schedules that split the backward pass: played, priced, bounded, searched."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.cli.layout import fixed_plan
from forerun.cluster import Link
from forerun.costmodel import bound_layouts, estimate
from forerun.costmodel.in_flight import Shares, least_in_flight, live_moments, moments_of
from forerun.costmodel.kept import Kept
from forerun.costmodel.layout import Layouts
from forerun.costmodel.options import Options
from forerun.costmodel.schedule import (
    Action,
    orders,
    play,
    play_long,
    play_shared,
    slowest_chain_s,
)
from forerun.costmodel.simulate import Simulation
from forerun.costmodel.stages import even_load, merge, rank_load
from forerun.costmodel.zero_bubble import not_possible, peak_live
from forerun.estimate import MEMORY_TERMS, TIME_TERMS
from forerun.executors.support import check_executed
from forerun.model import Model
from forerun.plan import Plan, even_stages
from forerun.planner import Pins, search
from forerun.planner.space import enumerate_grid
from forerun.schedules import SCHEDULES, SPLIT_SCHEDULES, V_SCHEDULES, rank_of
from forerun.workload import Workload

MakePlan = Callable[..., Plan]
CHUNKS = {"zb-h1": 1, "zb-h2": 1, "interleaved-zb": 2, "zb-v": 2, "dualpipev": 2}


def _timed(table: np.ndarray) -> Callable[[Action], float]:
    """Seconds by action from rows F, I, W over stages; B is I and W in one go."""

    def duration(action: Action) -> float:
        kind, stage, _ = action
        rows = {"F": (0,), "I": (1,), "W": (2,), "B": (1, 2)}[kind]
        return float(sum(table[row, stage] for row in rows))

    return duration


@pytest.mark.parametrize(
    ("schedule", "v", "makespan"),
    [("1f1b", 1, 117.0), ("zb-h1", 1, 103.0), ("interleaved-zb", 2, 99.5), ("zb-v", 2, 99.5),
     ("dualpipev", 2, 99.5)],
)  # fmt: skip
def test_equal_actions_take_the_known_times(schedule: str, v: int, makespan: float) -> None:
    """Eight ranks, 32 micro-batches, F = I = W = 1: the bubbles of Qi et al. 2023, table 2."""
    duration = _timed(np.full((3, 8 * v), 1.0 / v))
    assert play(orders(schedule, 8, v, 32), duration, 0.0).makespan_s == makespan
    assert slowest_chain_s(schedule, 8, v, 32, duration, 0.0) == makespan


def test_zb_h1_keeps_as_many_chunks_as_1f1b() -> None:
    for p, m in ((2, 4), (4, 9), (8, 32)):
        assert max(map(peak_live, orders("zb-h1", p, 1, m))) == p
        assert max(map(peak_live, orders("1f1b", p, 1, m))) == p


@st.composite
def _shapes(draw: st.DrawFn, most_rounds: int = 12) -> tuple[str, int, int, int]:
    """Schedule, ranks, chunks per rank and micro-batches that the rules allow."""
    schedule = draw(st.sampled_from(SPLIT_SCHEDULES))
    p = draw(st.sampled_from([2, 3, 4, 8]))
    v = draw(st.sampled_from([2, 3])) if schedule == "interleaved-zb" else CHUNKS[schedule]
    m = draw(st.integers(2 * p if schedule == "dualpipev" else p, most_rounds * p))
    return schedule, p, v, -(-m // p) * p if schedule == "interleaved-zb" else m


@given(
    shape=_shapes(),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([1.0, 1.3, 2.0]),
    hop=st.sampled_from([0.0, 0.05]),
)
@settings(max_examples=80)
def test_short_plays_tell_long_ones_and_no_chain_is_longer(
    shape: tuple[str, int, int, int], seed: int, spread: float, hop: float
) -> None:
    schedule, p, v, m = shape
    table = np.random.default_rng(seed).uniform(1.0, spread, size=(3, p * v))
    whole = play(orders(schedule, p, v, m), _timed(table), hop).makespan_s
    chain = slowest_chain_s(schedule, p, v, m, _timed(table), hop)
    assert chain <= whole * (1 + 1e-12)
    assert play_long(schedule, p, v, m, _timed(table), hop).makespan_s == pytest.approx(
        whole, rel=1e-2
    )
    if m >= 4 * p and spread == 1.0:
        assert chain >= 0.97 * whole


@given(shape=_shapes(3), hop=st.sampled_from([0.0, 0.5, 2.0]), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_sharing_at_full_speed_changes_nothing(
    shape: tuple[str, int, int, int], hop: float, seed: int
) -> None:
    schedule, p, v, m = shape
    table = np.random.default_rng(seed).uniform(1.0, 2.0, size=(3, p * v))
    order = orders(schedule, p, v, m)
    alone = play(order, _timed(table), hop).makespan_s
    assert play_shared(order, _timed(table), hop, [1.0]).makespan_s == pytest.approx(alone)


def _grid(schedule: str, p: int, v: int, m: int) -> Layouts:
    columns = {"micro_batch_seqs": 1, "num_microbatches": m, "pp": p, "vpp": v, "zero": 0,
               "dp_replicate": 1, "dp_shard": 1, "tp": 1, "sequence_parallel": 0,
               "schedule": SCHEDULES.index(schedule), "cp": 1, "ulysses": 1, "ep": 1}  # fmt: skip
    return Layouts(**{name: np.array([value]) for name, value in columns.items()})


@given(
    shape=_shapes(), before=st.floats(0.3, 1.0), waiting=st.sampled_from([0.0, 0.5, 0.94, 3.0, 16])
)
@settings(max_examples=150)
def test_closed_forms_of_live_chunks_are_not_above_the_order(
    shape: tuple[str, int, int, int], before: float, waiting: float
) -> None:
    schedule, p, v, m = shape
    shares = Shares(before=np.array([before]), waiting=np.array([waiting]))
    for rank in range(p):
        first, moments = moments_of(orders(schedule, p, v, m)[rank])
        assert live_moments(schedule, p, v, m, rank) == (first, moments)
        later = max(float(shares.live(moment)[0]) for moment in moments)
        bound = least_in_flight(_grid(schedule, p, v, m), np.array([float(rank)]), shares)
        assert bound[0] <= later * (1 + 1e-12)


@given(
    p=st.integers(2, 5), v=st.sampled_from([1, 2]), counts=st.lists(st.integers(1, 9), max_size=2)
)
@settings(max_examples=40)
def test_ranks_hold_the_stages_that_the_schedule_places_on_them(
    make_plan: MakePlan, p: int, v: int, counts: list[int]
) -> None:
    model = make_plan().model
    layer = model.layers[0]
    repeats = [2 * p * v, *counts]
    layers = tuple(msgspec.structs.replace(layer, repeat=n, ffn_hidden=64 + n) for n in repeats)
    unlike: Model = msgspec.structs.replace(model, layers=layers)
    for schedule in ("zb-v", "dualpipev") if v == 2 else ("zb-h1", "zb-h2"):
        grid = _grid(schedule, p, v, 2 * p)
        for shape in (unlike, msgspec.structs.replace(model, layers=layers[:1])):
            for rank in range(p):
                stages = [i for i in range(p * v) if rank_of(schedule, i, p) == rank]
                whole = merge([even_load(shape, grid, np.array([float(i)])) for i in stages])
                assert rank_load(shape, grid, np.array([float(rank)])).key == whole.key


@st.composite
def _plans(draw: st.DrawFn) -> dict[str, int | str | bool]:
    """Options of `make_plan` on 16 devices."""
    schedule = draw(st.sampled_from(SPLIT_SCHEDULES))
    pp = draw(st.sampled_from([2, 4, 8]))
    tp = draw(st.sampled_from([1, 2]))
    zero = draw(st.sampled_from([0, 1]))
    dp = 16 // (tp * pp)
    v = CHUNKS[schedule]
    return {
        "tp": tp, "pp": pp, "vpp": v, "schedule": schedule, "zero": zero if dp > 1 else 0,
        "dp_shard": dp if zero else 1, "dp_replicate": 1 if zero else dp,
        "sp": draw(st.booleans()) if tp > 1 else False,
        "micro_batch_seqs": draw(st.sampled_from([1, 2])),
        "recompute": draw(st.sampled_from(["none", "selective", "full"])),
    }  # fmt: skip


@given(options=_plans(), model=st.sampled_from(["llama-3.1-8b", "gpt-3.6b", "llama-2-13b"]))
@settings(max_examples=40)
def test_bounds_are_admissible_and_terms_sum_to_the_whole(
    make_plan: MakePlan, options: dict[str, int], model: str
) -> None:
    """gpt-3.6b has 30 layers and llama-2-13b 40: stages of unequal size."""
    plan = make_plan(model, "2x8xH100", seq_tokens=2048, global_batch_seqs=256, **options)
    plan.check()
    result = estimate(plan)
    assert tuple(result.time_terms_s) == TIME_TERMS
    assert tuple(result.memory_terms_bytes) == MEMORY_TERMS
    assert sum(result.time_terms_s.values()) == pytest.approx(result.step_s.median)
    assert sum(result.memory_terms_bytes.values()) == pytest.approx(result.peak_memory_bytes.median)
    assert min(*result.time_terms_s.values(), *result.memory_terms_bytes.values()) >= 0
    bound = bound_layouts(
        plan.model, plan.cluster, plan.workload, Layouts.of(plan.phase),
        Options(compute="bf16", recompute=plan.phase.recompute),
    )  # fmt: skip
    assert bound.time_s[0] <= result.step_s.median * (1 + 1e-9)
    assert bound.memory_bytes[0] <= result.peak_memory_bytes.median * (1 + 1e-9)


@pytest.mark.parametrize("schedule", SPLIT_SCHEDULES)
def test_the_bound_is_close_for_equal_stages(make_plan: MakePlan, schedule: str) -> None:
    plan = make_plan(
        "llama-2-70b", "8x8xA100-80GB", seq_tokens=4096, global_batch_seqs=64,
        pp=4, tp=8, dp_replicate=2, vpp=CHUNKS[schedule], schedule=schedule,
    )  # fmt: skip
    bound = bound_layouts(
        plan.model, plan.cluster, plan.workload, Layouts.of(plan.phase), Options(compute="bf16")
    )
    assert bound.time_s[0] >= 0.97 * estimate(plan).step_s.median


def _without_head_or_communication(plan: Plan) -> Plan:
    """A tiny vocabulary, so that stages are equal, and links that cost nothing."""
    pool = plan.cluster.pools[0]
    free = Link(latency_s=0.0, bytes_per_s=1e30)
    pool = msgspec.structs.replace(pool, intra_node=free, inter_node=free)
    return msgspec.structs.replace(
        plan,
        model=msgspec.structs.replace(plan.model, vocab=2, tied_embeddings=False),
        cluster=msgspec.structs.replace(plan.cluster, pools=(pool,)),
    )


@pytest.mark.parametrize("schedule", SPLIT_SCHEDULES)
@pytest.mark.parametrize(("pp", "recompute"), [(2, "none"), (4, "full"), (8, "none")])
def test_never_slower_than_1f1b_with_equal_stages_and_no_communication(
    make_plan: MakePlan, schedule: str, pp: int, recompute: str
) -> None:
    def step_s(kind: str, v: int) -> float:
        plan = make_plan(
            pp=pp, dp_replicate=8 // pp, vpp=v, schedule=kind, recompute=recompute, seq_tokens=2048
        )
        return estimate(_without_head_or_communication(plan)).step_s.median

    assert step_s(schedule, CHUNKS[schedule]) < step_s("1f1b", 1)


def test_recomputed_activations_wait_for_their_weights_gradients(make_plan: MakePlan) -> None:
    """Without recomputation a layer keeps about as much between I and W as before: 32 to 34 bytes
    in Qi et al. 2023, table 1; with full recomputation many times as much."""
    shares: list[float] = []
    for recompute in ("none", "full"):
        plan = make_plan("gpt-3.6b", pp=2, dp_replicate=4, schedule="zb-h1", recompute=recompute)
        sim = Simulation(plan, plan.phase)
        loads, kept = sim.rank_loads[0], Kept.of(sim.costs, sim.layouts, sim.pool.stack)
        shares.append(float(Shares.of(loads, sim.layouts, kept).waiting[0]))
    assert 0.8 < shares[0] < 1.0 and shares[1] > 10


def test_a_v_keeps_embedding_and_head_on_its_first_rank(make_plan: MakePlan) -> None:
    plan = make_plan("gpt-3.6b", pp=4, vpp=2, dp_replicate=2, schedule="zb-v", seq_tokens=2048)
    sim = Simulation(plan, plan.phase)
    assert [float(load.embedding[0]) for load in sim.rank_loads] == [1, 0, 0, 0]
    assert [float(load.head[0]) for load in sim.rank_loads] == [1, 0, 0, 0]
    looped = make_plan(
        "gpt-3.6b", pp=4, vpp=2, dp_replicate=2, schedule="interleaved", seq_tokens=2048
    )
    sent = {p.phase.schedule: estimate(p).bytes_on_wire for p in (plan, looped)}
    # six of the seven boundaries lie between ranks
    ratio = sent["zb-v"]["send@pp"] / sent["interleaved"]["send@pp"]
    assert ratio == pytest.approx(6 / 7)


def test_the_search_returns_a_zero_bubble_plan_where_it_is_best(make_plan: MakePlan) -> None:
    plan = make_plan("llama-2-13b", "8xH100")
    workload = Workload(seq_tokens=2048, global_batch_seqs=32)
    found = search(plan.model, plan.cluster, workload, Pins(pp=4, tp=1, recompute="none"), keep=2)
    best = found.plans[0].plan
    best.check()
    assert best.phase.schedule in SPLIT_SCHEDULES
    assert f"-{best.phase.schedule}_" in best.label
    for schedule in ("1f1b", "gpipe", "interleaved"):
        pins = Pins(pp=4, tp=1, recompute="none", schedule=schedule)
        other = search(plan.model, plan.cluster, workload, pins, keep=1).plans[0]
        assert found.plans[0].estimate.step_s.median <= other.estimate.step_s.median


def test_they_are_searched_wherever_plans_are_run(make_plan: MakePlan) -> None:
    from forerun.catalogs import load_cluster

    model, workload = make_plan("tiny-1m").model, Workload(seq_tokens=128, global_batch_seqs=16)
    for gpus in ("2xcpu", "2xH100"):
        for run_only in (False, True):
            grid = enumerate_grid(model, load_cluster(gpus), workload, Pins(run_only=run_only))
            assert np.any(grid.schedule > 2)
    pinned = enumerate_grid(model, load_cluster("2xcpu"), workload, Pins(schedule="zb-h1"))
    assert set(pinned.schedule) == {SCHEDULES.index("zb-h1")}


def test_processes_that_share_cores_are_predicted_and_run(make_plan: MakePlan) -> None:
    plan = make_plan(
        "tiny-1m", "2xcpu", seq_tokens=128, global_batch_seqs=8, compute="fp32", pp=2,
        schedule="zb-h1",
    )  # fmt: skip
    assert estimate(plan).step_s.median > 0
    check_executed(plan)


@pytest.mark.parametrize(
    ("schedule", "v", "label"),
    [("zb-h1", 1, "pp4-zb-h1"), ("zb-v", 2, "pp4x2-zb-v"),
     ("interleaved-zb", 4, "pp4x4-interleaved-zb")],
)  # fmt: skip
def test_labels_name_schedule_and_chunks(
    make_plan: MakePlan, schedule: str, v: int, label: str
) -> None:
    plan = make_plan(pp=4, dp_replicate=2, vpp=v, schedule=schedule)
    assert label in plan.label.split("_")
    kind, name = plan.label.split("_")[1].split("-", 1)
    pins = Pins(
        pp=int(kind.removeprefix("pp").split("x")[0]), vpp=v, schedule=name, dp=2, precision="bf16"
    )
    again = fixed_plan(plan.model, plan.cluster, plan.workload, pins)
    assert again.label == plan.label
    assert again.phase.stages == even_stages(32, 4 * v, plan.cluster.pools[0].name)


def test_possible_schedules_are_those_that_the_rules_allow() -> None:
    """Rules of a plan are stricter only in asking for a micro-batch per rank, and whole rounds."""
    assert set(V_SCHEDULES) < set(SPLIT_SCHEDULES) < set(SCHEDULES)
    assert SCHEDULES[:3] == ("gpipe", "1f1b", "interleaved")
    for schedule, v in CHUNKS.items():
        assert not not_possible(schedule, 4, v, 8)
        assert not_possible(schedule, 4, 3 - v if v < 3 else 1, 8) or schedule == "interleaved-zb"
