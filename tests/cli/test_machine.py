"""The commands that measure or train, with the machine's part replaced; and the demo for real."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forerun import Estimate, InputError, Measurement, Plan, PlanFile, Profile, document
from forerun.catalogs import load_user_profile, save_user_profile
from forerun.cli import demo
from forerun.cluster import OperatorCurve
from forerun.executors.tuning import Tried, Tuning
from forerun.measurement import StepTimes

Files = tuple[Path, Path]
MeasurementOf = Callable[..., Measurement]


class Machine:
    """Stands for the profiler and the trainer: remembers what was asked, answers at once."""

    def __init__(self, profile: Profile, measurement_of: MeasurementOf) -> None:
        self.profile, self.measurement_of = profile, measurement_of
        self.profiled: list[tuple[str, bool]] = []
        self.ran: list[dict[str, Any]] = []
        self.noise = 0.03

    def profile_machine(
        self, *, device: str, quick: bool, on_progress: Callable[[float, str], None]
    ) -> Profile:
        self.profiled.append((device, quick))
        on_progress(0.5, "linear fp32")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return msgspec.structs.replace(self.profile, date=now)

    def run(self, plan_file: PlanFile, **options: Any) -> Measurement:
        self.ran.append(options)
        options["on_progress"](1, 4, 5.0)
        return self.measurement_of(plan_file)

    def tune(self, search: Callable[[Profile | None], Any], learn: Any, **options: Any) -> Tuning:
        """The last candidate is twice as fast as predicted, the first cannot be held."""
        self.ran.append(options | {"learn": learn})
        plans = search(None)
        step_s = plans[0].estimate.step_s.median
        tried = [
            Tried(plan_file=p, measurement=self.measurement_of(p), turns=((step_s,) * 3,))
            for p in plans
        ]
        tried[0] = Tried(plan_file=plans[0], failed="rank 0 ran out of memory")
        half = (step_s / 2 * (1 + self.noise), step_s / 2, step_s / 2)
        tried[-1] = msgspec.structs.replace(tried[-1], turns=(half,))
        return Tuning(request=options["request"], tried=tuple(tried))


@pytest.fixture
def machine(
    profile: Profile, measurement_of: MeasurementOf, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    stands = Machine(profile, measurement_of)
    monkeypatch.setattr(
        "forerun.executors.profiling.profile_machine", stands.profile_machine, raising=False
    )
    monkeypatch.setattr("forerun.executors.run", stands.run, raising=False)
    monkeypatch.setattr("forerun.executors.tune", stands.tune, raising=False)
    return stands


def test_run_writes_the_measurement(
    invoke: Any, machine: Machine, files: Files, tmp_path: Path
) -> None:
    output = tmp_path / "out.json"
    result = invoke("run", files[0], "-o", output, "--steps", "7", "--warmup", "1", "--json")
    assert result.exit_code == 0, result.output
    assert document.read(Measurement, output) == document.from_json(
        Measurement, result.stdout.encode(), "stdout"
    )
    asked = machine.ran[0]
    assert (asked["steps"], asked["warmup_steps"], asked["data"]) == (7, 1, None)


def test_run_prints_a_few_lines(invoke: Any, machine: Machine, files: Files) -> None:
    shown = invoke("run", files[0]).stdout
    assert "step 100.0 ms" in shown and "loss 5.5000 -> 4.0000" in shown
    assert machine.ran[0]["steps"] is None  # the plan's own


def test_run_refuses_gpus_this_machine_lacks(
    refused: Any, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forerun.executors.machine.num_cuda_devices", lambda: 0)
    text = files[0].read_text().replace('"kind": "cpu"', '"kind": "gpu"')
    files[0].write_text(text)
    line = refused(["run", files[0]], 2)
    assert "gpus=2 x" in line and "2xcpu" in line


def test_run_refuses_data_that_is_empty(refused: Any, files: Files, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in refused(["run", files[0], "--data", tmp_path / "empty.txt"], 2)
    assert "nowhere" in refused(["run", files[0], "--data", tmp_path / "nowhere"], 2)


def test_profile_is_stored_and_copied(invoke: Any, machine: Machine, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    result = invoke("profile", "--quick", "--device", "cpu", "-o", copy, "--json")
    assert result.exit_code == 0, result.output
    assert machine.profiled == [("cpu", True)]
    stored = load_user_profile("cpu")
    assert stored is not None and stored == document.read(Profile, copy)
    assert document.from_json(Profile, result.stdout.encode(), "stdout") == stored


def test_profile_prints_the_best_rate(invoke: Any, machine: Machine) -> None:
    curve = OperatorCurve(
        operator="linear",
        dtype="fp32",
        axes=("m", "n", "k"),
        sizes=((64, 64, 64), (1000, 1000, 1000)),
        forward_s=(1e-4, 0.02),
    )
    machine.profile = msgspec.structs.replace(machine.profile, operators=(curve,))
    assert "matmul fp32, 1 busy: 100 GFLOP/s" in invoke("profile").stdout


@pytest.fixture
def priced(plan_file: PlanFile, monkeypatch: pytest.MonkeyPatch) -> Estimate:
    monkeypatch.setattr("forerun.costmodel.estimate", lambda _: plan_file.estimate, raising=False)
    return plan_file.estimate


@pytest.fixture
def three_plans(plan_file: PlanFile, priced: Estimate, monkeypatch: pytest.MonkeyPatch) -> Any:
    from forerun.planner import Ranked, SearchResult, SearchStats

    def search(*_: object, keep: int, **__: object) -> SearchResult:
        ranked = [
            Ranked(label=f"plan-{n}", plan=plan_file.plan, estimate=priced, lost="")
            for n in range(keep)
        ]
        stats = SearchStats(
            bounded=9, solved=0, simulated=3, gap=0.0, proven=True, limit=None, seconds=0.1
        )
        return SearchResult(plans=tuple(ranked), stats=stats)

    monkeypatch.setattr("forerun.planner.search", search)


JOB = "--model tiny-1m --gpus 2xcpu --seq-len 64 --global-batch 4".split()


@pytest.mark.usefixtures("three_plans", "machine")
def test_tune_keeps_the_fastest_of_three(invoke: Any, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    result = invoke("tune", *JOB, "-o", output, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["label"] == "plan-2" == document.read(PlanFile, output).label
    assert [row["label"] for row in found["tried"]] == ["plan-0", "plan-1", "plan-2"]
    assert found["tried"][2]["error"] == pytest.approx(1.0)
    assert found["tried"][0]["failed"] == "rank 0 ran out of memory"
    assert found["noise"] == pytest.approx(0.03) and found["limit"] is None
    assert found["measurement"]["step_s"]["median"] == found["tried"][2]["measured_s"]
    assert any(line.startswith("error of plan-2: 100.0 % -> ") for line in found["learned"])


@pytest.mark.usefixtures("three_plans", "machine")
def test_tune_prints_noise_and_lessons_and_stores_them(invoke: Any) -> None:
    shown = invoke("tune", *JOB).stdout
    assert "noise floor 3.0 %" in shown
    assert "failed   plan-0: rank 0 ran out of memory" in shown
    assert "off      forward: predicted 30.0 ms, measured 15.0 ms in plan-2" in shown
    assert "learned  spread of a step" in shown
    assert load_user_profile("cpu") is not None


@pytest.mark.usefixtures("three_plans", "machine")
def test_tune_leaves_the_profile_alone_when_told(invoke: Any, machine: Machine) -> None:
    assert invoke("tune", *JOB, "--no-calibrate", "--budget", "5m").exit_code == 0
    assert load_user_profile("cpu") is None
    assert machine.ran[0]["learn"] is None and machine.ran[0]["budget_s"] == 300


def test_tune_refuses_a_budget_without_a_unit(refused: Any) -> None:
    assert "budget=5" in refused(["tune", *JOB, "--budget", "5"], 2)


@pytest.mark.usefixtures("three_plans")
def test_tune_learns_nothing_from_a_busy_machine(invoke: Any, machine: Machine) -> None:
    machine.noise = 0.4
    result = invoke("tune", *JOB)
    assert result.exit_code == 0
    assert "not calibrated" in result.stderr and "noise floor 40.0 %" in result.stdout
    assert load_user_profile("cpu") is None


@pytest.mark.usefixtures("three_plans")
def test_demo_prints_the_diff_document(invoke: Any, machine: Machine, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    result = invoke("demo", "--json", "-o", folder)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) >= {"label", "step", "memory", "terms"}
    assert machine.profiled == [("cpu", True)]
    assert {p.name for p in folder.iterdir()} == {"plan.json", "measured.json", "report.html"}
    again = invoke("diff", folder / "plan.json", folder / "measured.json", "--json")
    assert json.loads(again.stdout) == found


def profile_aged(profile: Profile, age: timedelta, curves: int = 0) -> Profile:
    curve = OperatorCurve(operator="add", dtype="fp32", axes=("n",), sizes=(), forward_s=())
    date = (datetime.now(UTC) - age).isoformat(timespec="seconds")
    return msgspec.structs.replace(profile, date=date, operators=(curve,) * curves)


def test_demo_measures_again_when_the_profile_is_old(machine: Machine, profile: Profile) -> None:
    young = profile_aged(profile, timedelta(hours=1))
    save_user_profile(young)
    assert demo.recent_profile(fresh=False) == young and not machine.profiled
    assert demo.recent_profile(fresh=True) != young
    save_user_profile(profile_aged(profile, timedelta(days=2)))
    demo.recent_profile(fresh=False)
    assert len(machine.profiled) == 2


def test_demo_keeps_a_fuller_profile_that_is_stored(machine: Machine, profile: Profile) -> None:
    full = profile_aged(profile, timedelta(days=2), curves=30)
    save_user_profile(full)
    assert demo.recent_profile(fresh=False) != full
    assert machine.profiled and load_user_profile("cpu") == full


def test_a_step_time_of_zero_has_no_error_and_is_within_any_tolerance(
    invoke: Any, files: Files
) -> None:
    measured = document.read(Measurement, files[1])
    still = msgspec.structs.replace(measured, step_s=StepTimes(median=0.0, p10=0.0, p90=0.0))
    document.write(files[1], still)
    result = invoke("diff", *files, "--json", "--max-error", "0.5")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["step"]["error"] is None


def test_catalog_lists_and_shows(invoke: Any) -> None:
    names = {e["name"] for e in json.loads(invoke("catalog", "models", "--json").stdout)["entries"]}
    assert {"llama-2-7b", "tiny-1m"} <= names
    (entry,) = json.loads(invoke("catalog", "models", "llama-2-7b", "--json").stdout)["entries"]
    assert entry["hidden"] == 4096
    assert "hidden = 4096" in invoke("catalog", "models", "llama-2-7b").stdout
    assert "llama-2-7b" in invoke("catalog", "models").stdout


@pytest.mark.slow
def test_demo_for_real_within_its_time(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "forerun", "demo", "--json", "-o", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=150,  # what the demo may take once installed
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["step"]["measured_s"] > 0
    measured = document.read(Measurement, tmp_path / "measured.json")
    assert measured.loss[-1] < measured.loss[0]
    wire = [t for t in found["terms"] if "@" in t["term"]]
    assert wire and all(term["error"] == 0 for term in wire)


def test_plan_is_checked_before_anything_starts(files: Files) -> None:
    plan = document.read(PlanFile, files[0]).plan
    doubled = msgspec.structs.replace(plan.workload, global_batch_seqs=8)
    with pytest.raises(InputError, match="global-batch"):
        Plan(model=plan.model, cluster=plan.cluster, workload=doubled, phases=plan.phases).check()


def test_tune_hands_the_users_module_on(
    invoke: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.chdir(root)
    module = "examples.mixer:build"
    assert invoke("tune", *JOB[2:], "--model", module).exit_code == 0
    assert machine.ran[-1]["module"] == module
    assert invoke("tune", *JOB).exit_code == 0
    assert machine.ran[-1]["module"] is None
