"""Memory reuse: against brute force and a MILP, on published instances, and its own promises."""

from __future__ import annotations

import itertools
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from forerun.errors import InputError, NoFeasiblePlan
from forerun.planner import jit
from forerun.planner.memory_reuse import (
    Buffers,
    bilevel,
    check_capacity,
    check_offsets,
    first_fit,
    make_buffers,
    max_live_bytes,
    read_buffers,
    search,
    solve,
)
from forerun.planner.memory_reuse.bilevel import Pass, flat
from forerun.planner.memory_reuse.oracle import solve_milp
from forerun.planner.memory_reuse.sections import section_ranges
from forerun.planner.memory_reuse.traces import TRACES, equal_layers, pipeline, random_lives

solver = import_module("forerun.planner.memory_reuse.solve")  # the package exports its function
INSTANCES = Path(__file__).parent.parent / "validation" / "minimalloc"
CAPACITY = 1048576
MAX_LIVE = {"A": 1048576, "C": 1039360, "E": 1048576, "G": 1048576, "J": 989184}
"""As printed with the instances."""


def small(seed: int, count: int, aligned: bool) -> Buffers:
    """Random buffers that crowd a short time."""
    random = np.random.default_rng(seed)
    lower = random.integers(0, 8, count)
    upper = lower + random.integers(1, 6, count)
    size = random.integers(1, 12, count)
    alignment = 2 ** random.integers(0, 4, count) if aligned else None
    return make_buffers([f"b{i}" for i in range(count)], lower, upper, size, alignment)


def brute_force(buffers: Buffers) -> int:
    """The smallest arena: some order of placing each as low as it can go attains it."""
    best = 2**62
    for order in itertools.permutations(range(len(buffers))):
        offset: dict[int, int] = {}
        for i in order:
            low, up = buffers.lower[i], buffers.upper[i]
            step, size = int(buffers.alignment_bytes[i]), int(buffers.size_bytes[i])
            near = [j for j in offset if buffers.lower[j] < up and low < buffers.upper[j]]
            at = 0
            for start, j in sorted((offset[j], j) for j in near):
                if start >= at + size:
                    break
                at = max(at, -(-(start + int(buffers.size_bytes[j])) // step) * step)
            offset[i] = at
        best = min(best, max(offset[i] + int(buffers.size_bytes[i]) for i in offset))
    return best


@pytest.mark.parametrize("aligned", [False, True])
def test_equals_brute_force(aligned: bool) -> None:
    for seed in range(40):
        buffers = small(seed, 2 + seed % 5, aligned)
        plan = solve(buffers)
        assert plan.optimal
        assert plan.peak_bytes == brute_force(buffers), seed
        assert check_offsets(buffers, plan.offsets) is None


@pytest.mark.parametrize(("seed", "aligned"), [(0, False), (1, True), (2, False)])
def test_equals_the_milp(seed: int, aligned: bool, capfd: pytest.CaptureFixture[str]) -> None:
    buffers = small(seed, 11, aligned)
    oracle = solve_milp(buffers)
    assert oracle is not None
    assert solve(buffers).peak_bytes == oracle[0]
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", MAX_LIVE)
def test_published_instances_reach_their_capacity(name: str) -> None:
    buffers = read_buffers(INSTANCES / f"{name}.1048576.csv")
    assert max_live_bytes(buffers) == MAX_LIVE[name]
    if not jit.has_numba() and name in "ACE":
        pytest.skip("up to half a minute without numba: the slow test below")
    plan = solve(buffers, capacity_bytes=CAPACITY)
    assert check_offsets(buffers, plan.offsets) is None
    assert plan.peak_bytes <= CAPACITY
    check_capacity(plan, CAPACITY)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAX_LIVE)
def test_published_instances_without_numba(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "has_numba", lambda: False)
    plan = solve(read_buffers(INSTANCES / f"{name}.1048576.csv"), capacity_bytes=CAPACITY,
                 time_limit_s=300.0)  # fmt: skip
    assert plan.peak_bytes <= CAPACITY


@pytest.mark.parametrize("kind", TRACES)
@pytest.mark.parametrize("count", [70, 300, 1000])
def test_training_traces_reach_max_live(kind: str, count: int) -> None:
    buffers = TRACES[kind](count, 1)
    plan = solve(buffers)
    assert plan.optimal
    assert plan.peak_bytes == max_live_bytes(buffers)


@pytest.mark.parametrize("kind", TRACES)
def test_ten_thousand_tensors(kind: str) -> None:
    buffers = TRACES[kind](10_000, 0)
    assert len(buffers) > 6_000
    plan = solve(buffers)
    assert plan.peak_bytes <= 1.02 * max_live_bytes(buffers)


def test_too_many_for_a_search_are_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "WORK_BUDGET", 0)
    buffers = random_lives(1000, 2, 3000.0)
    plan = solve(buffers)
    assert (plan.nodes, plan.limit) == (0, "nodes")
    assert check_offsets(buffers, plan.offsets) is None
    battery = [found for _, found in first_fit.improving(buffers) if found is not None]
    assert max_live_bytes(buffers) <= plan.peak_bytes
    assert plan.peak_bytes < int((battery[-1] + buffers.size_bytes).max())


