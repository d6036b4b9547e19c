"""Chunks and messages held to their predicted time, on a clock that only the test moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forerun.executors import pacing
from forerun.executors.marks import Marks
from forerun.executors.pacing import Board, Pacer, Stopwatch


class Clock:
    """Takes the place of the module `time`."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    return clock


class Arriving:
    """A work that is done after some seconds."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def wait(self) -> None:
        self.clock.now_s += self.seconds


CHUNKS = {"F0": {"forward": 2.0, "exposed.tp": 1.0}, "B0": {"backward": 4.0}, "U": {"optimizer": 1}}


def pacer(scale: float = 10.0) -> Pacer:
    return Pacer(CHUNKS, hop_s=0.5, scale=scale)


def work(clock: Clock, pacer: Pacer, key: str, seconds: float) -> None:
    with pacer.chunk(key):
        clock.now_s += seconds


def test_a_chunk_ends_when_it_was_predicted_to(clock: Clock) -> None:
    paced = pacer()
    work(clock, paced, "F0", 7.0)
    assert clock.now_s == 130.0
    clock.now_s += 0.25  # Python between chunks is part of the next one's time
    work(clock, paced, "B0", 1.0)
    assert clock.now_s == 170.0
    assert paced.end_step() == {
        "forward": 2.0, "exposed.tp": 1.0, "backward": 4.0, "exposed.pp": 0.0, "bubble": 0.0,
    }  # fmt: skip
    assert paced.late_s == 0


def test_late_work_catches_up_or_makes_the_step_longer(clock: Clock) -> None:
    paced = pacer()
    work(clock, paced, "F0", 32.0)
    assert paced.late_s == 2.0
    work(clock, paced, "B0", 1.0)
    assert clock.now_s == paced.ended_s == 170.0
    work(clock, paced, "B0", 60.0)
    assert paced.late_s == 20.0 and paced.ended_s == clock.now_s == 230.0
    work(clock, paced, "U", 1.0)
    assert paced.ended_s == clock.now_s == 240.0


def test_waiting_for_a_message_is_its_hop_and_bubble(clock: Clock, tmp_path: Path) -> None:
    """It is there a hop after the chunk that made it, however long the socket took."""
    sender = Pacer(CHUNKS, hop_s=0.5, scale=10.0, board=Board(tmp_path / "b", ["F0.0", "F0.1"]))
    receiver = Pacer(CHUNKS, hop_s=0.5, scale=10.0, board=Board(tmp_path / "b", ["F0.0", "F0.1"]))
    with sender.chunk("F0", "F0.1"):
        clock.now_s += 1.0
    receiver.message([Arriving(clock, 3.0)], "F0.1")()
    work(clock, receiver, "B0", 1.0)
    assert clock.now_s == 100 + 30 + 5 + 40
    terms = receiver.end_step()
    assert terms["exposed.pp"] == 0.5 and terms["bubble"] == 3.0
    assert receiver.late_s == 0


def test_a_message_that_came_long_ago_delays_nothing(clock: Clock) -> None:
    """Without a board it is there a hop after it arrived."""
    paced = pacer()
    wait = paced.message([Arriving(clock, 0.0)], "F0.0")
    wait()
    work(clock, paced, "B0", 1.0)
    assert clock.now_s == 145.0
    wait()
    work(clock, paced, "F0", 1.0)
    assert clock.now_s == 145.0 + 5 + 30
    assert paced.end_step()["bubble"] == 0.0


def test_chunks_nest(clock: Clock) -> None:
    """An outer chunk without a time takes as long as its parts, one with a time at least that."""
    paced = pacer()
    with paced.chunk("ring"):
        work(clock, paced, "F0", 1.0)
        work(clock, paced, "F0", 1.0)
    assert clock.now_s == 160.0
    with paced.chunk("B0"):
        work(clock, paced, "F0", 1.0)
    assert clock.now_s == 200.0
    with paced.chunk("F0"):
        work(clock, paced, "B0", 1.0)
    assert clock.now_s == 240.0


def test_what_follows_a_collective_starts_with_it(clock: Clock) -> None:
    paced = pacer()
    work(clock, paced, "F0", 1.0)
    clock.now_s += 50.0
    work(clock, paced, "U", 1.0)
    assert clock.now_s == 190.0
    assert paced.end_step()["bubble"] == 5.0
    paced.begin_step()
    assert paced.end_step() == {}


def test_marks_tell_observer_and_tempo(clock: Clock) -> None:
    heard: list[str] = []

    class Observer:
        def begin(self, name: str) -> None:
            heard.append(f"{name} at {clock.now_s:g}")

        end = begin

    marks = Marks()
    marks.observer = Observer()
    with marks.chunk("forward", "F0"):
        pass
    marks.tempo = pacer()
    with marks.chunk("forward", "F0"):
        pass
    assert heard == ["forward at 100", "forward at 100", "forward at 100", "forward at 130"]


def test_a_stopwatch_keeps_what_chunks_take(clock: Clock) -> None:
    watch: Any = Stopwatch()
    for seconds in (3.0, 1.0):
        with watch.chunk("F0"):
            clock.now_s += seconds
    assert watch.taken_s == {"F0": [3.0, 1.0]}
