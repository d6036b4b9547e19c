"""Probes: what they change in a plan, what they conclude from two runs, and what fails them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from forerun import Measurement, PlanFile
from forerun.catalogs import load_technique
from forerun.errors import InputError, RunFailed
from forerun.executors import probing
from forerun.executors.probing import (
    OPTIMIZERS,
    VARIANTS,
    check_converging,
    probe,
    tail,
    with_technique,
)


def test_every_variant_is_a_technique_of_the_catalog() -> None:
    for name in (*VARIANTS, *OPTIMIZERS):
        assert load_technique(name).name == name


def test_a_technique_is_added_to_every_layer(plan_file: PlanFile) -> None:
    plan = plan_file.plan
    found = with_technique(plan, "halo", {"recipe": "halo1"})
    assert found.phase.technique("precision") == {"compute": "int8", "recipe": "halo1"}
    assert found.phase.technique("recompute") == plan.phase.technique("recompute")
    assert with_technique(plan, "adamw8bit", {}).workload.optimizer == "adamw8bit"


@pytest.mark.parametrize(
    ("technique", "settings", "line"),
    [
        ("halo", {"recip": "halo1"}, "setting=recip: unknown name; did you mean recipe?"),
        ("adamw8bit", {"block": 3}, "adamw8bit has no settings"),
        ("zero", {}, "technique=zero: unknown name"),
    ],
)
def test_bad_settings_are_named(
    plan_file: PlanFile, technique: str, settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError, match=line.replace("?", r"\?")):
        with_technique(plan_file.plan, technique, settings)


class Runs:
    """In place of processes: losses by plan and seed."""

    def __init__(self, make: Callable[..., Measurement], gap: Callable[[int], float]) -> None:
        self.make, self.gap = make, gap
        self.asked: list[tuple[str, int]] = []

    def __call__(self, runs: Any, plan_file: PlanFile, seed: int, what: str) -> Measurement:
        optimizer = plan_file.plan.workload.optimizer
        self.asked.append((optimizer, seed))
        factor = 1.0 if optimizer == "adamw" else 1.0 + self.gap(seed)
        losses = [5.0 - 0.1 * step for step in range(7)] + [(4.0 + 0.1 * seed) * factor] * 3
        peak = 900 if optimizer == "adamw" else 600
        return self.make(plan_file, loss=tuple(losses), peak_memory_bytes=peak)


@pytest.fixture
def pair(plan_file: PlanFile) -> tuple[PlanFile, PlanFile]:
    other = with_technique(plan_file.plan, "adamw-fp8", {})
    return plan_file, msgspec.structs.replace(plan_file, plan=other, label="with")


def probed(
    pair: tuple[PlanFile, PlanFile], runs: Runs, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> probing.Probed:
    def run(own: Any, plan_file: PlanFile, seed: int, what: str) -> Measurement:
        return runs(own, plan_file, seed, what)

    monkeypatch.setattr(probing._Runs, "run", run)
    return probe(*pair, "adamw-fp8", steps=10, **options)


def test_gaps_are_paired_by_seed(
    pair: tuple[PlanFile, PlanFile],
    measurement_of: Callable[..., Measurement],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gaps = [0.01, 0.03, 0.02]
    runs = Runs(measurement_of, lambda seed: gaps[seed])
    found = probed(pair, runs, monkeypatch)
    assert runs.asked == [(name, s) for s in range(3) for name in ("adamw", "adamw_fp8")]
    assert found.gaps == pytest.approx(gaps)
    assert found.loss_gap == pytest.approx(0.02)
    assert found.loss_noise == pytest.approx(statistics.stdev(gaps) / 3**0.5)
    assert found.memory_ratio == pytest.approx(600 / 900) and found.step_ratio == 1.0
    assert found.limit is None


def test_the_budget_leaves_two_seeds(
    pair: tuple[PlanFile, PlanFile],
    measurement_of: Callable[..., Measurement],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = Runs(measurement_of, lambda seed: 0.0)
    found = probed(pair, runs, monkeypatch, seeds=5, budget_s=0.0)
    assert len(found.gaps) == 2 and found.limit == "time"


def test_what_diverges_is_no_evidence(
    pair: tuple[PlanFile, PlanFile],
    measurement_of: Callable[..., Measurement],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = Runs(measurement_of, lambda seed: 2.0)
    with pytest.raises(RunFailed, match="adamw-fp8: diverged, its loss went from 5 to 12"):
        probed(pair, runs, monkeypatch)


def test_a_baseline_that_does_not_fall_tells_nothing_of_the_other() -> None:
    check_converging([5.0, 5.1], [5.0, 5.2], "x")
    with pytest.raises(RunFailed):
        check_converging([5.0, 5.1], [5.0, 4.9], "x")
    assert tail([9.0, 9.0, 9.0, 1.0]) == 1.0 and tail([2.0]) == 2.0


@pytest.mark.parametrize(
    ("options", "line"), [({"seeds": 1}, "seeds=1"), ({"seeds": 2, "steps": 1}, "steps=1")]
)
def test_too_little_is_refused(
    pair: tuple[PlanFile, PlanFile], options: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError, match=line):
        probe(*pair, "adamw-fp8", **{"steps": 10, **options})


def test_a_technique_that_is_there_already_is_refused(plan_file: PlanFile) -> None:
    with pytest.raises(InputError, match="is what the baseline does already"):
        probe(plan_file, plan_file, "precision", steps=4)