def test_both_paths_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [small(seed, 12, bool(seed % 2)) for seed in range(20)]
    cases.append(random_lives(150, 1, 60.0))
    cases.append(read_buffers(INSTANCES / "G.1048576.csv"))

    def steps() -> list[tuple[str, int, list[int]]]:
        found = []
        for buffers in cases:
            problem = search.prepare(buffers)
            bound = problem.sections.lower_bound_bytes
            for key in search.KEYS[:3]:
                one = search.search_once(problem, key, bound, 600)
                found.append(
                    (one.status, one.nodes, [] if one.offsets is None else one.offsets.tolist())
                )
        return found

    def placed() -> list[tuple[str, list[int] | None]]:
        return [
            (name, None if offsets is None else offsets.tolist())
            for buffers in cases
            for name, offsets in first_fit.improving(buffers)
        ]

    compiled = steps(), placed()
    monkeypatch.setattr(jit, "has_numba", lambda: False)
    assert (steps(), placed()) == compiled
    assert {status for status, _, _ in compiled[0]} == {"found", "infeasible", "nodes"}


def test_many_rows_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = search.prepare(random_lives(1500, 3, 30.0))  # more than `tree.MANY`
    bound = problem.sections.lower_bound_bytes
    fast = search.search_once(problem, "TWA", bound, 4000)
    monkeypatch.setattr(jit, "has_numba", lambda: False)
    slow = search.search_once(problem, "TWA", bound, 4000)
    assert (fast.status, fast.nodes) == (slow.status, slow.nodes)
    assert fast.offsets is not None and slow.offsets is not None
    assert (fast.offsets == slow.offsets).all()


def test_sections_meet_where_lives_do() -> None:
    for seed in range(20):
        buffers = small(seed, 12, False)
        first, last = section_ranges(buffers)
        for i, j in itertools.combinations(range(12), 2):
            live = buffers.lower[i] < buffers.upper[j] and buffers.lower[j] < buffers.upper[i]
            assert live == (first[i] < last[j] and first[j] < last[i])


def test_the_checker_sees_what_is_wrong() -> None:
    buffers = make_buffers(["a", "b", "c"], [0, 1, 2], [2, 3, 4], [8, 8, 8], [1, 8, 1])
    assert check_offsets(buffers, np.array([0, 8, 0])) is None
    for offsets in ([0, 4, 20], [0, 0, 20], [-1, 8, 0], [0, 8]):
        assert check_offsets(buffers, np.array(offsets)) is not None


