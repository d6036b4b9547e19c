"""Placement of experts: equal to brute force on small layers, rules and bounds on large ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from forerun.errors import InputError, NoFeasiblePlan
from forerun.planner.experts import (
    Layout,
    Loads,
    Placement,
    check_placement,
    place_experts,
    rank_loads,
)
from forerun.planner.experts.balance import pack, replicate

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
DRAWS: dict[str, Draw] = {
    "even": lambda rng, n: rng.random(n),
    "heavy": lambda rng, n: rng.pareto(1.0, n),
    "whole": lambda rng, n: rng.integers(0, 5, n).astype(float),
}


def loads_of(tokens: NDArray[np.float64]) -> Loads:
    tokens = np.atleast_2d(tokens)
    return Loads(
        experts=tuple(f"e{i}" for i in range(tokens.shape[1])),
        layers=tuple(str(i) for i in range(len(tokens))),
        tokens=tokens,
    )


def slots_of(loads: Loads, placement: Placement) -> NDArray[np.int64]:
    return np.array([[[loads.experts.index(e) for e in rank] for rank in placement.ranks]])


def best_by_force(tokens: NDArray[np.float64], layout: Layout) -> float:
    """The least largest load over all contents of all ranks."""
    num_experts = len(tokens)
    copies = layout.copies_per_rank(num_experts)
    size = num_experts // (layout.groups or 1)
    per_node = layout.ranks // (layout.nodes or 1)
    contents = [
        rank
        for rank in itertools.combinations_with_replacement(range(num_experts), layout.slots)
        if max(rank.count(e) for e in rank) <= copies
    ]
    ranks = (
        itertools.product(contents, repeat=layout.ranks)
        if layout.groups
        else itertools.combinations_with_replacement(contents, layout.ranks)
    )
    best = math.inf
    for held in ranks:
        if layout.groups:
            homes = {(e // size, r // per_node) for r, own in enumerate(held) for e in own}
            per_home = [sum(node == n for _, node in homes) for n in range(layout.nodes or 1)]
            if len(homes) != layout.groups or len(set(per_home)) > 1:
                continue
        counts = [sum(rank.count(e) for rank in held) for e in range(num_experts)]
        if min(counts) > 0:
            loads = [sum(tokens[e] / counts[e] for e in rank) for rank in held]
            best = min(best, max(loads))
    return best


@pytest.mark.parametrize("draw", DRAWS)
def test_equals_brute_force(draw: str) -> None:
    for seed in range(100):
        rng = np.random.default_rng(seed)
        ranks, slots = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        num_experts = int(rng.integers(1, min(5, ranks * slots) + 1))
        tokens, layout = DRAWS[draw](rng, num_experts), Layout(ranks=ranks, slots=slots)
        (found,) = place_experts(loads_of(tokens), layout)
        best = best_by_force(tokens, layout)
        assert found.max_load == pytest.approx(best, rel=1e-9, abs=1e-12), seed
        assert found.optimal and found.limit is None
        (quick,) = place_experts(loads_of(tokens), layout, effort=0)
        assert quick.lower_bound <= best * (1 + 1e-9)
        assert quick.max_load >= best * (1 - 1e-9)


def test_groups_are_never_better_than_brute_force_within_nodes() -> None:
    for seed in range(12):
        tokens = np.random.default_rng(seed).pareto(1.0, 4)
        layout = Layout(ranks=4, slots=2, nodes=2, groups=(2, 4)[seed % 2])
        (found,) = place_experts(loads_of(tokens), layout)
        best = best_by_force(tokens, layout)
        assert found.lower_bound <= best * (1 + 1e-9)
        assert best * (1 - 1e-9) <= found.max_load <= 1.25 * best


@settings(max_examples=60)
@given(st.data())
def test_placements_keep_the_rules(data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, 3))
    layout = Layout(
        ranks=nodes * data.draw(st.integers(1, 4)),
        slots=data.draw(st.integers(1, 6)),
        nodes=nodes,
        groups=data.draw(st.sampled_from([None, nodes, 2 * nodes])),
    )
    unit = layout.groups or 1
    largest = layout.total_slots // unit
    if not largest:
        return
    num_experts = unit * data.draw(st.integers(1, largest))
    seed, draw = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from(list(DRAWS)))
    rng = np.random.default_rng(seed)
    tokens = np.stack([DRAWS[draw](rng, num_experts) for _ in range(2)])
    loads = loads_of(tokens)
    found = place_experts(loads, layout, effort=200)
    assert found == place_experts(loads, layout, effort=200)
    for layer, placement in enumerate(found):
        one = loads_of(tokens[layer])
        check_placement(one, layout, slots_of(one, placement))
        assert sum(placement.replicas.values()) == layout.total_slots
        assert placement.max_load >= placement.mean_load * (1 - 1e-9)
        assert placement.max_load >= placement.lower_bound
        share = {e: tokens[layer, i] / placement.replicas[e] for i, e in enumerate(one.experts)}
        by_hand = max(sum(share[e] for e in rank) for rank in placement.ranks)
        assert placement.max_load == pytest.approx(by_hand)
        assert placement.cross_node_fraction is not None
        assert 0 <= placement.cross_node_fraction <= 1


def test_greedy_replicas_have_the_smallest_largest_share() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens = rng.pareto(1.0, 4)
        counts = replicate(tokens[None], 8, 8)[0]
        every = (c for c in itertools.product(range(1, 6), repeat=4) if sum(c) == 8)
        best = min(max(tokens / np.array(c)) for c in every)
        assert max(tokens / counts) == pytest.approx(best)


def test_packing_makes_room_where_only_ranks_with_the_expert_have_slots() -> None:
    rng = np.random.default_rng(4)
    for _ in range(200):
        ranks, slots = int(rng.integers(2, 5)), int(rng.integers(2, 4))
        num_experts = int(rng.integers(slots, slots + 2))
        if num_experts > ranks * slots:
            continue
        tokens = rng.random((1, num_experts))
        counts = replicate(tokens, ranks * slots, ranks)
        packed = pack(tokens, counts, ranks, slots, 1)
        names = loads_of(tokens)
        check_placement(names, Layout(ranks=ranks, slots=slots), packed)


def test_layers_are_independent() -> None:
    tokens = np.random.default_rng(1).pareto(1.5, (3, 32)) + 0.1
    layout = Layout(ranks=8, slots=5, nodes=2)
    together = place_experts(loads_of(tokens), layout)
    for layer in range(3):
        (alone,) = place_experts(loads_of(tokens[layer]), layout)
        assert alone.ranks == together[layer].ranks


def test_many_experts_end_close_to_the_bound() -> None:
    tokens = np.random.default_rng(0).lognormal(0, 1, (20, 256))
    found = place_experts(loads_of(tokens), Layout(ranks=32, slots=10))
    assert max(placement.gap for placement in found) <= 1e-3
    assert all(p.imbalance <= p.contiguous_imbalance for p in found)


def test_one_hot_expert_is_split_until_it_does_not_matter() -> None:
    tokens = np.array([60.0, 4, 4, 4])  # 72 on 6 ranks: 12 each at best
    (found,) = place_experts(loads_of(tokens), Layout(ranks=6, slots=2))
    assert found.replicas["e0"] == 6
    assert found.max_load == pytest.approx(12)
    assert found.contiguous_imbalance == pytest.approx(5)


def test_equal_loads_need_no_replicas() -> None:
    (found,) = place_experts(loads_of(np.ones(64)), Layout(ranks=8, slots=8, nodes=2))
    assert found.imbalance == 1 and found.optimal
    assert found.cross_node_fraction == pytest.approx(0.5)  # one home each: 1 - 1 / N


def test_no_load_at_all_is_balanced() -> None:
    (found,) = place_experts(loads_of(np.zeros(20)), Layout(ranks=4, slots=6, nodes=2))
    assert (found.imbalance, found.gap, found.cross_node_fraction) == (1.0, 0.0, 0.0)


def test_groups_keep_to_their_node_and_hot_groups_bound_the_rest() -> None:
    tokens = np.random.default_rng(0).pareto(1.5, (4, 64)) + 0.1
    layout = Layout(ranks=16, slots=5, nodes=4, groups=8)
    for placement in place_experts(loads_of(tokens), layout):
        homes = {(int(e[1:]) // 8, r // 4) for r, own in enumerate(placement.ranks) for e in own}
        assert len(homes) == 8
        assert placement.cross_node_fraction == pytest.approx(0.75)


def test_rank_loads_split_tokens_evenly() -> None:
    slots = np.array([[[0, 1], [0, 2]]])
    assert rank_loads(np.array([[10.0, 1, 2]]), slots).tolist() == [[6.0, 7.0]]


@pytest.mark.parametrize(
    ("slots", "reason"),
    [
        ([[0, 1], [0, 1]], "no replica"),
        ([[0, 0], [1, 2]], "twice"),
        ([[0, 1, 2]], "shape"),
    ],
)
def test_the_check_refuses_wrong_placements(slots: list[list[int]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_placement(loads_of(np.ones(3)), Layout(ranks=2, slots=2), np.array([slots]))


@pytest.mark.parametrize(
    ("tokens", "layout", "message"),
    [
        ([1.0, -1.0], Layout(ranks=1, slots=2), "load=-1"),
        ([1.0, math.nan], Layout(ranks=1, slots=2), "load=nan"),
        ([1.0, 1.0], Layout(ranks=0, slots=2), "ranks=0"),
        ([1.0, 1.0], Layout(ranks=3, slots=2, nodes=2), "does not divide 3 ranks"),
        ([1.0, 1.0], Layout(ranks=2, slots=2, groups=2), "need nodes"),
        ([1.0, 1.0], Layout(ranks=2, slots=2, nodes=2, groups=1), "not a multiple of 2 nodes"),
        ([1.0, 1.0, 1.0], Layout(ranks=2, slots=2, nodes=2, groups=2), "does not divide 3 experts"),
    ],
)
def test_what_cannot_be_meant_is_refused(tokens: list[float], layout: Layout, message: str) -> None:
    with pytest.raises(InputError, match=message):
        place_experts(loads_of(np.array(tokens)), layout)


def test_too_few_slots_say_how_many_are_needed() -> None:
    with pytest.raises(NoFeasiblePlan, match=r"hold 4 experts, there are 9; raise --slots to 3"):
        place_experts(loads_of(np.ones(9)), Layout(ranks=4, slots=1))
