"""forerun solve memory: the document, the files, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import Result

Invoke = Callable[..., Result]
Refused = Callable[[Sequence[str | Path], int], str]
INSTANCES = Path(__file__).parent.parent / "validation" / "minimalloc"

FIVE = "id,lower,upper,size\na,0,4,4\nb,2,8,4\nc,1,3,4\nd,5,9,4\ne,0,9,4\n"


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    """A function that writes a buffers file."""

    def write(text: str) -> Path:
        path = tmp_path / "buffers.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_json_has_the_promised_fields(invoke: Invoke, written: Callable[[str], Path]) -> None:
    result = invoke("solve", "memory", written(FIVE), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) >= {"offsets", "peak_bytes", "lower_bound_bytes", "optimal", "gap", "method",
                          "nodes", "fragmentation", "limit", "seconds"}  # fmt: skip
    assert list(found["offsets"]) == ["a", "b", "c", "d", "e"]
    assert (found["peak_bytes"], found["optimal"], found["limit"]) == (16, True, None)
    again = json.loads(invoke("solve", "memory", written(FIVE), "--json").stdout)
    assert found["offsets"] == again["offsets"]


def test_the_table_and_the_written_offsets(
    invoke: Invoke, written: Callable[[str], Path], tmp_path: Path
) -> None:
    text = "size,id,alignment,lower,upper\n100,x,64,0,2\n7,y,1,1,3\n64,z,64,1,4\n"
    out = tmp_path / "offsets.csv"
    result = invoke("solve", "memory", written(text), "--capacity", "1KiB", "-o", out)
    assert result.exit_code == 0, result.output
    assert "arena " in result.stdout
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "lower", "upper", "size", "alignment", "offset"]
    assert [row["id"] for row in rows] == ["x", "y", "z"]
    assert all(int(row["offset"]) % int(row["alignment"]) == 0 for row in rows)


def test_a_published_instance_within_its_capacity(invoke: Invoke) -> None:
    path = INSTANCES / "J.1048576.csv"
    result = invoke("solve", "memory", path, "--capacity", "1MiB", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["peak_bytes"] <= 1048576


def test_out_of_reach_prints_the_best_and_exits_3(
    invoke: Invoke, written: Callable[[str], Path]
) -> None:
    result = invoke("solve", "memory", written(FIVE), "--capacity", "15", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["peak_bytes"] == 16
    assert result.stderr.count("\n") == 1
    assert "no arena is smaller than 16 bytes" in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("id,lower,upper,size\n", "no buffer below the header"),
        ("id,lower,size\na,0,4\n", "no column upper"),
        ("id,lower,upper,size,hint\na,0,1,4,0\n", "column=hint: line 1: unknown"),
        ("id,lower,upper,size,size\na,0,1,4,4\n", "there twice"),
        ("id,lower,upper,size\na,0,1\n", "line 2: 3 cells for 4 columns"),
        ("id,lower,upper,size\na,0,1,4\n\na,0,1,4\n", "line 4 has the id of line 2"),
        ("id,lower,upper,size\na,-1,1,4\n", "lower=-1: line 2"),
        ("id,lower,upper,size\na,3,3,4\n", "upper=3: line 2: not after lower=3"),
        ("id,lower,upper,size\na,0,1,0\n", "size=0: line 2"),
        ("id,lower,upper,size\na,0,1,4.5\n", "size=4.5: line 2: not a whole number"),
        ("id,lower,upper,size\na,0,1,\n", "size=(empty): line 2"),
        ("id,lower,upper,size\n,0,1,4\n", "id=(empty): line 2"),
        ("id,lower,upper,size,alignment\na,0,1,4,24\n", "alignment=24: line 2: not a power of two"),
        ("id,lower,upper,size\na,0,1,99999999999999999999\n", "size="),
        ('id,lower,upper,size\n"a,0,1,4\n', "file="),
    ],
)
def test_bad_files_are_refused(
    refused: Refused, written: Callable[[str], Path], text: str, words: str
) -> None:
    assert words in refused(["solve", "memory", written(text)], 2)


def test_bad_options_are_refused(
    refused: Refused, written: Callable[[str], Path], tmp_path: Path
) -> None:
    path = written(FIVE)
    assert "capacity=3: below buffer a alone" in refused(
        ["solve", "memory", path, "--capacity", "3"], 2
    )
    assert "not a size" in refused(["solve", "memory", path, "--capacity", "much"], 2)
    assert "--time-limit" in refused(["solve", "memory", path, "--time-limit", "0"], 2)
    assert "file=" in refused(["solve", "memory", tmp_path / "none.csv"], 2)
    assert "file=" in refused(["solve", "memory", tmp_path], 2)
