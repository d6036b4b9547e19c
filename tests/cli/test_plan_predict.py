"""forerun plan and forerun predict, with the real catalogs, planner and cost model."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from forerun import Plan, PlanFile, document
from forerun.cli import reference
from forerun.errors import InputError
from forerun.executors.support import check_executed

JOB = "--model tiny-1m --gpus 2xcpu --seq-len 64 --global-batch 8".split()
H100 = "--model llama-2-7b --gpus 8xH100 --seq-len 4096 --global-batch 32".split()


@pytest.mark.parametrize("command", ["plan", "predict"])
def test_json_is_one_document_and_nothing_else(invoke: Any, command: str) -> None:
    result = invoke(command, *JOB, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    best = found["plans"][0] if command == "plan" else found
    assert set(best) >= {"label", "plan", "estimate"}
    assert best["plan"]["schema"] == "forerun.plan/1"
    assert best["estimate"]["step_s"]["median"] > 0


def test_plan_document_says_how_the_search_went(invoke: Any) -> None:
    found = json.loads(invoke("plan", *H100, "--json").stdout)
    assert set(found) == {"plans", "search", "infeasible", "what_if"}
    assert set(found["search"]) >= {
        "bounded", "solved", "simulated", "gap", "proven", "limit", "seconds",
    }  # fmt: skip
    assert found["infeasible"] is None
    steps = [plan["estimate"]["step_s"]["median"] for plan in found["plans"]]
    assert steps == sorted(steps) and len(steps) > 1


def test_the_same_request_gives_the_same_plans(invoke: Any) -> None:
    def ask() -> Any:
        found = json.loads(invoke("plan", *H100, "--json").stdout)
        del found["search"]["seconds"]
        return found

    assert ask() == ask()


def test_the_table_has_the_columns_people_know_and_both_batch_units(invoke: Any) -> None:
    result = invoke("plan", *H100)
    assert result.exit_code == 0, result.output
    for column in ("TP", "PP", "DP", "ZeRO", "MBS", "GBS", "tokens/s/GPU", "MFU", "GiB", "step ms"):
        assert column in result.stdout
    assert "32 sequences = 131,072 tokens" in result.stdout
    assert "H100-SXM-80GB" in result.stderr  # which H100 was meant is said aloud
    assert re.search(r"gap [\d.]+ %", result.stdout)
    assert re.search(r"^2  .*\(\+[\d.]+ % step", result.stdout, re.MULTILINE)  # why the second lost


def test_token_batches_are_rounded_to_sequences_aloud(invoke: Any) -> None:
    job = "--model tiny-1m --gpus 2xcpu --seq-len 64 --global-batch 4ktok --tp 2".split()
    shown = invoke("predict", *job).stdout
    assert "62 sequences = 3,968 tokens" in shown  # 4000 / 64 = 62.5, to the even neighbour


def test_a_plan_file_holds_the_rank_that_was_picked(invoke: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    ranked = json.loads(invoke("plan", *H100, "--json", "--pick", "2", "-o", path).stdout)["plans"]
    picked = document.read(PlanFile, path)
    picked.plan.check()
    assert picked.label == ranked[1]["label"] != ranked[0]["label"]


def test_a_pick_beyond_the_plans_found_is_refused(refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    pins = "--tp 2 --pp 1 --zero 0 --micro-batch 8 --recompute none --no-sp".split()
    assert "--pick" not in (line := refused(["plan", *JOB, *pins, "--pick", "9", "-o", path], 2))
    assert "pick=9" in line
    assert not path.exists()


def test_pins_hold(invoke: Any) -> None:
    found = json.loads(invoke("plan", *H100, "--tp", "4", "--zero", "0", "--json").stdout)
    for plan in found["plans"]:
        phase = plan["plan"]["phases"][0]
        assert phase["mesh"]["tp"] == 4 and phase["zero"] == 0


def test_predict_and_plan_agree_on_a_layout(invoke: Any) -> None:
    best = json.loads(invoke("plan", *JOB, "--tp", "2", "--top", "1", "--json").stdout)["plans"][0]
    phase = best["plan"]["phases"][0]
    flags = ["--tp", "2", "--micro-batch", str(phase["micro_batch_seqs"])]
    flags += ["--sp"] if phase["sequence_parallel"] else ["--no-sp"]
    techniques = phase["settings"][0]["techniques"]
    flags += ["--recompute", techniques.get("recompute", {"mode": "none"})["mode"]]
    flags += ["--zero", str(phase["zero"])]
    found = json.loads(invoke("predict", *JOB, *flags, "--json").stdout)
    assert found["plan"] == best["plan"]
    assert found["estimate"] == best["estimate"]


def test_an_ask_that_cannot_fit_prints_its_document_and_exits_3(
    invoke: Any, tmp_path: Path
) -> None:
    job = "--model llama-3.1-405b --gpus 1xRTX-4090 --seq-len 4096 --global-batch 1".split()
    path = tmp_path / "plan.json"
    result = invoke("plan", *job, "--json", "-o", path)
    assert result.exit_code == 3, result.output
    found = json.loads(result.stdout)
    assert found["plans"] == []
    assert found["infeasible"]["reason"] and found["infeasible"]["smallest_change"]
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and "GiB" in lines[0]
    assert not path.exists()


def test_a_sequence_beyond_the_positions_is_warned_about(invoke: Any) -> None:
    job = "--model llama-2-7b --gpus 8xH100 --seq-len 8192 --global-batch 8 --tp 8".split()
    result = invoke("predict", *job, "--json")
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "seq-len=8192" in warnings[0] and "4096" in warnings[0]
    json.loads(result.stdout)


@pytest.mark.parametrize("command", ["plan", "predict"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--model": "lama-2-7b"}, "llama-2-7b"),
        ({"--gpus": "8xH1000"}, "H100"),
        ({"--gpus": "H100s"}, "gpus=H100s"),
        ({"--gpus": "0xcpu"}, "give 1"),
        ({"--seq-len": "0"}, "seq-len=0"),
        ({"--seq-len": "-64"}, "seq-len=-64"),
        ({"--seq-len": "long"}, "8192"),
        ({"--global-batch": "0"}, "global-batch=0"),
        ({"--global-batch": "4Mwords"}, "4Mtok"),
        ({"--steps": "-1"}, "--steps"),
        ({"--tp": "3", "--gpus": "3xcpu", "--global-batch": "3"}, "tp=3"),
        ({"--dp": "5"}, "dp"),
        ({"--ep": "2"}, "ep=2"),
        ({"--model": "package.module:function"}, "no module package"),
        ({"--model": "/nonexistent/config.json"}, "/nonexistent/config.json"),
    ],
)
def test_bad_input_names_field_value_and_remedy(
    refused: Any, tmp_path: Path, command: str, changes: dict[str, str], expected: str
) -> None:
    flags = dict(zip(JOB[::2], JOB[1::2], strict=True)) | changes
    path = tmp_path / "out" / "plan.json"
    arguments = [command, *(word for pair in flags.items() for word in pair), "-o", path]
    assert expected in refused(arguments, 2)
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"architectures": ["LlamaForCausalLM"], "hidden_size": 64,'),
        ("config.json", "[]"),
        ("config.json", '{"architectures": ["LlamaForCausalLM"]}'),
        ("model.toml", 'schema = "forerun.model/1"\nname = '),
        ("model.toml", 'schema = "forerun.model/2"\nname = "x"'),
        ("model.toml", 'schema = "forerun.model/1"\nname = "x"\nhiden = 3'),
    ],
)
def test_a_spoilt_model_file_is_refused_by_name(
    refused: Any, tmp_path: Path, name: str, text: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    flags = dict(zip(JOB[::2], JOB[1::2], strict=True)) | {"--model": str(path)}
    line = refused(["plan", *(word for pair in flags.items() for word in pair)], 2)
    assert name in line or "config" in line


def test_a_full_disk_leaves_no_half_written_plan(
    invoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "plan.json"
    path.write_text("the old one")
    monkeypatch.setattr(os, "fsync", full)
    result = invoke("predict", *JOB, "-o", path)
    assert result.exit_code == 1
    assert "free some space" in result.stderr
    assert path.read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["plan.json"]


def test_ctrl_c_during_the_search_exits_130(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("forerun.planner.search", interrupt)
    assert "interrupted" in refused(["plan", *JOB], 130)


def test_the_reference_names_every_axis() -> None:
    assert all(f"`--{axis}`" in reference.commands_markdown() for axis in ("tp", "pp", "zero"))


def is_refused(found: Any) -> bool:
    """Whether a plan is predicted and not executed."""
    try:
        check_executed(document.from_raw(Plan, found["plan"], "plan"))
    except InputError:
        return True
    return False


def test_one_node_gets_what_runs_unless_more_is_asked_for(invoke: Any) -> None:
    job = "plan --model llama-3.1-8b --gpus 8xH100 --seq-len 32768 --global-batch 16 --json".split()
    job += ["--allow", "published"]  # of activations in 8 bits no part is offloaded yet
    for more, beyond in (([], False), (["--space", "all"], True), (["--cp", "2"], False)):
        result = invoke(*job, *more)
        assert result.exit_code == 0, result.output
        plans = json.loads(result.stdout)["plans"]
        assert any(map(is_refused, plans)) == beyond, more
    assert "cp can be 1, 2, 4" in invoke(*job, "--cp", "3").stderr
