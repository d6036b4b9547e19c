"""The frame of the command line: help, codes, one line per error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forerun
from forerun import RunFailed

ROOT = Path(__file__).resolve().parents[2]


def forerun_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "forerun", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        **options,
    )


def test_help_lists_the_commands() -> None:
    done = forerun_process("--help", stdout=subprocess.PIPE)
    assert done.returncode == 0 and "plan" in done.stdout


def test_no_arguments_print_the_help(invoke: Any) -> None:
    result = invoke()
    assert result.exit_code == 0
    assert "Commands:" in result.stdout


def test_version(invoke: Any) -> None:
    assert invoke("--version").stdout == f"forerun {forerun.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plann"], "did you mean plan?"),
        (["plan", "--zorro", "3"], "--zero"),
        (["plan", "--tp", "0"], "--tp"),
        (["plan", "--tp", "two"], "--tp"),
        (["plan", "--zero", "4"], "0<=x<=3"),
        (["plan", "--schedule", "dualpipe"], "'1f1b'"),
        (["plan"], "--model llama-3.1-8b"),
        (["plan", "--model", "tiny-1m"], "--gpus 2xcpu"),
        (["predict", "--model", "tiny-1m", "--gpus", "2xcpu"], "--seq-len 8192"),
        (["run"], "PLAN"),
        (["calibrate"], "plan.json measured.json"),
        (["calibrate", "plan.json"], "pairs"),
        (["catalog", "models", "llama-2-7x"], "llama-2-7b"),
        (["catalog", "modles"], "did you mean models"),
    ],
)
def test_bad_arguments_are_one_line_with_a_remedy(
    refused: Any, arguments: list[str], expected: str
) -> None:
    assert expected in refused(arguments, 2)


def test_exit_codes_of_a_process(tmp_path: Path) -> None:
    done = forerun_process("run", str(tmp_path / "none.json"), stdout=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "none.json" in done.stderr


def test_an_output_that_cannot_be_written_is_a_failure() -> None:
    with open("/dev/full", "w") as full:
        done = forerun_process("catalog", "models", stdout=full)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "No space left" in done.stderr


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RunFailed("rank 1: killed by signal 9 in step 3; lower the micro-batch"), 1, "rank 1"),
        (MemoryError(), 1, "out of memory"),
        (ZeroDivisionError("two\nlines"), 1, "two lines"),
    ],
)
def test_what_goes_wrong_in_a_run_is_one_line(
    refused: Any,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    expected: str,
) -> None:
    monkeypatch.setattr("forerun.executors.run", raising(error), raising=False)
    output = tmp_path / "new" / "measured.json"
    assert expected in refused(["run", files[0], "-o", output], code)
    assert not output.exists()


def test_debug_shows_the_traceback(
    invoke: Any, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forerun.executors.run", raising(RunFailed("rank 1 died")), raising=False)
    for arguments in (["--debug", "run", files[0]], ["run", files[0], "--debug"]):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr and "rank 1 died" in result.stderr
