"""Orders known by name against closed forms, published numbers and torch's own generators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.costmodel import schedule
from forerun.costmodel.schedule import Action, Orders
from forerun.costmodel.zero_bubble import (
    SPLIT_SCHEDULES,
    V_SCHEDULES,
    not_possible,
    peak_live,
    rank_of,
    split_orders,
)
from forerun.planner.pipeline import check, make_pipeline, merged, solve_pipeline, split, write_csv
from forerun.planner.pipeline.fixed import KINDS, fixed_schedules
from forerun.planner.pipeline.play import makespan_s


def played(p: int, m: int, times: tuple[float, float, float]) -> dict[str, tuple[float, float]]:
    """Makespan and peak of every schedule known by name, from the time of a rank's share."""
    one = make_pipeline(p, m, *times)
    two = {
        (2, folded): make_pipeline(p, m, *times, chunks=2, folded=folded)
        for folded in (False, True)
    }
    found = fixed_schedules({(1, False): one, **two})
    return {known.name: (known.makespan_s, known.peak) for known in found}


def test_eight_stages_of_equal_actions_take_the_known_times() -> None:
    known = played(8, 32, (1.0, 1.0, 1.0))
    expected = {
        "GPipe": (117.0, 32.0),
        "1F1B": (117.0, 8.0),
        "Interleaved1F1B": (106.5, 11.5),
        "ZB-H1": (103.0, 8.0),
        "InterleavedZeroBubble": (99.5, 8.0),
        "ZBVZeroBubble": (99.5, 8.0),
        "DualPipeV": (99.5, 8.5),
    }
    assert {name: known[name] for name in expected} == expected


def test_long_context_takes_the_known_times() -> None:
    known = played(8, 32, (1.0, 1.5, 0.6))
    expected = {"1F1B": 120.9, "Interleaved1F1B": 110.05, "ZB-H1": 112.5, "ZBVZeroBubble": 105.5}
    assert {name: known[name][0] for name in expected} == pytest.approx(expected)


whole_times = st.integers(1, 9).map(float)


@given(st.integers(1, 7), st.integers(1, 4), whole_times, whole_times, whole_times)
def test_1f1b_and_interleaved_match_their_closed_forms(
    p: int, rounds: int, forward: float, inputs: float, weights: float
) -> None:
    m, full = p * rounds, forward + inputs + weights
    known = played(p, m, (forward, inputs, weights))
    assert known["1F1B"] == (pytest.approx((m + p - 1) * full), p)
    assert known["Interleaved1F1B"][0] == pytest.approx(m * full + (p - 1) * full / 2)
    if rounds > 1:
        assert known["Interleaved1F1B"][1] == pytest.approx(p * (1 + (p - 1) / (2 * p)))


@given(st.integers(1, 7), st.integers(0, 20), whole_times, whole_times, whole_times)
def test_zb_h1_matches_its_closed_form(
    p: int, more: int, forward: float, inputs: float, weights: float
) -> None:
    """Bubble (p - 1) (F + I - W) of Qi et al. 2023, table 2, for W <= F and I and m >= 2p."""
    weights = min(weights, inputs, forward)
    m = 2 * p + more
    makespan, peak = played(p, m, (forward, inputs, weights))["ZB-H1"]
    full = forward + inputs + weights
    assert makespan == pytest.approx(m * full + (p - 1) * (forward + inputs - weights))
    assert peak == p


def test_zb_h2_leaves_no_rank_idle_between_its_first_and_last_action() -> None:
    """Qi et al. 2023, section 2: no bubble at up to 2p - 1 micro-batches of memory."""
    for p in (2, 3, 4, 8):
        orders = split_orders("zb-h2", p, 1, 3 * p)
        pipeline = make_pipeline(p, 3 * p, 1.0, 1.0, 1.0)
        assert makespan_s(pipeline, orders) == 3.0 * 3 * p + p - 1
        assert [peak_live(actions) for actions in orders] == [2 * p - 1] * p


@given(st.sampled_from(SPLIT_SCHEDULES), st.integers(1, 6), st.integers(1, 20))
def test_split_schedules_are_complete_and_free_of_deadlock(name: str, p: int, m: int) -> None:
    v = 1 if name.startswith("zb-h") else 2
    if not_possible(name, p, v, m):
        with pytest.raises(ValueError, match=name):
            split_orders(name, p, v, m)
        return
    pipeline = make_pipeline(p, m, 1.0, 1.2, 0.7, chunks=v, folded=name in V_SCHEDULES)
    assert pipeline.rank_of == tuple(rank_of(name, stage, p) for stage in range(p * v))
    orders = split_orders(name, p, v, m)
    checked = check(pipeline, orders)
    assert checked.problems == ()
    assert checked.makespan_s == pytest.approx(makespan_s(pipeline, orders))
    assert checked.peak_activations == tuple(peak_live(actions) / v for actions in orders)


