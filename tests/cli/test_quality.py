"""--allow, --accept-risk and what plans, predictions and diffs say of quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forerun import PlanFile, document

LLAMA = "--model llama-2-7b --gpus 8xH100 --seq-len 2048 --global-batch 64".split()
TINY = "--model tiny-1m --gpus 2xcpu --seq-len 64 --global-batch 8".split()
COAT = "--precision fp8 --activations fp8 --optimizer adamw_fp8".split()


def workload(invoke: Any, *flags: str) -> dict[str, Any]:
    result = invoke("plan", *TINY, *flags, "--json", "--top", "1")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["plans"][0]["plan"]["workload"]


def test_plans_are_exact_unless_told(invoke: Any) -> None:
    plain = workload(invoke)
    assert plain["quality"] == ["exact"] and plain["accepted"] == []


@pytest.mark.parametrize(
    ("flags", "quality", "accepted"),
    [
        (["--allow", "published"], 4, []),
        (["--allow", "measured-here,equivalent-start"], 3, []),
        (["--allow", "exact", "--allow", "unquantified"], 5, []),
        (["--accept-risk", "storage,adamw8bit"], 1, ["storage", "adamw8bit"]),
        (["--accept-risk", "storage", "--accept-risk", "COAT"], 1, ["storage"]),
        (["--optimizer", "adamw_fp8"], 1, ["adamw-fp8"]),
    ],
)
def test_what_is_allowed_stands_in_the_workload(
    invoke: Any, flags: list[str], quality: int, accepted: list[str]
) -> None:
    found = workload(invoke, *flags)
    classes = ["exact", "equivalent-start", "measured-here", "published", "unquantified"]
    assert found["quality"] == classes[:quality]
    assert found["accepted"] == accepted


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--allow", "publish"], "allow=publish: unknown name; did you mean published?"),
        (["--accept-risk", "storge"], "accept-risk=storge: unknown name; did you mean storage"),
        (["--recipe", "coat"], "recipe=coat: scales matmuls below 16 bits, and there are none"),
        (["--activations", "fp8", "--recompute", "full"], "recompute full does not keep"),
        (["--precision", "fp8"], "precision=fp8: cpu has no such rate"),
        (["--optimizer", "adamw_offload"], "optimizer=adamw_offload: cpu has no host"),
    ],
)
def test_bad_values_are_one_line(refused: Any, flags: list[str], line: str) -> None:
    assert line in refused(["plan", *TINY, *flags], 2)


def test_storage_wants_the_recipe_that_keeps_operands(refused: Any) -> None:
    flags = "--precision fp8 --recipe rowwise --activations fp8".split()
    assert "use --recipe coat" in refused(["predict", *LLAMA, *flags], 2)


def test_a_plan_says_its_risks_and_whose_evidence_they_have(invoke: Any) -> None:
    result = invoke("plan", *LLAMA, *COAT, "--top", "1")
    assert result.exit_code == 0, result.output
    for line in (
        "quality risk: storage (activations fp8), published",
        "quality risk: adamw-fp8 (optimizer adamw_fp8), published",
        "quality risk: low-precision (compute fp8, recipe coat), published",
        "arXiv 2410.19313",
    ):
        assert line in result.stdout
    assert "_act-fp8_fp8-coat_adamw-fp8" in result.stdout


def test_exact_plans_say_so(invoke: Any) -> None:
    assert "quality: exact, nothing changes results" in invoke("predict", *LLAMA).stdout


def test_json_holds_paper_claim_and_conditions(invoke: Any) -> None:
    found = json.loads(invoke("predict", *LLAMA, *COAT, "--json").stdout)
    assert [risk["technique"] for risk in found["quality"]] == [
        "adamw-fp8", "low-precision", "storage",
    ]  # fmt: skip
    for risk in found["quality"]:
        assert risk["paper"] and risk["claim"] and risk["conditions"] and risk["beyond"] is None


def test_a_larger_model_than_was_tested_is_said(invoke: Any) -> None:
    job = [word.replace("7b", "70b") for word in LLAMA]
    shown = invoke("predict", *job, "--activations", "fp8", "--zero", "3").stdout
    assert (
        "beyond the evidence: llama-2-70b has 69.0 B parameters, the evidence reaches 7 B" in shown
    )


def with_risk(files: tuple[Path, Path]) -> None:
    """The plan of the files with stored activations; its measurement made to fit."""
    import msgspec

    from forerun import Measurement
    from forerun.costmodel.diff import plan_digest

    plan_file = document.read(PlanFile, files[0])
    (setting,) = plan_file.plan.phase.settings
    precision = {"compute": "fp32", "activations": "fp8"}
    setting = msgspec.structs.replace(setting, techniques={"precision": precision})
    phase = msgspec.structs.replace(plan_file.plan.phase, settings=(setting,))
    plan = msgspec.structs.replace(plan_file.plan, phases=(phase,))
    document.write(files[0], msgspec.structs.replace(plan_file, plan=plan))
    measured = document.read(Measurement, files[1])
    document.write(files[1], msgspec.structs.replace(measured, plan_digest=plan_digest(plan)))


def test_reports_of_a_diff_name_the_risks(
    invoke: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    assert "<h2>quality</h2><p>exact" in _html(invoke, files, page)
    with_risk(files)
    shown = _html(invoke, files, page)
    assert "<h2>quality risks</h2>" in shown and "arXiv 2410.19313" in shown
    found = json.loads(invoke("diff", *files, "--json").stdout)
    assert [risk["technique"] for risk in found["quality"]] == ["storage"]


def _html(invoke: Any, files: tuple[Path, Path], page: Path) -> str:
    result = invoke("diff", *files, "--html", page)
    assert result.exit_code == 0, result.output
    return page.read_text()


@pytest.mark.parametrize(
    ("flags", "space", "most"),
    [
        (["--allow", "published"], [], 1.0),
        (["--accept-risk", "storage"], ["--space", "all"], 0.95),
    ],
)
def test_what_is_allowed_is_used_where_it_pays(
    invoke: Any, flags: list[str], space: list[str], most: float
) -> None:
    """Memory is short: layers store activations in fp8 sooner than they compute them again."""
    tight = "--model llama-2-7b --gpus 4xA100-40GB --seq-len 4096 --global-batch 16".split()
    pinned = "--tp 1 --pp 1 --cp 1 --zero 3 --optimizer adamw".split()

    def best(*more: str) -> dict[str, Any]:
        result = invoke("plan", *tight, *pinned, *space, "--top", "1", "--json", *more)
        return json.loads(result.stdout)["plans"][0]

    exact, allowed = best(), best(*flags)
    assert exact["quality"] == []
    assert [risk["technique"] for risk in allowed["quality"]] == ["storage"]
    assert allowed["estimate"]["step_s"]["median"] < most * exact["estimate"]["step_s"]["median"]
