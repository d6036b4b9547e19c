"""Unequal groups: against brute force on small instances, the rules of an answer, and bounds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.errors import InputError, NoFeasiblePlan
from forerun.planner.sequences import (
    Costs,
    WrongAssignment,
    best_static,
    check,
    hybrid_bound,
    micro_batch,
    published_costs,
    solve,
    solve_groups,
    solve_hybrid,
)
from forerun.planner.sequences.bounds import groups_bound, step_bound
from forerun.planner.sequences.cuts import cut
from forerun.planner.sequences.micro_batch import group

Groups = list[list[int]]


def log_normal(count: int, seed: int, longest: int = 196_608) -> list[int]:
    """Lengths with median 4,000 and sigma 1.2, cut at `longest`."""
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(4000), 1.2, count))
    return np.clip(drawn, 1, longest).astype(int).tolist()


def partitions(items: Sequence[int]) -> Iterator[Groups]:
    """Every way to put items into groups."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for others in partitions(rest):
        yield [[first], *others]
        for k in range(len(others)):
            yield [*others[:k], [first, *others[k]], *others[k + 1 :]]


def best_of_one_micro_batch(lengths: Sequence[int], costs: Costs, num_ranks: int) -> float:
    """By brute force: every partition with every degree of each group; infinite if none fits."""
    best = np.inf
    for parts in partitions(range(len(lengths))):
        choices: list[list[tuple[float, int]]] = []
        for part in parts:
            own = [lengths[i] for i in part]
            held = zip(costs.degrees, costs.capacity_tokens, strict=True)
            fitting = [d for d, capacity in held if sum(own) <= capacity and d <= num_ranks]
            choices.append([(costs.pass_seconds(own, d), d) for d in fitting])
        for picked in itertools.product(*choices):
            if sum(d for _, d in picked) <= num_ranks:
                best = min(best, max(seconds for seconds, _ in picked))
    return best


def best_step(lengths: Sequence[int], costs: Costs, num_ranks: int) -> float:
    """By brute force over every cut into micro-batches, contiguous or not."""
    known: dict[tuple[int, ...], float] = {}

    def one(part: list[int]) -> float:
        key = tuple(sorted(lengths[i] for i in part))
        if key not in known:
            known[key] = best_of_one_micro_batch(key, costs, num_ranks)
        return known[key]

    return min(sum(one(part) for part in parts) for parts in partitions(range(len(lengths))))


def best_without_barriers(lengths: Sequence[int], costs: Costs, num_ranks: int) -> float:
    """By brute force: every aligned block for every sequence, a pass each."""
    table = costs.seconds(np.array(lengths)) + np.array(costs.pass_s)
    blocks = [(d, at, start) for at, d in enumerate(costs.degrees) if d <= num_ranks
              for start in range(0, num_ranks, d)]  # fmt: skip
    best = np.inf
    for chosen in itertools.product(blocks, repeat=len(lengths)):
        busy = np.zeros(num_ranks)
        for i, (d, at, start) in enumerate(chosen):
            busy[start : start + d] += max(table[i, at], costs.floor_s[at])
        best = min(best, float(busy.max()))
    return best


SMALL = published_costs(4, tokens_per_rank=1500, pass_s=0.05)
small_lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=5)


@settings(max_examples=20)
@given(lengths=small_lengths)
def test_one_micro_batch_equals_brute_force(lengths: list[int]) -> None:
    descending = sorted(lengths, reverse=True)
    expected = best_of_one_micro_batch(descending, SMALL, 4)
    found = group(np.array(descending), SMALL, 4)
    assert (found.seconds if found else np.inf) == pytest.approx(expected)


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=4))
def test_steps_lie_between_bound_and_brute_force(lengths: list[int]) -> None:
    best = best_step(lengths, SMALL, 4)
    found = solve_groups(lengths, SMALL, 4)
    assert found.lower_bound_s <= best * (1 + 1e-9)
    assert found.makespan_s >= best * (1 - 1e-9)
    assert step_bound(np.array(lengths), SMALL, 4) <= best * (1 + 1e-9)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=4))
