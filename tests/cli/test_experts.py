"""From a run's loads to a placement of experts and a plan that has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forerun import Measurement, PlanFile, document
from forerun.executors.support import check_executed
from forerun.measurement import ExpertLoad

JOB = "--model tiny-moe-4m --gpus 2xcpu --seq-len 64 --global-batch 8 --ep 2".split()
TOKENS = (900, 10, 10, 10, 30, 30, 20, 14)


@pytest.fixture
def measured(
    plan_file: PlanFile, measurement_of: Callable[..., Measurement], tmp_path: Path
) -> Path:
    """A measurement of four layers, the first expert of each hot."""
    loads = tuple(ExpertLoad(layer=layer, ep=2, tokens=TOKENS, imbalance=1.8) for layer in range(4))
    path = tmp_path / "measured.json"
    document.write(path, measurement_of(plan_file, experts=loads))
    return path


def predict(invoke: Any, *more: object) -> PlanFile:
    result = invoke("predict", *JOB, *more, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    raw = {"label": found["label"], "plan": found["plan"], "estimate": found["estimate"]}
    return document.from_raw(PlanFile, raw, "stdout")


def test_measured_loads_are_placed_and_planned(invoke: Any, measured: Path, tmp_path: Path) -> None:
    placement = tmp_path / "placement.json"
    arguments = ["--ranks", 2, "--slots", 5, "--json", "-o", placement]
    solved = json.loads(invoke("solve", "experts", measured, *arguments).stdout)
    assert [layer["layer"] for layer in solved["layers"]] == ["0", "1", "2", "3"]
    assert solved["layers"][0]["replicas"]["0"] == 2
    plain = predict(invoke)
    loaded = predict(invoke, "--expert-loads", measured)
    placed = predict(invoke, "--expert-placement", placement, "--expert-loads", measured)
    assert plain.label == loaded.label != placed.label
    assert "ep2-placed~" in placed.label
    for file in (plain, loaded, placed):
        check_executed(file.plan)
    setting = placed.plan.phase.technique("expert-placement", 3)
    assert [len(rank) for rank in setting["slots"]] == [5, 5]
    assert setting["imbalance"] == pytest.approx(solved["layers"][3]["imbalance"])
    assert loaded.plan.phase.technique("expert-placement", 0) == {"imbalance": 1.8}
    steps = [file.estimate.step_s.median for file in (plain, placed, loaded)]
    assert steps == sorted(steps), "even loads, then placed ones, then those of the run"


def test_loads_over_other_ranks_are_those_of_all_choices(invoke: Any, measured: Path) -> None:
    job = ["--gpus", "4xcpu", "--ep", 4]  # the later flag counts
    loaded = predict(invoke, *job, "--expert-loads", measured)
    imbalance = loaded.plan.phase.technique("expert-placement", 1)["imbalance"]
    assert imbalance == pytest.approx(910 * 4 / sum(TOKENS))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"placement": [["0","1","2","3","4","5","6","7"]]}', "1 ranks: the plan has ep=2"),
        ('{"placement": [["0","1","2","3"],["4","5","6","6"]]}', "1 of 8 experts lie on no rank"),
        ('{"placement": [["a","b","c","d"],["e","f","g","h"]]}', "experts are not numbers"),
        ('{"layers": [{"layer": "9", "placement": [["0"]]}]}', "does not place layer 0"),
        ('{"replicas": {}}', "has no placement"),
        ("[1]", "not a document of forerun solve experts"),
    ],
)
def test_placements_that_do_not_fit_the_plan(
    refused: Any, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "placement.json"
    path.write_text(text)
    assert message in refused(["predict", *JOB, "--expert-placement", path], 2)


def test_measurements_without_experts_are_refused(
    refused: Any, plan_file: PlanFile, measurement_of: Callable[..., Measurement], tmp_path: Path
) -> None:
    path = tmp_path / "measured.json"
    document.write(path, measurement_of(plan_file))
    for arguments in (["solve", "experts", path, "--ranks", 2],
                      ["predict", *JOB, "--expert-loads", path]):  # fmt: skip
        assert "measured no experts" in refused(arguments, 2)


DENSE = "predict --model tiny-1m --gpus 2xcpu --seq-len 64 --global-batch 8".split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*DENSE, "--capacity-factor", 1.0], "capacity-factor=1.0: tiny-1m has no routed experts"),
        ([*DENSE, "--balance-loss", "global-batch"], "tiny-1m has no routers"),
        ([*DENSE, "--offload", "experts"], "offload.states=experts: tiny-1m has no routed experts"),
        (["predict", *JOB, "--capacity-factor", 0], "capacity-factor"),
        (["predict", *JOB[:-1], 3], "ep=3"),
    ],
)
def test_settings_that_cannot_be_meant(invoke: Any, arguments: list[Any], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_losses_and_capacity_reach_the_plan(invoke: Any) -> None:
    more = ["--balance-loss", "global-batch", "--balance-loss-coef", 0.02, "--capacity-factor", 1.5]
    plan = predict(invoke, *more, "--router-z-loss-coef", 0.001).plan
    assert plan.workload.balance_loss == "global-batch"
    assert (plan.workload.balance_loss_coef, plan.workload.router_z_loss_coef) == (0.02, 0.001)
    experts = plan.model.layers[0].experts
    assert experts is not None and experts.capacity_factor == 1.5


def test_expert_parallelism_is_searched_where_it_runs(invoke: Any) -> None:
    """On this machine's processes ep is free like other axes that run."""
    job = [*JOB[:-2], "--dp", 2, "--zero", 0, "--top", 20]
    found = json.loads(invoke("plan", *job, "--json").stdout)
    degrees = {plan["plan"]["phases"][0]["mesh"]["ep"] for plan in found["plans"]}
    assert degrees == {1, 2}
