"""forerun probe: real runs, the evidence that they leave, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forerun.catalogs import load_cluster, load_evidence, load_model, save_evidence
from forerun.errors import RunFailed
from forerun.evidence import Evidence, family_of, for_job
from forerun.executors.probing import Probed, Side
from forerun.planner import Pins, SearchResult, risks, search
from forerun.planner.quality import classes_up_to, is_allowed
from forerun.workload import Workload

TINY = "--model tiny-1m --gpus 1xcpu --seq-len 32 --global-batch 4 --micro-batch 4".split()
H100 = "--model llama-2-7b --gpus 8xH100 --seq-len 2048 --global-batch 64".split()


def evidence(**changes: Any) -> Evidence:
    model = load_model("llama-2-7b")
    own = Evidence(
        technique="storage", setting="activations fp8", model=model.name, family=family_of(model),
        num_params=model.num_params, device=load_cluster("8xH100").pools[0].device.name,
        optimizer="adamw", learning_rate=1e-4, seq_tokens=2048, global_batch_seqs=8, steps=100,
        seeds=3, loss=2.0, loss_gap=0.001, loss_noise=0.002, step_ratio=1.1, memory_ratio=0.7,
        date="2026-11-29",
    )  # fmt: skip
    return msgspec.structs.replace(own, **changes)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results without runs."""
    sides = [
        Side(label=label, losses=losses, step_s=0.1, peak_memory_bytes=peak)
        for label, losses, peak in (("base", (4.0, 4.2), 900.0), ("with", (4.01, 4.2), 600.0))
    ]

    def probe(*_: Any, steps: int, **__: Any) -> Probed:
        return Probed(baseline=sides[0], variant=sides[1], steps=steps)

    monkeypatch.setattr("forerun.executors.probe", probe, raising=False)


@pytest.mark.slow
def test_real_runs_leave_evidence(invoke: Any, user_folder: Path) -> None:
    """fp32 against stored activations, in a process of its own."""
    check(invoke, user_folder)


@pytest.mark.usefixtures("made_up")
def test_a_probe_leaves_evidence(invoke: Any, user_folder: Path) -> None:
    check(invoke, user_folder)
    shown = invoke("probe", "storage", *TINY).stdout
    assert "the planner may use it (--allow measured-here)" in shown


def check(invoke: Any, user_folder: Path) -> None:
    """What the probe says, what it keeps, and who shows it."""
    result = invoke("probe", "storage", *TINY, "--steps", "4", "--seeds", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["technique"] == "storage" and found["setting"] == "activations fp8"
    assert found["seeds"] == 2 and found["steps"] == 4 and found["limit"] is None
    assert abs(found["loss_gap"]) < 0.01 and found["harmless"]
    assert 0.5 < found["memory_ratio"] < 1.0
    assert len(found["baseline"]["losses"]) == len(found["variant"]["losses"]) == 2
    assert Path(found["evidence"]).is_relative_to(user_folder / "evidence")
    (own,) = load_evidence()
    assert own.model == "tiny-1m" and own.device == "cpu" and own.loss_gap == found["loss_gap"]
    shown = json.loads(invoke("catalog", "techniques", "storage", "--json").stdout)
    assert shown["entries"][0]["measured_here"][0]["setting"] == "activations fp8"
    assert "measured here: activations fp8" in invoke("catalog", "techniques").stdout
    flags = [*TINY, "--activations", "fp8", "--json"]
    (risk,) = json.loads(invoke("predict", *flags).stdout)["quality"]
    assert risk["quality"] == "measured-here" and risk["claim"].startswith("Measured here: loss")


def test_a_probe_that_fails_leaves_none(
    refused: Any, monkeypatch: pytest.MonkeyPatch, user_folder: Path
) -> None:
    def diverges(*_: Any, **__: Any) -> Any:
        raise RunFailed("probe: halo: diverged; nothing was recorded")

    monkeypatch.setattr("forerun.executors.probe", diverges, raising=False)
    line = refused(["probe", "halo", *TINY, "--json"], 1)
    assert "diverged" in line and not (user_folder / "evidence").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["hallo"], "technique=hallo: unknown name; did you mean halo?"),
        (["halo", "--setting", "recipe"], "setting=recipe: is no NAME=VALUE"),
        (["halo", "--setting", "recip=halo1"], "setting=recip: unknown name"),
        (["zero"], "technique=zero: unknown name"),
        (["halo", "--budget", "5"], "budget=5"),
        (["halo", "--seeds", "1"], "seeds=1: tell no noise"),
    ],
)
def test_bad_input_is_one_line(refused: Any, arguments: list[str], line: str) -> None:
    assert line in refused(["probe", *arguments, *TINY], 2)


