"""forerun validate: the document, the table on a terminal, bad files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Invoke = Callable[..., Result]
HEADER = "id,source,hardware,gpus,model,seq_len,global_batch_seqs,micro_batch_seqs,dp,metric,value"
GOOD = "x-1,lab,H100,8,llama-3.1-8b,4096,64,1,8,tokens_per_s_per_gpu,9000"


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes lines to a CSV file."""

    def write(*lines: str) -> Path:
        path = tmp_path / "table.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def test_the_document_has_the_promised_keys(invoke: Invoke, table: Callable[..., Path]) -> None:
    path = table(HEADER, GOOD, GOOD.replace("H100", "abacus"))
    done = invoke("validate", path, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    wanted = {"id", "source", "metric", "measured", "predicted", "low", "high", "ape", "note"}
    assert all(wanted <= set(row) for row in found["rows"])
    assert {
        "rows", "scored", "median_ape", "mean_ape", "macro_mean_ape", "p90_ape", "bias",
        "coverage", "by_source", "ranking", "baseline_macro_mean_ape",
    } <= set(found["summary"])  # fmt: skip
    assert {"groups", "mean_regret", "kendall_tau"} <= set(found["summary"]["ranking"])
    assert [row["predicted"] is None for row in found["rows"]] == [False, True]


def test_the_same_table_gives_the_same_bytes(
    invoke: Invoke, table: Callable[..., Path], tmp_path: Path
) -> None:
    path, written = table(HEADER, GOOD), tmp_path / "out.json"
    first = invoke("validate", path, "--json", "-o", written)
    assert first.stdout == invoke("validate", path, "--json").stdout == written.read_text()


def test_people_read_errors_by_source(invoke: Invoke, table: Callable[..., Path]) -> None:
    memory = GOOD.replace("tokens_per_s_per_gpu,9000", "peak_mem_gib,60")
    done = invoke("validate", table(HEADER, GOOD, memory, GOOD.replace("H100", "abacus")))
    assert done.exit_code == 0, done.output
    for words in ("lab", "mean of sources", "peak memory", "2 of 3 rows", "worst rows", "abacus"):
        assert words in done.stdout
    assert "not predicted: x-1" in done.stdout


def test_cells_beyond_the_header_make_a_bad_row(invoke: Invoke, table: Callable[..., Path]) -> None:
    done = invoke("validate", table(HEADER, GOOD, GOOD + ",1,2"), "--json")
    assert "more cells" in json.loads(done.stdout)["rows"][1]["note"]


@pytest.mark.parametrize(
    "lines",
    [
        (HEADER,),
        ("",),
        (HEADER, GOOD.replace("llama-3.1-8b", "")),
        (HEADER.replace(",value", ""), GOOD.rpartition(",")[0]),
        ("a,b", "1,2"),
        (HEADER, GOOD.replace("9000", "fast")),
    ],
    ids=["no rows", "empty", "no model", "no value column", "another table", "no number"],
)
def test_a_table_without_a_readable_row_is_bad_input(
    refused: Callable[..., str], table: Callable[..., Path], lines: tuple[str, ...]
) -> None:
    refused(["validate", table(*lines)], 2)


def test_files_that_are_no_tables_are_bad_input(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    binary = tmp_path / "binary.csv"
    binary.write_bytes(bytes(range(256)))
    for path in (tmp_path / "missing.csv", tmp_path, binary):
        assert str(path) in refused(["validate", path], 2)
