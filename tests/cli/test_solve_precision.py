"""`forerun solve precision` from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

TABLE = """group,option,time_s,memory_bytes,error
qkv,bf16,0.004,1000,0
qkv,fp8,0.0025,520,0.01
mlp,bf16,0.010,4000,0
mlp,fp8,0.006,2050,0.02
mlp,int8,0.007,2010,0.005
head,bf16,0.002,800,0
"""


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str], Path]:
    """A function that writes a table and gives its path."""

    def write(text: str) -> Path:
        path = tmp_path / "options.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def solved(result: object) -> dict[str, object]:
    assert getattr(result, "exit_code") == 0, getattr(result, "output")  # noqa: B009
    found = json.loads(getattr(result, "stdout"))  # noqa: B009
    assert found.pop("seconds") >= 0
    return found


def test_the_document(invoke: Callable, table: Callable[[str], Path], tmp_path: Path) -> None:
    saved = tmp_path / "choice.json"
    arguments = ["solve", "precision", table(TABLE), "--error-budget", 0.015, "--json"]
    found = solved(invoke(*arguments, "-o", saved))
    assert found == {
        "choice": {"qkv": "fp8", "mlp": "int8", "head": "bf16"},
        "time_s": 0.0115,
        "memory_bytes": 3330.0,
        "error": 0.015,
        "objective": 0.0115,
        "lower_bound": 0.0115,
        "gap": 0.0,
        "optimal": True,
        "limit": None,
    }
    assert json.loads(saved.read_text())["choice"] == found["choice"]
    assert solved(invoke(*arguments)) == found


def test_objectives_and_limits(invoke: Callable, table: Callable[[str], Path]) -> None:
    start = ["solve", "precision", table(TABLE), "--json", "--error-budget"]
    assert solved(invoke(*start, 0.03))["choice"] == {"qkv": "fp8", "mlp": "fp8", "head": "bf16"}
    for more in (["--objective", "memory"], ["--seconds-per-gib", 1e6], ["--memory-limit", 3350]):
        assert solved(invoke(*start, 0.03, *more))["choice"]["mlp"] == "int8"  # type: ignore[index]


def test_people_get_a_table(invoke: Callable, table: Callable[[str], Path]) -> None:
    shown = invoke("solve", "precision", table(TABLE), "--error-budget", 0.015).stdout
    assert "3 groups: 11.5 ms" in shown and "no choice is better" in shown


def test_evidence_classes(invoke: Callable, refused: Callable, table: Callable) -> None:
    lines = TABLE.splitlines()
    rated = [lines[0] + ",quality", *(f"{line},exact" for line in lines[1:])]
    rated[2] = rated[2].replace("exact", "published")
    path = table("\n".join(rated))
    start = ["solve", "precision", path, "--error-budget", 1, "--quality", "exact"]
    assert solved(invoke(*start, "--json"))["choice"]["qkv"] == "bf16"  # type: ignore[index]
    path = table(TABLE)
    assert "group qkv has no option of these classes" in refused(start, 2)


@pytest.mark.parametrize(
    ("budget", "more", "code", "words"),
    [
        ("-1", [], 2, "error-budget=-1.0"),
        ("nan", [], 2, "error-budget=nan"),
        ("1", ["--memory-limit", "-2"], 2, "memory-limit=-2.0"),
        ("1", ["--memory-limit", "100"], 3, "memory limit 100 is below 3330"),
        ("0.001", ["--memory-limit", "5000"], 3, "within 5000 bytes the least error is 0.005"),
    ],
)
def test_limits_that_cannot_be_kept(
    refused: Callable, table: Callable, budget: str, more: list[str], code: int, words: str
) -> None:
    arguments = ["solve", "precision", table(TABLE), "--error-budget", budget, *more]
    assert words in refused(arguments, code)


def test_a_budget_below_the_least_error(invoke: Callable, table: Callable) -> None:
    path = table("group,option,time_s,memory_bytes,error\na,x,1,1,0.5\n")
    result = invoke("solve", "precision", path, "--error-budget", 0.4, "--json")
    assert result.exit_code == 3
    assert "0.5, the least error of all groups" in json.loads(result.stdout)["infeasible"]["reason"]
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TABLE + "qkv,fp8,1,1,0\n", "option=fp8: stands twice in group qkv"),
        (TABLE + "x,y,-1,1,0\n", "row 7 time_s=-1"),
        (TABLE + "x,y,1,nan,0\n", "row 7 memory_bytes=nan"),
        (TABLE + "x,y,1,1,\n", "row 7 error=(empty)"),
        (TABLE + ",y,1,1,0\n", "row 7 group=(empty)"),
        (TABLE + "x,y,1,1\n", "row 7=4: cells where the header has 5 columns"),
        (TABLE.replace("error", "loss"), "no column error"),
        (TABLE.replace("error", "error,speed", 1), "row 1=5"),
        ("group,option,time_s,memory_bytes,error\n", "has no rows"),
        ("group,group\na,b\n", "header=group"),
        ("", "has no rows"),
    ],
)
def test_bad_tables(refused: Callable, table: Callable, text: str, words: str) -> None:
    arguments = ["solve", "precision", table(text), "--error-budget", "1"]
    assert words in refused(arguments, 2)


def test_a_missing_file_and_a_missing_budget(refused: Callable, table: Callable) -> None:
    line = refused(["solve", "precision", "no-such.csv", "--error-budget", "1"], 2)
    assert "file=no-such.csv" in line
    assert "--error-budget" in refused(["solve", "precision", table(TABLE)], 2)


def test_a_file_or_a_plan_is_needed(
    refused: Callable[..., str], table: Callable[[str], Path]
) -> None:
    both = ["--measure", table(TABLE), "--error-budget", "1"]
    for arguments in (["--error-budget", "1"], [table(TABLE), *both]):
        line = refused(["solve", "precision", *arguments], 2)
        assert "give a CSV file, or --measure and a plan file" in line


def test_measured_options_become_a_plan(
    invoke: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With errors made up: 16 bits stay where the budget is used up."""

    def errors(plan: object, options: dict, groups: tuple, **_: object) -> dict:
        return {
            (group, name): 0.0 if name == "bf16" else 1.0 + group[0]
            for group in groups
            for name in options
        }

    monkeypatch.setattr("forerun.executors.sensitivity.sensitivities", errors)
    job = "--model llama-2-7b --gpus 8xRTX4090 --seq-len 2048 --global-batch 32".split()
    base, mixed, csv = (tmp_path / name for name in ("base.json", "mixed.json", "options.csv"))
    layout = ["--zero", "3", "--micro-batch", "4", "-o", base]
    assert invoke("predict", *job, *layout).exit_code == 0
    measured = ["--measure", base, "--group-layers", "16", "--error-budget", "1"]
    result = invoke("solve", "precision", *measured, "--csv", csv, "-o", mixed, "--json")
    found = solved(result)
    assert found["choice"] == {"layers 0-15": "int8-halo2", "layers 16-31": "bf16"}
    plan = json.loads(mixed.read_text())["plan"]
    settings = plan["phases"][0]["settings"]
    assert [s["layers"] for s in settings] == [[0, 15], [16, 31]]
    assert settings[0]["techniques"]["precision"] == {"compute": "int8", "recipe": "halo2"}
    assert found["label"] == json.loads(mixed.read_text())["label"]
    again = solved(invoke("solve", "precision", csv, "--error-budget", "1", "--json"))
    assert again["choice"] == found["choice"]
