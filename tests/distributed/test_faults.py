"""Ranks killed at random: the curve is that of one run, and nothing is left broken or running."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import families
import msgspec
import pytest
import running

from forerun import PlanFile
from forerun.executors import job, launch
from forerun.executors.checkpoints import folder

FAULTY = {
    "ddp accumulation": 2,
    "zero3 recompute full": 2,
    "bf16 tp-sp": 2,
    "interleaved": 2,
    "pp2 x zero1": 4,
}
"""Families by their ranks."""
TRIALS, STEPS = 10, 12


def file_of(family: str, like: PlanFile) -> PlanFile:
    """The plan of a family under an estimate that is not looked at."""
    plan = families.make_plan(families.GPT, **families.FAMILIES[FAULTY[family]][family])
    return msgspec.structs.replace(like, plan=plan, label=plan.label)


class Killer:
    """Kills one rank after a step, or while the ranks are still starting."""

    def __init__(self, draw: random.Random, world: int) -> None:
        self.step, self.rank = draw.randrange(1, STEPS), draw.randrange(world)
        self.killed = False

    def __call__(self, step: int, steps: int, loss: float) -> None:
        if step == self.step and not self.killed:
            self.killed = True
            running.kill_rank(self.rank)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAULTY)
def test_kill_any_rank_at_any_step(
    plan_file: PlanFile, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "temporary"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    asked = file_of(family, plan_file)
    once = launch.run(asked, steps=STEPS, warmup_steps=0)
    draw = random.Random(family)
    resumed_from: list[int] = []
    for trial in range(TRIALS):
        place = tmp_path / f"trial-{trial}"
        killer, notes = Killer(draw, FAULTY[family]), list[str]()
        training = job.Training(checkpoint=str(place), every=draw.randrange(1, 5), keep=2)
        found = launch.run(
            asked, steps=STEPS, on_progress=killer, on_note=notes.append, training=training
        )
        assert found.loss == once.loss, (trial, killer.step, killer.rank)
        assert killer.killed and running.workers() == [] and not any(scratch.iterdir())
        for step in folder.steps(place):
            path = place / folder.name_of(step)
            assert folder.damage(path, folder.read(path)) == ""
        assert folder.steps(place)[0] == STEPS and not list(place.glob(".partial*"))
        resumed_from += restarts(notes)
    print(f"{family}: {TRIALS} trials, went on from steps {resumed_from}")


def restarts(notes: list[str]) -> list[Any]:
    """The steps from which restarted ranks went on."""
    return [int(note.rpartition(" ")[2]) for note in notes if note.startswith("warning: restart")]
