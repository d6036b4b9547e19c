"""`--model package.module:function` from plan to diff."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forerun import Measurement, PlanFile, document

ROOT = Path(__file__).resolve().parents[2]
MIXER, TRANSFORMER = "examples.mixer:build", "examples.transformer:build"
DIVIDED = "examples.divided:build"
JOB = ("--gpus", "2xcpu", "--seq-len", "64", "--global-batch", "16")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


def test_plan_and_predict_a_module(invoke: Any, tmp_path: Path) -> None:
    result = invoke("plan", "--model", MIXER, *JOB, "-o", tmp_path / "plan.json", "--json")
    assert result.exit_code == 0, result.output
    plans = json.loads(result.stdout)["plans"]
    meshes = [found["plan"]["phases"][0]["mesh"] for found in plans]
    assert plans and all((m["tp"], m["pp"], m["cp"], m["ep"]) == (1, 1, 1, 1) for m in meshes)
    plan = document.read(PlanFile, tmp_path / "plan.json").plan
    assert plan.model.traced is not None and plan.model.traced.target == MIXER
    predicted = invoke("predict", "--model", MIXER, *JOB, "--recompute", "full", "--json")
    estimate = json.loads(predicted.stdout)["estimate"]
    assert estimate["time_terms_s"]["recompute"] > 0


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        (("--tp", 2), "has no tp_plan that it can be divided by"),
        (("--pp", 2), "has no pp_plan that it can be divided by"),
        (("--sp",), "does not divide a module of one's own"),
        (("--cp", 2), "does not divide a module of one's own"),
        (("--ep", 2), "does not divide a module of one's own"),
    ],
)
def test_axes_that_cannot_divide_a_module_are_refused(
    refused: Any, axis: tuple[Any, ...], said: str
) -> None:
    line = refused(["plan", "--model", MIXER, *JOB, *map(str, axis)], 2)
    assert axis[0].strip("-") in line and said in line


def test_what_a_module_tells_is_searched(invoke: Any, refused: Any) -> None:
    """Tensor and pipeline parallelism by its plans; only degrees that it runs at."""
    asked = ("--model", DIVIDED, "--gpus", "4xcpu", "--seq-len", "64", "--global-batch", "16")
    found = json.loads(invoke("plan", *asked, "--tp", "2", "--top", "20", "--json").stdout)["plans"]
    phases = [plan["plan"]["phases"][0] for plan in found]
    assert {phase["mesh"]["pp"] for phase in phases} == {1, 2}
    assert {phase["schedule"] for phase in phases} <= {"gpipe", "1f1b", "interleaved"}
    three = ("--model", DIVIDED, "--gpus", "3xcpu", "--seq-len", "64", "--global-batch", "15")
    line = refused(["predict", *three, "--tp", "3"], 2)
    assert "does not run cut in so many parts; use one of 2, 4" in line


def test_unknown_functions_are_refused(refused: Any) -> None:
    assert "did you mean build?" in refused(["plan", "--model", "examples.mixer:bild", *JOB], 2)


def test_a_plan_runs_code_only_when_told_to(refused: Any, invoke: Any, tmp_path: Path) -> None:
    """Reading the plan imports nothing; another module is not taken for the planned one."""
    path = tmp_path / "plan.json"
    assert invoke("predict", "--model", MIXER, *JOB, "-o", path).exit_code == 0
    assert f"add --model {MIXER}" in refused(["run", path], 2)
    assert "as it was when it was planned" in refused(["run", path, "--model", TRANSFORMER], 2)
    program = (
        "import sys\nfrom pathlib import Path\nfrom forerun.cli.plan_files import read_plan_file\n"
        "read_plan_file(Path(sys.argv[1]))\nprint('examples' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True,
                          text=True, env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"})  # fmt: skip
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("target", "axes"),
    [
        (MIXER, "--dp 2"),
        pytest.param(DIVIDED, "--tp 2 --recompute full", marks=pytest.mark.slow),
    ],
)
def test_a_module_is_planned_run_and_compared(
    invoke: Any, tmp_path: Path, target: str, axes: str
) -> None:
    """Two processes: images of the module's own under DDP, the corpus under tp with recompute."""
    plan, measured = tmp_path / "plan.json", tmp_path / "measured.json"
    given = (*axes.split(), "--micro-batch", "4")
    assert invoke("predict", "--model", target, *JOB, *given, "-o", plan).exit_code == 0
    ran = invoke("run", plan, "--model", target, "--steps", "6", "--warmup", "2", "-o", measured)
    assert ran.exit_code == 0, ran.output
    loss = document.read(Measurement, measured).loss
    assert loss[-1] < loss[0]
    compared = json.loads(invoke("diff", plan, measured, "--json").stdout)
    assert abs(compared["memory"]["error"]) < 0.1
    wire = [term for term in compared["terms"] if "@" in term["term"]]
    assert wire and all(abs(term["error"]) < 1e-9 for term in wire)
