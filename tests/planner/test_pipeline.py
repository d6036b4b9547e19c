"""The order of a pipeline's actions: bounds, optima of small pipelines, gains on large ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.costmodel.schedule import Action, Orders
from forerun.errors import InputError, NoFeasiblePlan
from forerun.planner import jit
from forerun.planner.pipeline import Pipeline, Solution, check, make_pipeline, solve_pipeline, split
from forerun.planner.pipeline.anneal import anneal
from forerun.planner.pipeline.bound import lower_bound_s
from forerun.planner.pipeline.greedy import greedy_orders
from forerun.planner.pipeline.oracle import certify
from forerun.planner.pipeline.play import makespan_s


def interleavings(chains: list[list[Action]]) -> Iterator[list[Action]]:
    """Every order that keeps each chain's own order."""
    if not any(chains):
        yield []
    for index, chain in enumerate(chains):
        if chain:
            rest = [*chains[:index], chain[1:], *chains[index + 1 :]]
            for order in interleavings(rest):
                yield [chain[0], *order]


def optimum(pipeline: Pipeline, limit: float) -> float:
    """The shortest makespan of all orders whatsoever that keep the limit."""
    per_rank: list[list[list[Action]]] = []
    for stages in pipeline.stages_of:
        chains: list[list[Action]] = [
            [(kind, stage, micro) for kind in "FIW"]
            for stage in stages
            for micro in range(pipeline.num_micro_batches)
        ]
        per_rank.append(list(interleavings(chains)))
    every = (check(pipeline, list(orders), limit) for orders in itertools.product(*per_rank))
    return min(checked.makespan_s for checked in every if not checked.problems)


def random_pipeline(seed: int, p: int, m: int, chunks: int = 1) -> tuple[Pipeline, float]:
    """A pipeline of unlike stages, with transfers half of the time, and a limit."""
    draw = random.Random(seed)
    times = [[draw.choice((0.5, 1.0, 1.5, 2.0)) for _ in range(p * chunks)] for _ in range(3)]
    comm_s = draw.choice((0.0, 0.05, 0.25))
    limit = draw.choice([1.0 + step / chunks for step in range((p - 1) * chunks + 1)])
    return make_pipeline(p, m, *times, chunks=chunks, comm_s=comm_s), limit


@pytest.mark.parametrize("seed", range(6))
def test_the_certified_optimum_is_that_of_brute_force(seed: int) -> None:
    p, m, chunks = ((2, 2, 1), (1, 3, 1), (2, 1, 2))[seed % 3]
    pipeline, limit = random_pipeline(seed, p, m, chunks)
    best_s = optimum(pipeline, limit)
    listed = greedy_orders(pipeline, limit)
    assert listed is not None
    proof = certify(pipeline, limit, listed[0], time_limit_s=60)
    assert proof.proven and proof.orders is not None
    checked = check(pipeline, proof.orders, limit)
    assert checked.problems == ()
    assert checked.makespan_s == pytest.approx(best_s)
    assert lower_bound_s(pipeline, limit) <= best_s + 1e-9
    assert proof.lower_bound_s == pytest.approx(best_s)


@pytest.mark.parametrize(("p", "m", "limit"), [(2, 4, 2.0), (3, 4, 3.0), (3, 5, 2.0), (5, 3, 3.0)])
def test_small_pipelines_are_solved_to_the_certified_optimum(p: int, m: int, limit: float) -> None:
    """The search alone meets what the integer programme proves."""
    pipeline, _ = random_pipeline(p * m, p, m)
    times = (pipeline.forward_s, pipeline.input_s, pipeline.weight_s)
    settled = {"comm_s": pipeline.comm_s, "memory_limit": limit, "chunks": 1}
    found = solve_pipeline(p, m, *times, **settled)
    exact = solve_pipeline(p, m, *times, **settled, exact=True, time_limit_s=60)
    assert exact.stop is None and exact.gap == 0
    assert found.makespan_s == pytest.approx(exact.makespan_s)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 9), st.sampled_from((1, 2)))
def test_answers_are_valid_and_between_bound_and_known_schedules(
    seed: int, p: int, m: int, chunks: int
) -> None:
    pipeline, limit = random_pipeline(seed, p, m, chunks)
    times = (pipeline.forward_s, pipeline.input_s, pipeline.weight_s)
    found = solve_pipeline(
        p, m, *times, comm_s=pipeline.comm_s, memory_limit=limit, chunks=chunks, moves=200
    )
    checked = check(found.pipeline, found.orders, limit)
    assert checked.problems == ()
    assert checked.makespan_s == pytest.approx(found.makespan_s)
    assert max(found.peak_activations) <= limit + 1e-9
    assert found.lower_bound_s <= found.makespan_s * (1 + 1e-9)
    for known in found.builtin:
        if known.peak <= limit and known.pipeline.num_stages == p * chunks:
            assert found.makespan_s <= known.makespan_s * (1 + 1e-9)


