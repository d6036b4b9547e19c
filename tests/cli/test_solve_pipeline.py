"""forerun solve pipeline: its document, its file, and one line for what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

ASK = ("solve", "pipeline", "--stages", "4", "--micro-batches", "8", "--forward", "1",
       "--backward-input", "1.2", "--backward-weight", "0.8")  # fmt: skip


def test_the_document_holds_what_was_promised(invoke: Callable[..., Result]) -> None:
    result = invoke(*ASK, "--comm", "0.05", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    promised = {"makespan", "bubble", "peak_activations", "orders", "builtin", "lower_bound",
                "seconds", "gap", "method", "limit", "placement"}  # fmt: skip
    assert promised <= set(found)
    assert list(found["orders"]) == ["0", "1", "2", "3"]
    assert found["lower_bound"] <= found["makespan"]
    assert found["gap"] == pytest.approx(found["makespan"] / found["lower_bound"] - 1)
    assert 0 <= found["bubble"] < 1
    assert max(found["peak_activations"]) <= 4
    assert found["makespan"] <= min(time for time in found["builtin"].values() if time)
    assert found["builtin"]["1F1B"] and found["builtin"]["GPipe"] is None  # 8 of at most 4
    assert found["builtin_without_limit"]["GPipe"]["peak_activations"] == 8
    assert len(found["stages"]) == 4 * found["chunks"]


def test_the_same_request_gives_the_same_document(invoke: Callable[..., Result]) -> None:
    first, second = (json.loads(invoke(*ASK, "--json").stdout) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_the_table_and_the_csv(invoke: Callable[..., Result], tmp_path: Path) -> None:
    result = invoke(*ASK, "--chunks", "1", "--memory-limit", "3", "--csv", tmp_path / "orders.csv")
    assert result.exit_code == 0, result.output
    assert "1F1B" in result.stdout and "one stage per rank" in result.stdout
    with open(tmp_path / "orders.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert [len(row) for row in rows] == [24] * 4
    assert rows[0][0] == "0F0" and rows[3][-1] == "3W7"


def test_one_time_per_stage_or_per_chunk(invoke: Callable[..., Result]) -> None:
    per_rank = json.loads(invoke(*ASK, "--forward", "1,1,1,1", "--json").stdout)
    per_chunk = json.loads(invoke(*ASK, "--forward", ",".join(["0.5"] * 8), "--json").stdout)
    assert per_rank["orders"] == per_chunk["orders"]
    exact = ("--stages", "3", "--micro-batches", "4", "--chunks", "1", "--exact", "--json")
    assert json.loads(invoke(*ASK, *exact).stdout)["gap"] == 0


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (("--stages", "0"), 2, "stages=0"),
        (("--micro-batches", "0"), 2, "micro-batches=0"),
        (("--forward", "0"), 2, "forward=0"),
        (("--forward", "1,2"), 2, "forward=2 numbers: not one per stage"),
        (("--backward-input", "-1"), 2, "backward-input=-1"),
        (("--backward-weight", "fast"), 2, "backward-weight=fast: not a number"),
        (("--comm", "-1"), 2, "comm=-1"),
        (("--memory-limit", "-1"), 2, "memory-limit=-1"),
        (("--memory-limit", "0.9"), 3, "memory-limit=0.9 is below 1"),
        (("--chunks", "3"), 2, "chunks=3"),
        (("--time-limit", "0"), 2, "time-limit=0"),
        (("--exact",), 2, "exact=32"),
    ],
)
def test_what_cannot_be_is_one_line(
    refused: Callable[..., str], changes: tuple[str, ...], code: int, words: str
) -> None:
    assert words in refused([*ASK, *changes], code)