def test_hybrid_lies_between_bound_and_brute_force(lengths: list[int]) -> None:
    best = best_without_barriers(lengths, SMALL, 4)
    bound = hybrid_bound(lengths, SMALL, 4, pack=False)
    found = solve_hybrid(lengths, SMALL, 4, pack=False)
    assert bound <= best * (1 + 1e-6)
    assert best <= found.makespan_s * (1 + 1e-9)
    assert hybrid_bound(lengths, SMALL, 4) <= bound * (1 + 1e-6)  # sharing passes allows more


@pytest.mark.parametrize("seed", range(6))
def test_the_programme_is_a_bound_of_what_is_exact(seed: int) -> None:
    costs = published_costs(16, tokens_per_rank=8192)
    lengths = np.sort(np.array(log_normal(10, seed, longest=40_000)))[::-1]
    found = group(lengths, costs, 16)
    assert found is not None and found.exact
    for integer in (False, True):
        assert groups_bound(lengths, costs, 16, found.seconds * 1.2, integer=integer) <= (
            found.seconds * (1 + 1e-6)
        )


@pytest.mark.parametrize("seed", range(6))
def test_what_is_not_exact_is_near_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 sequences without the exact search: never below it, and at most 6 % above."""
    costs = published_costs(16, tokens_per_rank=8192)
    lengths = np.sort(np.array(log_normal(12, seed, longest=40_000)))[::-1]
    exact = group(lengths, costs, 16)
    monkeypatch.setattr(micro_batch, "MOST_SEQUENCES", 0)
    found = group(lengths, costs, 16)
    assert exact is not None and exact.exact and found is not None and not found.exact
    assert exact.seconds * (1 - 1e-9) <= found.seconds <= 1.06 * exact.seconds


@pytest.mark.parametrize("barriers", [True, False])
def test_the_same_input_gives_the_same_answer(barriers: bool) -> None:
    lengths = log_normal(60, 1, longest=60_000)
    costs = published_costs(16, tokens_per_rank=8192)
    first, second = (solve(lengths, costs, 16, barriers=barriers) for _ in range(2))
    assert first == second


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000), count=st.integers(1, 60), ranks=st.sampled_from([1, 2, 8, 32]),
    barriers=st.booleans(), floor=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_answers_keep_the_rules(
    seed: int, count: int, ranks: int, barriers: bool, floor: float
) -> None:
    """The checker runs inside; the gain over one degree is never below one."""
    costs = published_costs(ranks, tokens_per_rank=8192, pass_s=0.1)
    costs = replace(costs, floor_s=(floor,) * len(costs.degrees))
    lengths = log_normal(count, seed, longest=min(30_000, 8192 * ranks))
    found, static = solve(lengths, costs, ranks, barriers=barriers)
    check(found, lengths, costs)
    assert static is not None
    assert found.makespan_s <= static.makespan_s * (1 + 1e-12)
    assert 0 <= found.gap and found.lower_bound_s <= found.cut_bound_s * (1 + 1e-6)


def test_without_barriers_the_gap_is_half_a_percent() -> None:
    costs = published_costs(64, tokens_per_rank=16_384, pass_s=0.005)
    for seed in range(3):
        assert solve_hybrid(log_normal(512, seed), costs, 64, pack=False).gap <= 0.005


def test_with_barriers_the_gap_of_the_cut_is_small() -> None:
    costs = published_costs(64, tokens_per_rank=16_384)
    found = solve_groups(log_normal(512, 2), costs, 64)
    assert found.cut_gap <= 0.025
    assert len(found.micro_batches) == 5


def test_equal_sequences_fill_equal_groups() -> None:
    """64 sequences of 1,000 tokens on 64 ranks: one each, in one micro-batch."""
    costs = published_costs(64, tokens_per_rank=1024, pass_s=0.1)
    found = solve_groups([1000] * 64, costs, 64)
    (batch,) = found.micro_batches
    assert {p.degree for p in batch.groups} == {1} and len(batch.groups) == 64
    assert found.makespan_s == pytest.approx(costs.pass_seconds([1000], 1))
    assert found.gap < 1e-9


def test_time_limit_gives_the_best_so_far_and_says_so() -> None:
    now = itertools.count()
    costs = published_costs(64, tokens_per_rank=16_384)
    lengths = log_normal(200, 0)
    found = solve_groups(lengths, costs, 64, time_limit_s=3.0, clock=lambda: float(next(now)))
    assert found.limit == "time"
    assert found.makespan_s >= found.cut_bound_s >= found.lower_bound_s > 0


def test_static_has_one_degree_that_holds_the_longest() -> None:
    costs = published_costs(64, tokens_per_rank=16_384)
    lengths = log_normal(64, 0)
    static = best_static(lengths, costs, 64, barriers=True)
    assert static is not None
    assert 16_384 * static.degree >= max(lengths)
    degrees = {p.degree for batch in static.assignment.micro_batches for p in batch.groups}
    assert degrees == {static.degree}


def test_cut_is_contiguous_with_the_least_largest_sum() -> None:
    tokens = np.array([9, 7, 5, 5, 4, 3, 2, 2, 1])
    for num_runs in range(1, len(tokens) + 1):
        runs = cut(tokens, num_runs)
        assert np.concatenate([tokens[run] for run in runs]).tolist() == tokens.tolist()
        assert len(runs) <= num_runs
        inner = itertools.combinations(range(1, len(tokens)), num_runs - 1)
        least = min(
            max(tokens[a:b].sum() for a, b in itertools.pairwise((0, *at, len(tokens))))
            for at in inner
        )
        assert max(tokens[run].sum() for run in runs) == least


def _changed(kind: str) -> None:
    costs = published_costs(8, tokens_per_rank=1000, pass_s=0.1)
    lengths = [4000, 900, 800, 500]
    found = solve_groups(lengths, costs, 8)
    batch = found.micro_batches[0]
    p = batch.groups[0]
    wrong = {
        "lost": replace(p, sequences=p.sequences[1:]),
        "shifted": replace(p, start=p.start + 1),
        "quick": replace(p, seconds=p.seconds / 2),
        "narrow": replace(p, degree=1),
        "kind": replace(p, kind="ring"),
    }[kind]
    groups = (wrong, *batch.groups[1:])
    batches = (replace(batch, groups=groups), *found.micro_batches[1:])
    check(replace(found, micro_batches=batches), lengths, costs)


@pytest.mark.parametrize("kind", ["lost", "shifted", "quick", "narrow", "kind"])
def test_the_checker_sees_what_is_wrong(kind: str) -> None:
    with pytest.raises(WrongAssignment):
        _changed(kind)


def test_the_checker_sees_two_passes_at_once() -> None:
    costs = published_costs(2, tokens_per_rank=1000, pass_s=0.1)
    found = solve_hybrid([900, 900, 900, 900], costs, 2)
    with pytest.raises(WrongAssignment, match="two passes"):
        check(replace(found, barriers=True), [900] * 4, costs)


def test_what_cannot_be_done_is_refused() -> None:
    costs = published_costs(8, tokens_per_rank=1000)
    with pytest.raises(InputError, match="holds 8000 tokens"):
        solve_groups([8001], costs, 8)
    with pytest.raises(InputError, match="power of two"):
        solve_hybrid([10], costs, 6)
    with pytest.raises(InputError, match="not positive"):
        solve_hybrid([10, 0], costs, 8)
    with pytest.raises(InputError, match="no sequences"):
        solve_groups([], costs, 8)
    with pytest.raises(InputError, match="max-degree"):
        costs.of([2, 4]).up_to(1)
    with pytest.raises(InputError, match="power of two"):
        replace(costs, degrees=(1, 2, 4, 7))
    with pytest.raises(NoFeasiblePlan):  # two of three sequences fill every rank, the solver none
        solve_groups([900] * 3, costs, 8, solver=lambda *_: None)
