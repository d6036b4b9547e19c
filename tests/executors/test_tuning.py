"""Tuning's turns, budget, memory and second thoughts, with the processes replaced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forerun import InputError, PlanFile, Profile, RunFailed, document
from forerun.executors import tuning
from forerun.executors.measure.report import RankResult
from forerun.executors.tuning import Tuning, tune

replace = msgspec.structs.replace


class Machine:
    """Stands for a session: each plan takes the steps it is given, and so much to start."""

    def __init__(self) -> None:
        self.steps_s: dict[str, list[float]] = {}
        self.ran: list[tuple[str, bool]] = []
        self.clock = 0.0
        self.start_s = 2.0

    def __call__(self, data: object, module: object) -> Machine:
        return self

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def run(
        self, plan_file: PlanFile, *, steps: int, warmup_steps: int, counted: bool, **more: Any
    ) -> list[RankResult]:
        label = plan_file.label
        self.ran.append((label, counted))
        left = self.steps_s[label]
        step_s = left.pop(0) if len(left) > 1 else left[0]
        self.clock += self.start_s + step_s * (steps + warmup_steps + 3 * counted)
        if step_s <= 0:
            raise RunFailed(f"rank 1 ran out of memory in {label}")
        return [RankResult(rank=0, coordinates={}, steps_s=(step_s,) * steps, loss=(1.0,),
                           profiled_s={"forward": step_s})]  # fmt: skip


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(tuning, "Session", made)
    monkeypatch.setattr(tuning.time, "monotonic", lambda: made.clock)
    return made


@pytest.fixture
def plans(plan_file: PlanFile) -> list[PlanFile]:
    return [replace(plan_file, label=f"plan-{n}") for n in range(4)]


def test_near_candidates_run_in_turns_and_the_middle_one_counts(
    machine: Machine, plans: list[PlanFile]
) -> None:
    machine.steps_s = {"plan-0": [2.0, 2.4, 2.2], "plan-1": [2.1, 1.0, 1.2], "plan-2": [9.0]}
    found = tune(lambda _: plans[:3], rounds=3)
    assert machine.ran == [
        ("plan-0", True), ("plan-1", True), ("plan-2", True),
        ("plan-0", False), ("plan-1", False), ("plan-1", False),
    ], "what is too slow has one turn, what fell behind two"  # fmt: skip
    assert found.winner.plan_file.label == "plan-1" and found.winner.step_s == 1.2
    assert found.noise == pytest.approx(1.1 / 1.2)
    measured = tuning.measurement_of(found.winner)
    assert measured.step_s.median == 1.2
    assert measured.time_terms_s["forward"] == pytest.approx(1.2)
    assert measured.tokens_per_s == pytest.approx(plans[0].plan.workload.global_batch_tokens / 1.2)


def test_what_fails_is_left_out(machine: Machine, plans: list[PlanFile]) -> None:
    machine.steps_s = {"plan-0": [0.0], "plan-1": [1.0]}
    setting = plans[2].plan.phase.settings[0]
    setting = replace(setting, techniques={"attention": {"kernel": "unfused"}})
    unknown = replace(plans[2].plan.phase, settings=(setting,))
    plans[2] = replace(plans[2], plan=replace(plans[2].plan, phases=(unknown,)))
    found = tune(lambda _: plans[:3], rounds=1)
    assert found.winner.plan_file.label == "plan-1"
    assert "ran out of memory in plan-0" in found.tried[0].failed
    assert "cannot be run yet" in found.tried[2].failed
    machine.steps_s["plan-1"] = [0.0]
    with pytest.raises(RunFailed, match=r"no candidate ran: plan-0: .*; plan-1: .*"):
        tune(lambda _: plans[:2])


def test_the_planner_is_asked_again_with_what_was_learned(
    machine: Machine, plans: list[PlanFile], profile: Profile
) -> None:
    machine.steps_s = {"plan-0": [2.0], "plan-1": [3.0], "plan-2": [1.0]}
    asked: list[Profile | None] = []

    def search(known: Profile | None) -> Sequence[PlanFile]:
        asked.append(known)
        return plans[:2] if known is None else [plans[2], plans[0]]

    learned = replace(profile, spread=0.5)
    seen: list[int] = []

    def learn(runs: Sequence[Any]) -> Profile:
        seen.append(len(runs))
        return learned

    found = tune(search, learn, rounds=1)
    assert asked == [None, learned, learned] and seen == [2, 3]
    assert [tried.plan_file.label for tried in found.tried] == ["plan-0", "plan-1", "plan-2"]
    assert found.winner.plan_file.label == "plan-2"
    machine.steps_s["plan-0"], seen[:] = [2.0, 2.5], []
    tune(search, learn, rounds=2)
    assert seen == [], "nothing is learned from a busy machine"


def test_no_turn_begins_that_would_end_too_late(machine: Machine, plans: list[PlanFile]) -> None:
    machine.steps_s = {f"plan-{n}": [1.0] for n in range(4)}
    found = tune(lambda _: plans, rounds=2, steps=5, warmup_steps=2, budget_s=30)
    assert found.limit == "time"
    assert [label for label, _ in machine.ran] == ["plan-0", "plan-1"], "10 steps and 2 s each"
    assert machine.clock <= 30
    machine.ran.clear()
    first = tune(lambda _: plans, budget_s=0.1)
    assert len(machine.ran) == 1 and first.limit == "time", "one runs whatever the budget"


def test_a_state_file_is_gone_on_from(
    machine: Machine, plans: list[PlanFile], tmp_path: Path
) -> None:
    path = tmp_path / "state.json"
    machine.steps_s = {f"plan-{n}": [1.0 + n / 50] for n in range(3)}
    tune(lambda _: plans[:3], request="a", budget_s=20, state_path=path)
    before = document.read(Tuning, path)
    assert len(before.tried) == 1 and before.limit == "time"
    found = tune(lambda _: plans[:3], request="a", state_path=path)
    assert [label for label, _ in machine.ran] == [
        "plan-0", "plan-1", "plan-2", "plan-0", "plan-1", "plan-2",
    ]  # fmt: skip
    assert document.read(Tuning, path) == found and found.limit is None
    tune(lambda _: plans[:3], request="a", state_path=path)
    assert len(machine.ran) == 6, "nothing is left to do"
    with pytest.raises(InputError, match=r"state=.*was written for another request"):
        tune(lambda _: plans[:3], request="b", state_path=path)


def test_rounds_below_one(plans: list[PlanFile]) -> None:
    with pytest.raises(InputError, match="rounds=0"):
        tune(lambda _: plans, rounds=0)
