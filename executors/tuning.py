"""Plan, run the best few for real, learn, and ask again: the fastest measured plan is kept.

    candidates <- search(profile)                the best few by prediction
    run them in turns                            one session of processes for all of one size
    profile    <- calibrate(profile, measured)   what was learned corrects the prices
    candidates <- search(profile), those not run yet; again, until there are none

Plans of one round run in turns, so that a machine that slows down hurts all alike. The first turn
of a plan measures everything, the others its steps alone, and only of plans that may still win. A
plan that fails is reported and left out. What was measured can be kept in a state file; asked the
same again, tuning goes on from there.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import msgspec

from .. import document
from ..cluster import Profile
from ..document import Document, Value
from ..errors import InputError, RunFailed
from ..measurement import Measurement
from ..plan import Plan, PlanFile
from . import launch
from .measure import report
from .processes import terminated_like_an_exit
from .session import Session
from .support import check_executed

Search = Callable[[Profile | None], Sequence[PlanFile]]
"""The best plans for what is asked, priced with a profile (None: the stored one), best first."""
Learn = Callable[[Sequence[tuple[PlanFile, Measurement]]], Profile | None]
"""What the measured plans make of the profile they were priced with; None where there is none."""

NEAR = 0.1
"""Plans whose median is within this of the best's are run again: noise may have ranked them."""
NOISE_LIMIT = 0.1
"""Runs of one plan that differ by more say nothing about the machine's own speed."""
ASKS = 3
"""Times that the planner is asked, the first included."""
START_S = 10.0
"""Time to start processes, before any was measured. Assumed."""


class Tried(Value, frozen=True, kw_only=True):
    """A candidate, as it was predicted and as it ran."""

    plan_file: PlanFile
    measurement: Measurement | None = None
    """Of its first turn; None for one that failed."""
    turns: tuple[tuple[float, ...], ...] = ()
    """Seconds of the timed steps of every turn."""
    failed: str = ""
    """Why it could not be run to its end."""

    @property
    def medians_s(self) -> list[float]:
        """Median step of every turn."""
        return [statistics.median(turn) for turn in self.turns]

    @property
    def step_s(self) -> float:
        """The (lower) median of the turns' medians; endless for one that failed."""
        return statistics.median_low(self.medians_s) if self.turns else float("inf")

    @property
    def spread(self) -> float:
        """(max - min) / median of the turns' medians; of a single turn, of its steps."""
        seconds = (
            self.medians_s if len(self.turns) > 1 else [x for turn in self.turns for x in turn]
        )
        return (max(seconds) - min(seconds)) / statistics.median(seconds)


class Tuning(Document, frozen=True, kw_only=True):
    """All that was tried, in the order in which it was: the state file, and the answer."""

    SCHEMA: ClassVar[str] = "forerun.tuning/1"

    schema: str = "forerun.tuning/1"
    request: str
    """What was asked: a digest."""
    tried: tuple[Tried, ...] = ()
    limit: Literal["time"] | None = None
    """Set where the budget ended it."""

    @property
    def ran(self) -> list[Tried]:
        """The candidates that ran to their end."""
        return [tried for tried in self.tried if tried.turns]

    @property
    def winner(self) -> Tried:
        """The fastest; RunFailed where none ran."""
        if not self.ran:
            reasons = "; ".join(f"{t.plan_file.label}: {t.failed}" for t in self.tried)
            raise RunFailed(f"no candidate ran: {reasons}")
        return min(self.ran, key=lambda tried: tried.step_s)

    @property
    def noise(self) -> float:
        """The largest spread of one plan."""
        return max(tried.spread for tried in self.ran)

    @property
    def measured(self) -> list[tuple[PlanFile, Measurement]]:
        """Plans with what they measured, to learn from."""
        return [(t.plan_file, measurement_of(t)) for t in self.ran]


def measurement_of(tried: Tried) -> Measurement:
    """The measurement of a candidate's first turn, with the steps of its middle one."""
    assert tried.measurement is not None
    middle = next(t for t in tried.turns if statistics.median(t) == tried.step_s)
    factor = tried.step_s / tried.measurement.step_s.median
    terms = {name: seconds * factor for name, seconds in tried.measurement.time_terms_s.items()}
    return msgspec.structs.replace(
        tried.measurement,
        step_s=report.step_times(middle),
        steps=middle,
        tokens_per_s=tried.measurement.tokens_per_s / factor,
        time_terms_s=terms,
    )


