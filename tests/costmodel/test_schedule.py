"""Pipeline schedules against closed forms and brute-force rules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.costmodel.schedule import (
    Action,
    in_flight,
    live_chunks,
    orders,
    play,
    play_long,
    play_shared,
    slowest_chain_s,
)


def _unit(v: int):
    def duration(action: Action) -> float:
        return (1.0 if action[0] == "F" else 2.0) / v

    return duration


@pytest.mark.parametrize(
    ("schedule", "p", "v", "m", "bubble"),
    [
        # (p-1)(tF + tI + tW) with tF = tI = tW = 1, divided by v when interleaved
        ("gpipe", 4, 1, 8, 9.0),
        ("1f1b", 4, 1, 8, 9.0),
        ("1f1b", 8, 1, 16, 21.0),
        ("interleaved", 4, 2, 8, 4.5),
        ("interleaved", 8, 2, 16, 10.5),
        ("interleaved", 4, 4, 8, 2.25),
        ("interleaved", 8, 4, 16, 5.25),
    ],
)
def test_bubble_matches_closed_form(schedule: str, p: int, v: int, m: int, bubble: float) -> None:
    played = play(orders(schedule, p, v, m), _unit(v), 0.0)
    assert played.makespan_s - max(played.busy_s) == pytest.approx(bubble)


@pytest.mark.parametrize(
    ("schedule", "p", "v", "m", "live"),
    [("gpipe", 4, 1, 8, 8), ("1f1b", 4, 1, 8, 4), ("interleaved", 4, 2, 8, 11),
     ("interleaved", 8, 4, 16, 39)],
)  # fmt: skip
def test_live_activations_of_the_first_rank(
    schedule: str, p: int, v: int, m: int, live: int
) -> None:
    """1F1B keeps p, interleaved p (1 + (p-1)/(p v)) full stages: 5.5 and 9.75 here."""
    assert in_flight(orders(schedule, p, v, m)[0])[0] == live


@given(
    p=st.integers(1, 5),
    rounds=st.integers(1, 4),
    v=st.integers(1, 3),
    schedule=st.sampled_from(["gpipe", "1f1b", "interleaved"]),
    hop=st.floats(0, 0.5),
)
def test_every_action_once_and_sharing_at_full_speed_changes_nothing(
    p: int, rounds: int, v: int, schedule: str, hop: float
) -> None:
    m, chunks = p * rounds, v if schedule == "interleaved" else 1
    order = orders(schedule, p, chunks, m)
    seen = [action for actions in order for action in actions]
    assert len(seen) == len(set(seen)) == 2 * m * p * chunks
    assert all(stage % p == rank for rank, acts in enumerate(order) for _, stage, _ in acts)
    alone = play(order, _unit(chunks), hop)
    shared = play_shared(order, _unit(chunks), hop, [1.0])
    assert shared.makespan_s == pytest.approx(alone.makespan_s)


def test_two_ranks_on_one_core_take_the_sum_of_their_work() -> None:
    order = orders("gpipe", 2, 1, 4)
    played = play_shared(order, _unit(1), 0.0, [1.0, 0.5])
    assert played.makespan_s == pytest.approx(2 * 4 * 3.0)


@settings(max_examples=60)
@given(
    schedule=st.sampled_from(["gpipe", "1f1b", "interleaved"]),
    p=st.sampled_from([2, 3, 4, 8]),
    v=st.sampled_from([2, 3]),
    rounds=st.integers(3, 12),
    head=st.floats(1.0, 3.0),
    hop=st.sampled_from([0.0, 0.05]),
)
def test_two_short_plays_tell_a_long_one(
    schedule: str, p: int, v: int, rounds: int, head: float, hop: float
) -> None:
    """Exactly with equal stages but the last."""
    v = v if schedule == "interleaved" else 1
    m, last = rounds * p, p * v - 1

    def duration(action: Action) -> float:
        return (1.0 if action[0] == "F" else 2.0) * (head if action[1] == last else 1.0)

    whole = play(orders(schedule, p, v, m), duration, hop)
    short = play_long(schedule, p, v, m, duration, hop)
    assert short.makespan_s == pytest.approx(whole.makespan_s, rel=1e-9)
    assert short.busy_s == pytest.approx(whole.busy_s, rel=1e-9)


@settings(max_examples=80)
@given(
    schedule=st.sampled_from(["gpipe", "1f1b", "interleaved"]),
    p=st.sampled_from([2, 3, 4]),
    v=st.sampled_from([2, 3]),
    m=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_long_plays_of_unlike_stages(schedule: str, p: int, v: int, m: int, seed: int) -> None:
    """Within half a percent, never below the chain of the slowest rank; live chunks exactly."""
    if schedule == "interleaved":
        m = -(-m // p) * p
    v = v if schedule == "interleaved" else 1
    random = np.random.default_rng(seed).uniform(1.0, 1.3, size=(2, p * v))

    def duration(action: Action) -> float:
        return float(random[0 if action[0] == "F" else 1, action[1]])

    whole = play(orders(schedule, p, v, m), duration, 0.0).makespan_s
    assert slowest_chain_s(schedule, p, v, m, duration, 0.0) <= whole * (1 + 1e-12)
    assert play_long(schedule, p, v, m, duration, 0.0).makespan_s == pytest.approx(whole, rel=5e-3)
    for rank in range(p):
        assert live_chunks(schedule, p, v, m, rank) == in_flight(orders(schedule, p, v, m)[rank])
