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
