"""forerun solve sequences: its document, its table and its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Invoke = Callable[..., Result]
JOB = ("--gpus", "8xH100", "--model", "llama-3.2-1b")
LENGTHS = [60_000, 30_000, 9_000, 8_000, 4_000, 4_000, 2_000, 500, 20, 1]


@pytest.fixture
def lengths_file(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.txt"
    path.write_text("\n".join(map(str, LENGTHS)) + "\n\n")
    return path


def solved(invoke: Invoke, *arguments: str | Path) -> dict:
    result = invoke("solve", "sequences", *arguments, *JOB, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_document_with_barriers(invoke: Invoke, lengths_file: Path) -> None:
    found = solved(invoke, lengths_file, "--tokens-per-gpu", "9000")
    assert found["makespan_s"] == pytest.approx(sum(b["seconds"] for b in found["micro_batches"]))
    assert found["lower_bound_s"] <= found["makespan_s"] <= found["static_best_s"]
    assert found["limit"] is None and found["gap"] >= found["cut_gap"] >= 0
    done = [i for b in found["micro_batches"] for g in b["groups"] for i in g["sequences"]]
    assert sorted(done) == list(range(len(LENGTHS)))
    for batch in found["micro_batches"]:
        ranks = [rank for g in batch["groups"] for rank in g["ranks"]]
        assert len(ranks) == len(set(ranks)) and set(ranks) <= set(range(8))
        for g in batch["groups"]:
            assert g["ranks"] == list(range(g["start"], g["start"] + g["len"]))
            assert g["kind"] in ("none", "ring", "ulysses")
            assert sum(LENGTHS[i] for i in g["sequences"]) <= 9000 * g["len"]


def test_document_without_barriers(invoke: Invoke, lengths_file: Path) -> None:
    found = solved(invoke, lengths_file, "--no-barriers", "--kind", "ring", "--max-degree", "8")
    (batch,) = found["micro_batches"]
    assert batch["seconds"] == found["makespan_s"]
    assert {g["kind"] for g in batch["groups"]} <= {"none", "ring"}
    sizes = [g["len"] for g in batch["groups"]]
    assert sizes == sorted(sizes, reverse=True)  # one order that all ranks share


def test_only_seconds_differ_between_runs(invoke: Invoke, lengths_file: Path) -> None:
    first, second = (solved(invoke, lengths_file) for _ in range(2))
    first["seconds"] = second["seconds"] = 0
    assert first == second


def test_table_and_file(invoke: Invoke, lengths_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "groups.json"
    result = invoke("solve", "sequences", lengths_file, *JOB, "-o", output, "--time-limit", "60")
    assert result.exit_code == 0, result.output
    assert "10 sequences" in result.stdout and "times as fast" in result.stdout
    assert json.loads(output.read_text())["limit"] is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no lengths"]),
        ("12\n\nx7\n", ["line 3", "x7"]),
        ("12\n-5\n", ["line 2", "-5"]),
        ("12\n0\n", ["line 2"]),
        ("1.5\n", ["line 1", "1.5"]),
        ("9999999999\n", ["9999999999", "holds"]),
        ("99999999999999999999999999\n", ["line 1"]),
    ],
)
def test_bad_lengths_are_refused(
    refused: Callable[..., str], tmp_path: Path, text: str, words: list[str]
) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text)
    line = refused(["solve", "sequences", path, *JOB, "--json"], 2)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--gpus", "6xH100", "--model", "llama-3.2-1b"], "use 4 or 8"),
        (["--gpus", "8xH100", "--model", "lama-2-7b"], "did you mean"),
        (["--gpus", "8xH100", "--model", "resnet-50"], "decoder"),
    ],
)
def test_bad_requests_are_refused(
    refused: Callable[..., str], lengths_file: Path, arguments: list[str], word: str
) -> None:
    assert word in refused(["solve", "sequences", lengths_file, *arguments], 2)


def test_missing_and_binary_files(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "No such file" in refused(["solve", "sequences", tmp_path / "none.txt", *JOB], 2)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refused(["solve", "sequences", binary, *JOB], 2)


def test_no_memory_is_no_feasible_plan(refused: Callable[..., str], lengths_file: Path) -> None:
    line = refused(
        ["solve", "sequences", lengths_file, "--gpus", "1xH100", "--model", "llama-2-70b"], 3
    )
    assert "GiB per GPU" in line