def head(times: list[float]) -> list[float]:
    """The last chunk with a head and a loss, the first with an embedding."""
    return [times[0] + 0.03, *times[1:-1], times[-1] + 0.3]


def scaled(seed: int, width: float) -> list[float]:
    draw = random.Random(seed)
    return [1 + draw.uniform(-width, width) for _ in range(16)]


HALF, RAND15, RAND30 = [0.5] * 16, scaled(0, 0.15), scaled(1, 0.3)
SLOW = [1.25 if chunk in (3, 12) else 1.0 for chunk in range(16)]
CASES: dict[str, tuple[list[float], list[float], list[float]]] = {
    "equal": (HALF, HALF, HALF),
    "longctx": (HALF, [0.75] * 16, [0.3] * 16),
    "head": (head(HALF), head(HALF), head(HALF)),
    "head+ctx": (head(HALF), head([0.7] * 16), head([0.35] * 16)),
    "rand15": ([0.5 * x for x in RAND15], [0.55 * x for x in RAND15], [0.45 * x for x in RAND15]),
    "rand30": ([0.5 * x for x in RAND30], [0.5 * x for x in RAND30], [0.5 * x for x in RAND30]),
    "slowchunks": ([0.5 * x for x in SLOW], [0.6 * x for x in SLOW], [0.45 * x for x in SLOW]),
}
"""Durations of the 16 chunks of eight ranks."""


@pytest.mark.parametrize("case", CASES)
def test_unequal_stages_at_the_memory_of_1f1b(case: str) -> None:
    found = solve_pipeline(8, 32, *CASES[case])
    known = {schedule.name: schedule.makespan_s for schedule in found.builtin}
    torch_has = {name: value for name, value in known.items() if name != "ZB-H2"}
    assert max(found.peak_activations) <= 8
    assert found.makespan_s <= min(torch_has.values()) * (1 + 1e-9)
    assert known["1F1B"] / found.makespan_s >= 1.12
    assert known["ZB-H1"] / found.makespan_s >= 1.03
    assert found.gap <= 0.02


def test_a_slow_rank_at_the_memory_of_1f1b() -> None:
    """Rank 3 a quarter slower, whatever stages it holds."""
    found = solve_pipeline(8, 32, *CASES["slowchunks"], chunks=2)
    per_rank = [1.25 if rank == 3 else 1.0 for rank in range(8)]
    one = [[2 * share * x for x in per_rank] for share in (0.5, 0.6, 0.45)]
    known = {k.name: k.makespan_s for k in solve_pipeline(8, 32, *one, chunks=1, moves=0).builtin}
    assert known["1F1B"] == pytest.approx(142.6, abs=0.05)
    assert known["ZB-H1"] == pytest.approx(130.8, abs=0.05)
    assert known["1F1B"] / found.makespan_s >= 1.12
    assert known["ZB-H1"] / found.makespan_s >= 1.03


@pytest.mark.parametrize("case", CASES)
def test_three_quarters_of_the_memory_is_still_faster_than_1f1b(case: str) -> None:
    found = solve_pipeline(8, 32, *CASES[case], memory_limit=6)
    fitting = [known for known in found.builtin if found.fits(known)]
    assert fitting == []
    one_f_one_b = next(k.makespan_s for k in found.builtin if k.name == "1F1B")
    assert found.makespan_s < one_f_one_b
    assert max(found.peak_activations) <= 6


def test_more_memory_or_shorter_transfers_never_raise_the_bound() -> None:
    forward, inputs, weights = CASES["head+ctx"]
    for comm_s in (0.0, 0.1):
        pipeline = make_pipeline(8, 32, forward, inputs, weights, chunks=2, comm_s=comm_s)
        bounds = [lower_bound_s(pipeline, limit) for limit in (1, 2, 3, 4, 6, 8, 16)]
        assert bounds == sorted(bounds, reverse=True)
    assert lower_bound_s(make_pipeline(8, 32, *CASES["equal"], chunks=2), 8) == 99.5


def tables(found: Solution) -> tuple[Orders, float, int]:
    return found.orders, found.makespan_s, found.moves