def test_evidence_is_for_models_and_devices_like_its_own() -> None:
    model, cluster = load_model("llama-2-7b"), load_cluster("8xH100")
    kept = evidence()
    others = [
        evidence(device="cpu"), evidence(family="decoder gelu layernorm rope"),
        evidence(num_params=model.num_params / 3),
    ]  # fmt: skip
    assert for_job([kept, *others], model, cluster) == (kept,)


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({}, True),
        ({"loss_gap": 0.03}, False),
        ({"loss_gap": 0.03, "loss_noise": 0.02}, True),
        ({"setting": "activations mxfp8"}, False),
        ({"technique": "halo"}, False),
    ],
)
def test_the_planner_uses_what_is_harmless(changes: dict[str, Any], allowed: bool) -> None:
    workload = Workload(seq_tokens=2048, global_batch_seqs=64, evidence=(evidence(**changes),))
    here = msgspec.structs.replace(workload, quality=("exact", "equivalent-start", "measured-here"))
    assert not is_allowed(workload, "storage", "activations fp8")
    assert is_allowed(here, "storage", "activations fp8") == allowed


def test_a_search_tries_what_was_measured_here() -> None:
    """On cards whose int8 matmuls are fast the rotated ones win, with evidence and leave to use it;
    without either the plan stays in bf16."""
    model, cluster = load_model("llama-2-7b"), load_cluster("8xRTX4090")
    own = evidence(
        technique="halo", setting="compute int8, recipe halo1-hq", device="GeForce RTX 4090",
        settings={"precision": {"compute": "int8", "recipe": "halo1-hq"}},
    )  # fmt: skip
    own = msgspec.structs.replace(own, device=cluster.pools[0].device.name)
    pins = Pins(tp=1, pp=1, cp=1, zero=3, micro_batch=4, recompute="full", runtime="eager",
                offload=0.0, dp_shard=8)  # fmt: skip
    found: list[SearchResult] = []
    for quality in (classes_up_to(["exact"]), classes_up_to(["measured-here"])):
        workload = Workload(seq_tokens=2048, global_batch_seqs=32, quality=quality, evidence=(own,))
        found.append(search(model, cluster, workload, pins, keep=2, fit="marginal"))
    computes = [result.plans[0].plan.phase.compute_dtype for result in found]
    assert computes == ["bf16", "int8"]
    steps = [result.plans[0].estimate.step_s.median for result in found]
    assert steps[1] < steps[0] and found[1].stats.bounded > found[0].stats.bounded
    first, *others = found[1].plans
    assert first.lost == "" and all(plan.lost for plan in others)
    (risk,) = risks(found[1].plans[0].plan)
    assert risk.quality == "measured-here" and risk.setting == own.setting


def test_evidence_of_the_user_is_in_the_plan(invoke: Any) -> None:
    save_evidence(evidence())
    save_evidence(evidence(device="cpu"))
    found = json.loads(invoke("predict", *H100, "--zero", "3", "--json").stdout)
    (own,) = found["plan"]["workload"]["evidence"]
    assert own["device"] == evidence().device
