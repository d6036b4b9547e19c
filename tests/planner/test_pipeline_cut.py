"""The cut of a model into stages, against every cut there is."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.errors import InputError, NoFeasiblePlan
from forerun.planner.pipeline import Cut, cut_layers

numbers = st.integers(0, 6).map(float)
layers = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8)


def every_cut(num_layers: int, num_stages: int) -> list[tuple[tuple[int, int], ...]]:
    found: list[tuple[tuple[int, int], ...]] = []
    for inner in combinations(range(1, num_layers), num_stages - 1):
        bounds = [0, *inner, num_layers]
        found.append(tuple((a, b - 1) for a, b in pairwise(bounds)))
    return found


def sums(values: list[float], cut: tuple[tuple[int, int], ...], ends: tuple[float, float]):
    totals = [sum(values[first : last + 1]) for first, last in cut]
    totals[0] += ends[0]
    totals[-1] += ends[1]
    return totals


@settings(max_examples=150)
@given(
    layers,
    st.integers(1, 5),
    st.tuples(numbers, numbers),
    st.tuples(numbers, numbers),
    st.one_of(st.just(None), st.lists(st.integers(2, 20).map(float), min_size=5, max_size=5)),
)
def test_the_cut_is_that_of_brute_force(
    model: list[tuple[float, float]],
    num_stages: int,
    ends_s: tuple[float, float],
    ends_memory: tuple[float, float],
    limits: list[float] | None,
) -> None:
    num_stages = min(num_stages, len(model))
    layer_s, memory = [time for time, _ in model], [size for _, size in model]
    allowed = [1e9] * num_stages if limits is None else limits[:num_stages]

    def solve() -> Cut:
        return cut_layers(
            layer_s, num_stages, first_s=ends_s[0], last_s=ends_s[1], layer_memory=memory,
            first_memory=ends_memory[0], last_memory=ends_memory[1], memory_limit=allowed,
        )  # fmt: skip

    ranked = [
        (max(times), sum(time**2 for time in times))
        for cut in every_cut(len(model), num_stages)
        for times in [sums(layer_s, cut, ends_s)]
        if all(a <= b for a, b in zip(sums(memory, cut, ends_memory), allowed, strict=True))
    ]
    if not ranked:
        with pytest.raises(NoFeasiblePlan):
            solve()
        return
    found = solve()
    assert found.stages[0][0] == 0 and found.stages[-1][1] == len(model) - 1
    assert list(found.stage_s) == pytest.approx(sums(layer_s, found.stages, ends_s))
    assert list(found.stage_memory) == pytest.approx(sums(memory, found.stages, ends_memory))
    assert (found.largest_s, sum(time**2 for time in found.stage_s)) == pytest.approx(min(ranked))


def test_a_head_of_two_layers_takes_two_layers_from_the_last_stage() -> None:
    found = cut_layers([1.0] * 30, 4, last_s=2.0)
    assert found.largest_s == 8.0
    assert found.stages == ((0, 7), (8, 15), (16, 23), (24, 29))


def test_an_infeasible_cut_says_by_how_much() -> None:
    with pytest.raises(NoFeasiblePlan, match="raise the limit by 2"):
        cut_layers([1.0] * 4, 2, layer_memory=[3.0, 3.0, 3.0, 3.0], memory_limit=4.0)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (([1.0, 1.0], 3), "stages=3"),
        (([1.0, 1.0], 0), "stages=0"),
        (([1.0, -1.0], 2), "layer-seconds=-1"),
    ],
)
def test_bad_cuts_are_named(arguments: tuple[list[float], int], line: str) -> None:
    with pytest.raises(InputError, match=line):
        cut_layers(*arguments)
    with pytest.raises(InputError, match="layer-memory"):
        cut_layers([1.0, 1.0], 2, layer_memory=[1.0])
    with pytest.raises(InputError, match="memory-limit"):
        cut_layers([1.0, 1.0], 2, memory_limit=[1.0])