def test_plain_python_gives_what_compiled_loops_give(monkeypatch: pytest.MonkeyPatch) -> None:
    asks = [(3, 6, [1.0, 1.2, 0.9], 1.5, 0.6, 2.5), (4, 8, 1.0, [1.0, 1.1, 1.3, 0.8], 0.9, 3.0)]
    answers = [solve_pipeline(*ask[:5], memory_limit=ask[5], moves=300) for ask in asks]
    monkeypatch.setattr(jit, "has_numba", lambda: False)
    plain = [solve_pipeline(*ask[:5], memory_limit=ask[5], moves=300) for ask in asks]
    assert [tables(found) for found in plain] == [tables(found) for found in answers]


def test_annealing_never_returns_worse_than_its_seed() -> None:
    for seed in range(4):
        pipeline, _ = random_pipeline(seed, 4, 8, 2)
        listed = greedy_orders(pipeline, 3.0)
        assert listed is not None
        best_s, orders, tried = anneal(pipeline, listed[1], 3.0, moves=300)
        assert tried == 300
        assert best_s <= listed[0]
        assert makespan_s(pipeline, orders) == pytest.approx(best_s)
        assert check(pipeline, orders, 3.0).problems == ()


def test_a_time_limit_gives_the_best_so_far() -> None:
    clock = itertools.count().__next__
    found = solve_pipeline(
        8, 16, *CASES["longctx"], memory_limit=6, time_limit_s=30, clock=lambda: float(clock())
    )
    assert found.stop == "time"
    assert check(found.pipeline, found.orders, 6).problems == ()
    assert found.gap > 0


def test_the_checker_finds_what_is_wrong() -> None:
    pipeline = make_pipeline(2, 2, 1.0, 1.0, 1.0)
    good = split(solve_pipeline(2, 2, 1.0, 1.0, 1.0, chunks=1).orders)
    assert check(pipeline, good).problems == ()
    assert check(pipeline, good[:1]).problems == ("1 rows for 2 ranks",)
    assert "1W1 is missing" in check(pipeline, [good[0], good[1][:-1]]).problems
    assert "1W1 stands 2 times" in check(pipeline, [good[0], [*good[1], good[1][-1]]]).problems
    assert "stage 0 is not on rank 1" in check(pipeline, good[::-1]).problems
    early = [[("W", 0, 0), *[a for a in good[0] if a != ("W", 0, 0)]], good[1]]
    assert "0W0 stands before what it needs" in check(pipeline, early).problems
    assert check(pipeline, good, 1.5).problems[0] == "rank 0 keeps 2 of 1.5"
    crossed: Orders = [
        [("F", 0, 0), ("B", 0, 0), ("F", 0, 1), ("B", 0, 1)],
        [("F", 1, 1), ("B", 1, 1), ("F", 1, 0), ("B", 1, 0)],
    ]
    assert check(pipeline, crossed).problems == ("the ranks wait for each other",)
    assert makespan_s(pipeline, crossed) == float("inf")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_ranks": 0}, "stages=0"),
        ({"num_micro_batches": 0}, "micro-batches=0"),
        ({"forward_s": -1.0}, "forward=-1"),
        ({"input_s": [1.0, float("nan")]}, "backward-input=nan"),
        ({"weight_s": [1.0] * 3}, "backward-weight=3 numbers"),
        ({"comm_s": -0.1}, "comm=-0.1"),
        ({"chunks": 3}, "chunks=3"),
        ({"chunks": 1, "forward_s": [1.0] * 4}, "chunks=1"),
        ({"memory_limit": 0.0}, "memory-limit=0"),
        ({"num_micro_batches": 40, "exact": True}, "exact=80"),
    ],
)
def test_bad_numbers_are_named(changes: dict[str, object], line: str) -> None:
    asked: dict[str, object] = {
        "num_ranks": 2, "num_micro_batches": 4, "forward_s": 1.0, "input_s": 1.0, "weight_s": 1.0,
    }  # fmt: skip
    with pytest.raises(InputError, match=line):
        solve_pipeline(**{**asked, **changes})  # pyright: ignore[reportArgumentType]


def test_a_limit_below_one_stage_is_refused() -> None:
    with pytest.raises(NoFeasiblePlan, match=r"memory-limit=0\.5 is below 1"):
        solve_pipeline(2, 4, 1.0, 1.0, 1.0, memory_limit=0.5)
    found = solve_pipeline(2, 4, 1.0, 1.0, 1.0, memory_limit=1.0)
    assert max(found.peak_activations) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_unequal_stages_without_numba(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "has_numba", lambda: False)
    test_unequal_stages_at_the_memory_of_1f1b(case)
