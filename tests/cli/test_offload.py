"""--offload, --keep and budgets of memory on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forerun import PlanFile, document
from forerun.errors import InputError, RunFailed
from forerun.executors import machine

JOB = "--model llama-2-7b --gpus 8xA100-80GB --seq-len 4096 --global-batch 8 --zero 3".split()


def predicted(invoke: Any, *more: str) -> dict[str, Any]:
    result = invoke("predict", *JOB, *more, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def settings(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [s["techniques"] for s in found["plan"]["phases"][0]["settings"]]


@pytest.mark.parametrize(
    ("text", "chosen", "label"),
    [
        ("0.5", {"activations": 0.5}, "offload0.5x30"),
        ("activations", {"activations": 1.0}, "offload1x30"),
        (
            "activations=0.25,rest=recompute",
            {"activations": 0.25, "rest": "recompute"},
            "offload0.25-tokensx30",
        ),
        ("optimizer", {"states": "optimizer"}, "optimizer-off"),
    ],
)
def test_spellings(invoke: Any, text: str, chosen: dict[str, Any], label: str) -> None:
    found = predicted(invoke, "--offload", text)
    assert settings(found)[0]["offload"] == chosen
    assert label in found["label"]
    if "activations" in chosen:
        assert "offload" not in settings(found)[1], "the last two layers keep theirs"
    assert found["estimate"]["bytes_off_device"]["host"] > 0
    assert found["estimate"]["bytes_copied"]["out@host"] > 0


def test_tensors_to_keep(invoke: Any) -> None:
    found = predicted(invoke, "--recompute", "tensors", "--keep", "x1, o,lse")
    assert settings(found) == [
        {"precision": {"compute": "bf16"},
         "recompute": {"mode": "tensors", "keep": ["x1", "o", "lse"]}}
    ]  # fmt: skip
    assert "ac-tensors~" in found["label"]
    plain = predicted(invoke)
    terms = [x["estimate"]["memory_terms_bytes"]["activations"] for x in (found, plain)]
    assert terms[0] < 0.5 * terms[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--offload", "1.5"], "offload.activations=1.5: not a fraction; give 0 to 1"),
        (["--offload", "activations=much"], "offload.activations=much: not a number"),
        (["--offload", "optimiser"], "offload=optimiser: unknown name; did you mean optimizer"),
        (["--offload", "0.5,tier=tape"], "offload.tier=tape: not a choice; use host or disk"),
        (["--offload", "rest=recompute"], "needs a fraction of tokens"),
        (["--offload", "0.5,tier=disk"], "offload.tier=disk: gpu has no disk link"),
        (["--keep", "o"], "keep=o: names tensors for --recompute tensors alone"),
        (
            ["--recompute", "tensors", "--keep", "attention.on"],
            "keep=attention.on: unknown name; did you mean attention.in",
        ),
        (["--offload", "0.5,rest=recompute", "--recompute", "full"], "recompute=full says already"),
        (["--host-memory", "lots"], "host-memory=lots: not a size"),
        (["--device-memory", "0"], "device-memory=0: not a positive size"),
    ],
)
def test_bad_input(refused: Any, more: list[str], message: str) -> None:
    line = refused(["predict", *JOB, *more], 2)
    assert message.replace("gpu has", "") in line.replace("A100-SXM-80GB has", "")


def test_budgets(invoke: Any) -> None:
    enough = predicted(invoke, "--offload", "1", "--host-memory", "1TB")
    short = predicted(invoke, "--offload", "1", "--host-memory", "10GB")
    assert [x["estimate"]["fits"] for x in (enough, short)] == ["yes", "no"]
    small = predicted(invoke, "--device-memory", "20GiB")
    assert small["estimate"]["capacity_bytes"] == 20 * 2**30
    assert small["estimate"]["fits"] == "no"


@pytest.fixture
def plan_file(invoke: Any, tmp_path: Path) -> PlanFile:
    path = tmp_path / "plan.json"
    job = "--model tiny-1m --gpus 2xcpu --seq-len 64 --global-batch 4 --zero 1".split()
    result = invoke("predict", *job, "--offload", "1,optimizer", "-o", path)
    assert result.exit_code == 0, result.output
    return document.read(PlanFile, path)


def test_a_run_says_how_much_the_host_lacks(plan_file: PlanFile) -> None:
    needed = 2 * plan_file.estimate.bytes_off_device["host"]
    pool = msgspec.structs.replace(plan_file.plan.cluster.pools[0], host_memory_bytes=1000)
    cluster = msgspec.structs.replace(plan_file.plan.cluster, pools=(pool,))
    plan = msgspec.structs.replace(plan_file.plan, cluster=cluster)
    with pytest.raises(InputError, match=r"host-memory=1000 B: offload needs .* more; offload"):
        machine.check_offload(msgspec.structs.replace(plan_file, plan=plan), None)
    assert needed > 1000


def test_a_run_needs_a_folder_and_room(
    plan_file: PlanFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="offload-dir=/nowhere: no folder"):
        machine.check_offload(plan_file, Path("/nowhere"))
    machine.check_offload(plan_file, tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("Full", (), {"free": 10}))
    with pytest.raises(RunFailed, match=r"the disk is full: offload needs .*, 10 B are free"):
        machine.check_offload(plan_file, tmp_path)