def test_splitting_whole_backwards_is_never_slower_and_merging_undoes_it() -> None:
    pipeline = make_pipeline(4, 9, [1.0, 1.1, 0.9, 1.4], 1.3, 0.8)
    orders = schedule.orders("1f1b", 4, 1, 9)
    assert merged(split(orders)) == orders
    assert makespan_s(pipeline, split(orders)) <= makespan_s(pipeline, orders)


TORCH_CLASSES = {
    "LoopedBFS": "ScheduleLoopedBFS",
    "Interleaved1F1B": "ScheduleInterleaved1F1B",
    "InterleavedZeroBubble": "ScheduleInterleavedZeroBubble",
    "ZB-H1": "ScheduleInterleavedZeroBubble",
    "ZBVZeroBubble": "ScheduleZBVZeroBubble",
    "DualPipeV": "ScheduleDualPipeV",
    "GPipe": "ScheduleGPipe",
    "1F1B": "Schedule1F1B",
}
LETTERS = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}


def torch_orders(name: str, p: int, m: int) -> Orders:
    """What torch's generator gives for a schedule, without process groups or modules."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    kind: Any = getattr(schedules, TORCH_CLASSES[name])
    chunks = KINDS[name].chunks
    stub: Any = object.__new__(kind)
    stub.pp_group_size, stub.n_local_stages, stub._stages = p, chunks, [None] * chunks
    stub._n_microbatches, stub._num_stages, stub.num_stages = m, p * chunks, p * chunks
    stub.number_of_rounds = max(1, m // p)
    stub.microbatches_per_round = m // stub.number_of_rounds
    if chunks == 1 and name != "ZB-H1":
        rows = stub._get_pipeline_order()
    else:
        rows = {rank: stub._calculate_single_rank_operations(rank) for rank in range(p)}
    return [letters(rows[rank]) for rank in range(p)]


def letters(row: list[Any]) -> list[Action]:
    parts = [part for action in row if action for part in (action.sub_actions or (action,))]
    return [
        (LETTERS[part.computation_type.name], part.stage_index, part.microbatch_index)
        for part in parts
        if part.computation_type.name in LETTERS
    ]


@pytest.mark.parametrize("name", TORCH_CLASSES)
def test_orders_are_those_of_torch(name: str) -> None:
    tried = 0
    for p in (1, 2, 3, 4, 8):
        for m in (p, p + 1, 2 * p, 2 * p + 3, 4 * p):
            ours = KINDS[name].orders_of(p, m)
            if ours is None or (name == "ZB-H1" and m % max(1, m // p)):
                continue
            theirs = torch_orders(name, p, m)
            if name == "1F1B":  # torch's table, not its run, counts the last rank's F from 1
                ours, theirs = ours[:-1], theirs[:-1]
            assert ours == theirs
            tried += 1
    assert tried >= 10


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_csv_loads_in_the_runtime_of_torch(chunks: int, tmp_path: Path) -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    p, m = 3, 6
    found = solve_pipeline(p, m, 1.0, 1.4, 0.7, memory_limit=2.5, chunks=chunks, moves=400)
    write_csv(tmp_path / "orders.csv", found.orders)
    runtime: Any = object.__new__(schedules._PipelineScheduleRuntime)
    runtime.pp_group_size, runtime._num_stages, runtime._n_microbatches = p, p * chunks, m
    runtime._stages, runtime.pipeline_order, runtime._defer_pp_recv = [], {}, False
    runtime._load_csv(tmp_path / "orders.csv")
    assert [letters(runtime.pipeline_order[rank]) for rank in range(p)] == found.orders
    mapping = runtime.stage_index_to_group_rank
    assert tuple(mapping[stage] for stage in range(p * chunks)) == found.pipeline.rank_of
    simulated = {*LETTERS, "SEND_F", "RECV_F", "SEND_B", "RECV_B"}
    runtime.pipeline_order_with_comms = {
        rank: [action for action in row if action.computation_type.name in simulated]
        for rank, row in runtime.pipeline_order_with_comms.items()
    }
    runtime._simulate()  # raises when sends and receives do not meet