def test_same_input_same_offsets() -> None:
    buffers = random_lives(300, 5, 100.0)
    one, two = (solve(buffers).document() for _ in range(2))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_alignment_is_paid_only_below_another() -> None:
    pair = make_buffers(["a", "b"], [0, 0], [1, 1], [60, 36], [64, 64])
    plan = solve(pair)
    assert (plan.peak_bytes, plan.optimal) == (100, True)  # 64 for a, 36 for b above it


def test_a_time_limit_gives_the_best_so_far() -> None:
    buffers = read_buffers(INSTANCES / "E.1048576.csv")
    ticks = itertools.count()
    plan = solve(buffers, capacity_bytes=CAPACITY, time_limit_s=20.0, clock=lambda: next(ticks))
    assert plan.limit == "time"
    assert plan.lower_bound_bytes < plan.peak_bytes < 2 * CAPACITY
    assert check_offsets(buffers, plan.offsets) is None
    with pytest.raises(NoFeasiblePlan, match="raise --time-limit"):
        check_capacity(plan, CAPACITY)


def test_a_capacity_below_max_live_is_refused_at_once() -> None:
    buffers = pipeline(2, 3)
    capacity = max_live_bytes(buffers) - 1
    plan = solve(buffers, capacity_bytes=capacity)
    assert plan.optimal
    with pytest.raises(NoFeasiblePlan, match="no arena is smaller"):
        check_capacity(plan, capacity)
    with pytest.raises(InputError, match="below buffer"):
        solve(buffers, capacity_bytes=511)


def test_everything_alive_at_once_in_any_number() -> None:
    count = 2000
    buffers = make_buffers([str(i) for i in range(count)], [0] * count, [9] * count,
                           [1 + i % 7 for i in range(count)])  # fmt: skip
    assert solve(buffers).optimal
    problem = search.prepare(buffers)  # as deep as there are buffers
    assert search.search_once(problem, "TWA", max_live_bytes(buffers), 4000).status == "found"


def layer_passes(num_layers: int) -> tuple[Buffers, list[Pass]]:
    """Forward and backward of equal layers: what each keeps, and what lives within a pass."""
    forward = make_buffers(
        ["q", "k", "v", "scores", "mlp"], [0, 1, 2, 3, 5], [4, 4, 5, 6, 7], [4, 4, 4, 6, 12]
    )
    backward = make_buffers(["dmlp", "dq", "dk", "dv"], [0, 2, 3, 4], [3, 6, 6, 7], [12, 5, 4, 4])
    passes = [Pass(name=f"f{i}", inner=forward, start=10 * i) for i in range(num_layers)]
    last = 10 * (2 * num_layers - 1)
    passes += [Pass(name=f"b{i}", inner=backward, start=last - 10 * i) for i in range(num_layers)]
    outer = make_buffers(
        [f"kept{i}" for i in range(num_layers)],
        [10 * i for i in range(num_layers)],
        [last - 10 * i + 8 for i in range(num_layers)],
        [10] * num_layers,
    )
    return outer, passes


def test_two_levels_are_valid_and_cost_little() -> None:
    outer, passes = layer_passes(12)
    both = bilevel(outer, passes)
    assert check_offsets(both.buffers, both.offsets) is None
    assert both.peak_bytes == int((both.offsets + both.buffers.size_bytes).max())
    assert len(both.inner_plans) == 2
    one = solve(flat(outer, passes))
    assert one.optimal
    # The peak is where all layers keep their tensors: both levels find it, 12 * 10 + one pass.
    assert one.peak_bytes <= both.peak_bytes <= 1.02 * one.peak_bytes
    with pytest.raises(InputError, match="there twice"):
        bilevel(outer, [passes[0], passes[0]])


def test_traces_close_what_they_open() -> None:
    for make in TRACES.values():
        buffers = make(200, 3)
        assert (buffers.upper > buffers.lower).all()
    assert len(equal_layers(2, 3)) == 3 * len(equal_layers(2, 1))
