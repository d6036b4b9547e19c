"""Attribution of a step's moments, on time lines drawn by hand and on one real step."""

from __future__ import annotations

import pytest
import torch

from forerun.executors.measure.clock import (
    ProfilerMarks,
    Span,
    StepProfile,
    attribute,
    awaited,
    profile_step,
)
from forerun.executors.measure.comm import Call

STEP = Span(0, 10)


def terms(
    marks: list[Span],
    compute: list[Span],
    collectives: list[Span] | None = None,
    message_s: float = 0.0,
) -> dict[str, float]:
    """The terms that are not zero; all of them sum to the step."""
    result = attribute(StepProfile(STEP, marks, compute, collectives or []), message_s)
    assert sum(result.values()) == pytest.approx(STEP.end_s)
    return {name: seconds for name, seconds in result.items() if seconds}


def test_moments_belong_to_the_innermost_mark() -> None:
    marks = [Span(1, 4, "forward"), Span(4, 9, "backward"), Span(5, 7, "recompute")]
    assert terms(marks, []) == {"host": 2, "forward": 3, "backward": 3, "recompute": 2}


def test_hidden_communication_is_not_exposed() -> None:
    marks = [Span(0, 10, "backward")]
    compute = [Span(0, 6), Span(8, 10)]
    assert terms(marks, compute, [Span(1, 5, "dp")]) == {"backward": 10}
    assert terms(marks, compute, [Span(3, 8, "dp")]) == {"backward": 8, "exposed.dp": 2}


def test_first_to_end_is_the_one_waited_for() -> None:
    marks = [Span(0, 10, "forward")]
    compute = [Span(0, 4), Span(6, 10)]
    flights = [Span(1, 9, "dp"), Span(3, 6, "tp")]
    assert terms(marks, compute, flights) == {"forward": 8, "exposed.tp": 2}


def test_waiting_beyond_the_message_is_bubble() -> None:
    """A message takes 1 s; the rank waited 4 s and 0.5 s, and posted receives before it did."""
    marks = [Span(0, 10, "forward"), Span(1, 5, "receive"), Span(7, 7.5, "receive")]
    compute = [Span(0, 1), Span(5, 6), Span(6.5, 7), Span(7.5, 10)]
    flights = [Span(0, 5, "recv"), Span(3, 7.5, "recv"), Span(5, 10, "send")]
    expected = {"forward": 5.5, "exposed.pp": 1.5, "bubble": 3}
    assert terms(marks, compute, flights, message_s=1.0) == expected


def test_messages_of_a_shared_sequence_are_awaited_where_they_arrive() -> None:
    calls = [Call("send", "cp", 8), Call("recv", "cp", 8), Call("recv", "pp", 8)]
    assert [awaited(call) for call in calls] == ["send", "cp", "recv"]


def test_overlapping_operators_and_what_lies_outside_the_step() -> None:
    marks = [Span(-1, 12, "forward")]
    assert terms(marks, [Span(-2, 3), Span(1, 2), Span(9, 15)]) == {"forward": 10}


def test_real_step_lands_in_its_marks() -> None:
    marks = ProfilerMarks(torch.device("cpu"))
    x = torch.ones(256, 256)

    def step() -> None:
        marks.begin("forward")
        for _ in range(20):
            torch.mm(x, x)
        marks.end("forward")
        marks.begin("optimizer")
        x.add_(1)
        marks.end("optimizer")

    seen = profile_step(lambda: None, step, marks, [], torch.device("cpu"))
    result = attribute(seen)
    assert sum(result.values()) == pytest.approx(seen.step.end_s - seen.step.begin_s)
    assert result["forward"] > result["optimizer"] > 0
    assert result["bubble"] == result["exposed.dp"] == 0