@dataclass(kw_only=True)
class _Turns:
    """Runs candidates until they or the budget are used up."""

    state: Tuning
    session: Session
    steps: int
    warmup_steps: int
    rounds: int
    deadline_s: float
    """On the monotonic clock."""
    keep: Callable[[Tuning], None]
    on_progress: launch.OnProgress | None
    overhead_s: list[float] = field(default_factory=lambda: [START_S])
    """What turns took beyond their predicted steps."""

    def run(self, candidates: Sequence[PlanFile]) -> None:
        """All turns of these candidates."""
        for plan_file in candidates:
            if self._place(plan_file) is None and self._has_time(plan_file):
                self._turn(plan_file)
        for turn in range(1, self.rounds):
            labels = {plan_file.label for plan_file in candidates}
            near = [t for t in self.state.ran
                    if t.plan_file.label in labels and len(t.turns) == turn
                    and t.step_s <= (1 + NEAR) * self.state.winner.step_s]  # fmt: skip
            for tried in near:
                if self._has_time(tried.plan_file):
                    self._turn(tried.plan_file)

    def _place(self, plan_file: PlanFile) -> int | None:
        labels = [tried.plan_file.label for tried in self.state.tried]
        return labels.index(plan_file.label) if plan_file.label in labels else None

    def _has_time(self, plan_file: PlanFile) -> bool:
        """Whether a turn ends within the budget, as far as one can tell; the first always runs."""
        if not self.state.tried or self.deadline_s == float("inf"):
            return True
        place = self._place(plan_file)
        step_s = plan_file.estimate.step_s.median
        if place is not None:
            step_s = self.state.tried[place].step_s
        elif self.state.ran:  # at the pace of those that ran, relative to their prediction
            step_s *= statistics.median(
                t.step_s / t.plan_file.estimate.step_s.median for t in self.state.ran
            )
        needed_s = self._num_steps(place is None) * step_s + statistics.median(self.overhead_s)
        enough = time.monotonic() + needed_s <= self.deadline_s
        if not enough:
            self.state = msgspec.structs.replace(self.state, limit="time")
        return enough

    def _num_steps(self, first: bool) -> int:
        return self.warmup_steps + self.steps + (3 if first else 0)

    def _turn(self, plan_file: PlanFile) -> None:
        """One turn of a candidate, folded into the state."""
        place = self._place(plan_file)
        first = place is None
        began = time.monotonic()
        try:
            check_executed(plan_file.plan)
            _check_short(plan_file.plan)
        except InputError as error:
            self._fold(place, Tried(plan_file=plan_file, failed=str(error)))
            return
        try:
            results = self.session.run(
                plan_file,
                steps=self.steps,
                warmup_steps=self.warmup_steps,
                counted=first,
                on_progress=self.on_progress,
            )
        except RunFailed as error:
            self._fold(place, Tried(plan_file=plan_file, failed=str(error)))
            return
        steps_s = report.slowest(results)
        passed = time.monotonic() - began
        stepping = self._num_steps(first) * statistics.median(steps_s)
        self.overhead_s.append(max(0.0, passed - stepping))
        if place is None:
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            measurement = report.measurement(
                plan_file.plan, plan_file.label, results, {"date": date}
            )
            tried = Tried(plan_file=plan_file, measurement=measurement, turns=(steps_s,))
        else:
            before = self.state.tried[place]
            tried = msgspec.structs.replace(before, turns=(*before.turns, steps_s))
        self._fold(place, tried)

    def _fold(self, place: int | None, tried: Tried) -> None:
        """Put a candidate in its place (None: behind the others); one that failed keeps turns."""
        listed = list(self.state.tried)
        if place is None:
            listed.append(tried)
        elif not tried.failed:
            listed[place] = tried
        self.state = msgspec.structs.replace(self.state, tried=tuple(listed), limit=None)
        self.keep(self.state)


def _check_short(plan: Plan) -> None:
    """Raise InputError for a plan that a few steps say nothing of."""
    local = plan.phase.local_sgd
    if local is not None:
        raise InputError("local-sgd", local.label, "is timed over whole rounds, longer than a turn",
                         "measure it with forerun run")  # fmt: skip


def tune(
    search: Search,
    learn: Learn | None = None,
    *,
    request: str = "",
    rounds: int = 2,
    steps: int = 5,
    warmup_steps: int = 2,
    budget_s: float | None = None,
    data: str | None = None,
    module: str | None = None,
    state_path: Path | None = None,
    on_progress: launch.OnProgress | None = None,
) -> Tuning:
    """What the best plans for a request really take; the fastest is `winner`.

    `search` is asked with the stored profile first and then with what `learn` makes of it, up to
    `ASKS` times, as long as it brings plans that were not tried yet and the machine is quiet enough
    to learn from. No turn begins that would end
    after `budget_s`, but for the first. `state_path` keeps what was tried, turn by turn; when it
    holds the same `request` already, tuning goes on from it. `data` and `module` are as in
    `launch.run`.

    Raises RunFailed when no candidate ran.
    """
    if rounds < 1:
        raise InputError("rounds", rounds, "not positive", "give 1 or more")
    started = time.monotonic()

    def keep(state: Tuning) -> None:
        if state_path is not None:
            document.write(state_path, state)

    with terminated_like_an_exit(), Session(data, module) as session:
        turns = _Turns(
            state=read_state(state_path, request),
            session=session,
            steps=steps,
            warmup_steps=warmup_steps,
            rounds=rounds,
            deadline_s=started + budget_s if budget_s is not None else float("inf"),
            keep=keep,
            on_progress=on_progress,
        )
        profile: Profile | None = None
        for _ in range(ASKS):
            candidates = search(profile)
            known = {tried.plan_file.label for tried in turns.state.tried}
            turns.run(candidates)
            if known >= {plan_file.label for plan_file in candidates} or learn is None:
                break
            if not turns.state.ran or turns.state.limit is not None:
                break
            if turns.state.noise > NOISE_LIMIT:
                break
            profile = learn(turns.state.measured)
            if profile is None:
                break
    _ = turns.state.winner
    keep(turns.state)
    return turns.state


def read_state(path: Path | None, request: str) -> Tuning:
    """What a state file holds of a request; nothing where there is none yet."""
    if path is None or not path.exists():
        return Tuning(request=request)
    found = document.read(Tuning, path)
    if found.request != request:
        raise InputError("state", path, "was written for another request",
                         "give another file, or ask the same")  # fmt: skip
    return found
