"""forerun solve activations: the document, the tables, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Invoke = Callable[..., Result]
MODEL = ("--model", "llama-2-7b", "--gpus", "8xA100-80GB", "--seq-len", "8192")
TABLE = "id,bytes,recompute_s,needs\nx,100,,\na,300,0.5,x\nb,200,0.1,a\n"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "tensors.csv"
    path.write_text(TABLE, encoding="utf-8")
    return path


def test_the_document_has_the_promised_keys(invoke: Invoke) -> None:
    done = invoke("solve", "activations", *MODEL, "--memory-limit", "20GiB", "--no-offload",
                  "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {
        "policies", "device_bytes", "host_bytes", "extra_s", "lower_bound_s", "gap",
        "keep_all_bytes", "recompute_all_s", "limit", "seconds",
    } <= set(found)  # fmt: skip
    assert sum(use["layers"] for use in found["policies"]) == 32
    assert found["device_bytes"] <= 20 * 2**30 < found["keep_all_bytes"]
    assert 0 < found["lower_bound_s"] <= found["extra_s"] < found["recompute_all_s"]
    tensor = found["policies"][0]["tensors"][0]
    assert {"name", "bytes", "choice", "fraction", "seconds"} <= set(tensor)


def test_a_table_of_tensors(invoke: Invoke, table: Path) -> None:
    """Four layers of 600 bytes: to run b again frees 200 for 0.1 s, a and b 500 for 0.6 s."""
    arguments = ("solve", "activations", table, "--layers", "4", "--memory-limit", "1600")
    found = json.loads(invoke(*arguments, "--json").stdout)
    assert found["extra_s"] == pytest.approx(0.4)
    done = invoke(*arguments)
    assert "4 x tensors" in done.stdout and "recompute" in done.stdout and "gap" in done.stdout


def test_copies_hide_behind_a_window(invoke: Invoke, table: Path) -> None:
    arguments = ("solve", "activations", table, "--memory-limit", "100", "--copy-bandwidth",
                 "1kB/s", "--forward-s", "0.5", "--backward-s", "1", "--json")  # fmt: skip
    found = json.loads(invoke(*arguments).stdout)
    assert found["extra_s"] == 0.0 and found["host_bytes"] == pytest.approx(500)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((*MODEL, "--memory-limit", "1GiB", "--no-offload"), 3, "at least 2.00 GiB"),
        (MODEL, 2, "memory-limit"),
        ((*MODEL, "--memory-limit", "-3GiB"), 2, "memory-limit=-3GiB"),
        ((*MODEL, "--memory-limit", "lots"), 2, "not a number of bytes"),
        ((*MODEL, "--memory-limit", "20GiB", "--tp", "3"), 2, "does not divide 8 devices"),
        ((*MODEL, "--memory-limit", "20GiB", "--layers", "33"), 2, "layers=33"),
        ((*MODEL, "--memory-limit", "20GiB", "--gap", "-1"), 2, "gap=-1"),
        ((*MODEL, "--memory-limit", "20GiB", "--copy-bandwidth", "fast"), 2, "copy-bandwidth"),
        (("--memory-limit", "20GiB"), 2, "model=(missing)"),
        (("--model", "llama-2-8b", *MODEL[2:], "--memory-limit", "1GiB"), 2, "llama-2-8b"),
        (("nowhere.csv", "--memory-limit", "1GiB"), 2, "nowhere.csv"),
    ],
)
def test_bad_input_is_one_line(
    refused: Callable[..., str], arguments: tuple[str, ...], code: int, words: str
) -> None:
    assert words in refused(("solve", "activations", *arguments), code)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,size\nx,1\n", "column=bytes"),
        ("id,bytes,speed\nx,1,2\n", "column=speed"),
        ("id,bytes\nx,-1\n", "row 2, bytes=-1"),
        ("id,bytes\nx,many\n", "row 2, bytes=many"),
        ("id,bytes\nx,\n", "row 2"),
        ("id,bytes,recompute_s,needs\na,1,1,b\nb,1,,\nx,1,1,y\n", "needs=y"),
        ("id,bytes,recompute_s,needs\na,1,1,b\nb,1,1,a\n", "needs=b"),
        ("id,bytes\nx,1\nx,2\n", "two tensors have one name"),
        ("id,bytes,needed\nx,1,perhaps\n", "neither yes nor no"),
        ("id,bytes\n", "no tensor"),
        ("", "column=id"),
    ],
)
def test_bad_tables_are_one_line(
    refused: Callable[..., str], tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    assert words in refused(("solve", "activations", path, "--memory-limit", "1"), 2)
