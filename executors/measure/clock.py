"""Where the time of a step went: profiled steps, each moment of which is in one term.

`torch.profiler` records, on one time line, the trainer's marks, the operators of the main thread
(or, on CUDA, the kernels) and the collectives in flight. Each moment of a rank's step is then in

    exposed.AXIS   no operator runs and a collective of that axis is in flight
    bubble         a pipeline rank waits for a message, beyond the time that the message takes
    forward, backward, recompute, optimizer   the innermost mark, for all other moments
    host           outside of every mark; `data` is zero, batches are drawn before the clock starts

Which axis a collective belongs to is known by its place in the order of issue, which is the same
as in the counted step before. When several are in flight the first to end is the one waited for.
Messages of a pipeline are posted long before they are needed, and sends are waited for when they
are long over: their waiting is what the pipeline marks as such. What a message itself takes is
measured apart (`Pipeline.message_s`). Messages between ranks that share a sequence are awaited
where they arrive, and count as other collectives do.

Limits: a gap between two operators while a collective is in flight counts as exposed though it may
be Python at work. The profiler
lengthens the step, so that the terms are scaled to the timed median: small terms are less certain
than their digits. On CUDA, marks are those of the CPU moved to the stream by CUDA events.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ...estimate import TIME_TERMS
from .comm import Call

STEP = "forerun.step"
MARK = "forerun.mark."
RECEIVE = "receive"
"""The mark of waiting for a pipeline's message."""
COMPUTE = ("aten::", "fsdp::")
"""Operators of the main thread whose time is work; c10d and its waits are not."""


class Span(NamedTuple):
    """A stretch of time, in seconds; for a collective also its axis (`recv` for a pipeline's)."""

    begin_s: float
    end_s: float
    name: str = ""


class ProfilerMarks:
    """Marks as ranges of the profiler, and on CUDA as pairs of events on the stream."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.open: list[Any] = []
        self.events: list[tuple[str, Any, Any]] = []

    def begin(self, name: str) -> None:
        """Open a range."""
        span = record_function(MARK + name)
        span.__enter__()
        event = _event() if self.on_cuda else None
        self.open.append((span, event))

    def end(self, name: str) -> None:
        """Close the innermost range."""
        span, event = self.open.pop()
        span.__exit__(None, None, None)
        if self.on_cuda:
            self.events.append((name, event, _event()))


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class StepProfile(NamedTuple):
    """What one profiled step showed: the step, its marks, work and collectives."""

    step: Span
    marks: list[Span]
    compute: list[Span]
    collectives: list[Span]
    matched: bool = True
    """Whether each collective in flight is known by its place in the order of issue."""


def profile_step(
    ready: Callable[[], None],
    run_step: Callable[[], None],
    marks: ProfilerMarks,
    calls: Sequence[Call],
    device: torch.device,
) -> StepProfile:
    """What one step showed under the profiler.

    `ready` waits for the other ranks, `calls` are the collectives of the counted step, in order.
    """
    activities = [ProfilerActivity.CPU]
    if marks.on_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        ready()
        with record_function(STEP):
            start = _event() if marks.on_cuda else None
            run_step()
            if marks.on_cuda:
                torch.cuda.synchronize(device)
    every = list(profiler.events() or [])
    step = next(event for event in every if event.name == STEP and _on_host(event))
    events = [event for event in every if event.time_range.start >= step.time_range.start]
    if marks.on_cuda:
        return _from_kernels(step, events, marks, start, calls)
    return _from_operators(step, events, calls)


def _from_operators(step: Any, events: Sequence[Any], calls: Sequence[Call]) -> StepProfile:
    own = [event for event in events if event.thread == step.thread and not event.is_async]
    marks = [_span(e, e.name.removeprefix(MARK)) for e in own if e.name.startswith(MARK)]
    compute = [_span(event) for event in own if event.name.startswith(COMPUTE)]
    flights = [event for event in events if event.name.startswith("gloo:")]
    return StepProfile(_span(step), marks, compute, *_with_axes(flights, calls))


def _from_kernels(
    step: Any, events: Sequence[Any], marks: ProfilerMarks, start: Any, calls: Sequence[Call]
) -> StepProfile:
    """The same from a GPU's time line, on which the step starts with its first kernel."""
    kernels = [event for event in events if not _on_host(event) and not _is_range(event)]
    first_us = min((event.time_range.start for event in kernels), default=step.time_range.start)
    placed: list[Span] = []
    for name, begin, end in marks.events:
        begin_s = first_us * 1e-6 + start.elapsed_time(begin) * 1e-3
        placed.append(Span(begin_s, begin_s + begin.elapsed_time(end) * 1e-3, name))
    flights = [event for event in kernels if "nccl" in event.name.lower()]
    compute = [_span(event) for event in kernels if "nccl" not in event.name.lower()]
    whole = Span(
        first_us * 1e-6, max((s.end_s for s in [*placed, *compute]), default=first_us * 1e-6)
    )
    return StepProfile(whole, placed, compute, *_with_axes(flights, calls))


