"""forerun diff and forerun calibrate on files."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forerun import Estimate, Measurement, Plan, PlanFile, Profile, document
from forerun.catalogs import load_user_profile, save_user_profile
from forerun.measurement import StepTimes

Files = tuple[Path, Path]


@pytest.fixture
def slow_run(files: Files) -> Files:
    """A plan and a run that took 25 % longer than predicted, all of it in backward."""
    measured = document.read(Measurement, files[1])
    terms_s = measured.time_terms_s | {"backward": measured.time_terms_s["backward"] + 0.025}
    slow = msgspec.structs.replace(
        measured, step_s=StepTimes(median=0.125, p10=0.12, p90=0.13), time_terms_s=terms_s
    )
    document.write(files[1], slow)
    return files


def test_json_is_the_document_of_the_contract(invoke: Any, slow_run: Files) -> None:
    result = invoke("diff", *slow_run, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert set(found) >= {"label", "step", "memory", "terms"}
    assert found["step"] == {
        "predicted_s": 0.1,
        "measured_s": 0.125,
        "error": pytest.approx(-0.2),
    }
    assert set(found["terms"][0]) == {"term", "unit", "predicted", "measured", "error"}


def test_the_table_shows_signed_percent(invoke: Any, slow_run: Files) -> None:
    shown = invoke("diff", *slow_run).stdout
    assert re.search(r"step time +100\.0 ms +125\.0 ms +-20\.0 %", shown)
    assert re.search(r"all_reduce@dp +4\.0 KiB +4\.0 KiB +\+0\.0 %", shown)


def test_a_difference_beyond_the_tolerance_exits_4(invoke: Any, slow_run: Files) -> None:
    assert invoke("diff", *slow_run, "--max-error", "0.25").exit_code == 0
    result = invoke("diff", *slow_run, "--max-error", "0.1", "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["step"]["error"] < -0.1
    assert result.stderr.count("\n") == 1 and "max-error=0.1" in result.stderr


def test_the_report_is_one_self_contained_page(
    invoke: Any, slow_run: Files, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    assert invoke("diff", *slow_run, "--html", page).exit_code == 0
    text = page.read_text()
    assert "<script" not in text and "http" not in text and " src=" not in text
    assert text.count("<rect class='predicted' x=") == text.count("<rect class='measured' x=") >= 9
    assert "backward" in text and "-20.0 %" in text
    longest = max(float(width) for width in re.findall(r"width='([\d.]+)' height='10'", text))
    assert longest == 420  # the largest term of a group spans the scale


def test_repredict_uses_the_stored_profile(
    invoke: Any, files: Files, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate = document.read(PlanFile, files[0]).estimate

    def price(plan: Plan) -> Estimate:
        assert plan.cluster.profile is not None and plan.cluster.profile.name == "today"
        step_s = msgspec.structs.replace(estimate.step_s, median=0.3)
        return msgspec.structs.replace(estimate, step_s=step_s)

    monkeypatch.setattr("forerun.costmodel.estimate", price, raising=False)
    save_user_profile(msgspec.structs.replace(profile, name="today"))
    found = json.loads(invoke("diff", *files, "--repredict", "--json").stdout)
    assert found["step"]["predicted_s"] == 0.3


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: text.replace('"label"', '"lable"', 1), "lable"),
        (lambda text: text.replace("measurement/1", "measurement/2"), "newer forerun"),
        (lambda text: text.replace("measurement/1", "plan/1"), "not a forerun.measurement"),
        (lambda text: text.replace('"plan_digest": "', '"plan_digest": "0', 1), "another plan"),
        (
            lambda text: text.replace('"tokens_per_s": 2560.0', '"tokens_per_s": "x"'),
            "tokens_per_s",
        ),
    ],
)
def test_a_spoilt_file_is_refused_by_name(
    refused: Any, files: Files, spoil: Callable[[str], str], expected: str
) -> None:
    before = files[1].read_text()
    files[1].write_text(spoil(before))
    assert files[1].read_text() != before
    assert expected in refused(["diff", *files], 2)


def test_a_plan_that_contradicts_itself_is_refused(refused: Any, files: Files) -> None:
    text = files[0].read_text()
    files[0].write_text(text.replace('"dp_replicate": 2', '"dp_replicate": 4'))
    assert "dp_replicate=4" in refused(["diff", *files], 2)


def test_a_full_disk_leaves_no_half_written_report(
    invoke: Any, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "reports"
    monkeypatch.setattr(os, "fsync", full)
    result = invoke("diff", *files, "--html", folder / "report.html")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and "free some space" in result.stderr
    assert list(folder.iterdir()) == []


@pytest.fixture
def priced_as_stored(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = document.read(PlanFile, files[0]).estimate
    monkeypatch.setattr("forerun.costmodel.estimate", lambda _: estimate, raising=False)


@pytest.mark.usefixtures("priced_as_stored")
def test_calibrate_stores_what_it_learned(
    invoke: Any, slow_run: Files, profile: Profile, tmp_path: Path
) -> None:
    save_user_profile(profile)
    copy = tmp_path / "profile.json"
    result = invoke("calibrate", *slow_run, "-o", copy)
    assert result.exit_code == 0, result.output
    stored = load_user_profile("cpu")
    assert stored is not None and stored == document.read(Profile, copy)
    assert stored.scale["backward"] == pytest.approx((0.085 / 0.06) ** 0.5)
    assert "backward: scale 1.000 -> 1.190" in result.stdout


@pytest.mark.usefixtures("priced_as_stored")
def test_calibrate_prints_the_profile_as_json(invoke: Any, slow_run: Files) -> None:
    result = invoke("calibrate", *slow_run, *slow_run, "--json")  # from the plan's own profile
    assert json.loads(result.stdout)["scale"]["backward"] > 1.2


def test_calibrate_without_a_profile_says_how_to_get_one(refused: Any, files: Files) -> None:
    plan_file = document.read(PlanFile, files[0])
    cluster = msgspec.structs.replace(plan_file.plan.cluster, profile=None)
    plan = msgspec.structs.replace(plan_file.plan, cluster=cluster)
    document.write(files[0], msgspec.structs.replace(plan_file, plan=plan))
    assert "run forerun profile first" in refused(["calibrate", *files], 2)