def _on_host(event: Any) -> bool:
    return str(event.device_type).endswith("CPU")


def _is_range(event: Any) -> bool:
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith("forerun.")


def _span(event: Any, name: str = "") -> Span:
    return Span(event.time_range.start * 1e-6, event.time_range.end * 1e-6, name)


def _with_axes(flights: Sequence[Any], calls: Sequence[Call]) -> tuple[list[Span], bool]:
    """Collectives in flight with their axes, and whether they match the order of issue.

    A collective that carries several calls (NCCL groups a batch of sends and receives in one
    kernel) breaks the match; the axis is then read from its own name, which tells p2p from others.
    """
    ordered = sorted(flights, key=lambda event: event.time_range.start)
    if len(ordered) == len(calls):
        names = map(awaited, calls)
        return [_span(event, name) for event, name in zip(ordered, names, strict=True)], True
    others = [call.axis for call in calls if call.kind not in ("send", "recv")]
    usual = statistics.mode(others) if others else "dp"
    received = [awaited(call) for call in calls if call.kind == "recv"]
    arriving = statistics.mode(received) if received else "recv"
    return [_span(event, _guess(event.name.lower(), usual, arriving)) for event in ordered], False


def awaited(call: Call) -> str:
    """The axis of what a rank waits for; sends and a pipeline's messages are named as such."""
    if call.kind == "send" or (call.kind == "recv" and call.axis == "pp"):
        return call.kind
    return call.axis


def _guess(name: str, usual: str, arriving: str) -> str:
    return arriving if "recv" in name else "send" if "send" in name else usual


def attribute(seen: StepProfile, message_s: float = 0.0) -> dict[str, float]:
    """Seconds by time term; they sum to the step. `message_s` is what a message takes."""
    terms = dict.fromkeys(TIME_TERMS, 0.0)
    received: dict[Span, float] = {}
    for seconds, mark, running, flight in _segments(seen):
        if mark is not None and mark.name == RECEIVE:
            received[mark] = received.get(mark, 0.0) + seconds
        elif running or flight is None:
            terms[mark.name if mark is not None else "host"] += seconds
        else:
            terms[f"exposed.{flight.name.partition('+')[0]}"] += seconds
    for seconds in received.values():
        terms["exposed.pp"] += min(seconds, message_s)
        terms["bubble"] += max(0.0, seconds - message_s)
    return terms


def _segments(seen: StepProfile) -> list[tuple[float, Span | None, bool, Span | None]]:
    """The step cut where anything begins or ends: (seconds, mark, whether work runs, awaited)."""
    awaited = [span for span in seen.collectives if span.name not in ("send", "recv")]
    edges: list[tuple[float, int, str, Span]] = []
    for what, spans in (
        ("mark", seen.marks),
        ("compute", seen.compute),
        ("flight", awaited),
    ):
        for span in spans:
            begin_s, end_s = max(span.begin_s, seen.step.begin_s), min(span.end_s, seen.step.end_s)
            if end_s > begin_s:
                edges.append((begin_s, 1, what, span))
                edges.append((end_s, 0, what, span))
    edges.append((seen.step.end_s, 2, "end", seen.step))
    edges.sort(key=lambda edge: edge[:2])
    segments: list[tuple[float, Span | None, bool, Span | None]] = []
    marks: list[Span] = []
    flights: list[Span] = []
    running, now_s = 0, seen.step.begin_s
    for time_s, opens, what, span in edges:
        if time_s > now_s:
            waited = min(flights, key=lambda flight: flight.end_s) if flights else None
            segments.append((time_s - now_s, _innermost(marks), running > 0, waited))
            now_s = time_s
        if what == "compute":
            running += 1 if opens else -1
        elif what == "mark":
            _toggle(marks, span, opens)
        elif what == "flight":
            _toggle(flights, span, opens)
    return segments


def _toggle(spans: list[Span], span: Span, opens: int) -> None:
    if opens:
        spans.append(span)
    else:
        spans.remove(span)


def _innermost(marks: list[Span]) -> Span | None:
    return max(marks, key=lambda mark: mark.begin_s, default=None)
