"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from forerun import Measurement, PlanFile, document
from forerun.cli.main import cli

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """A function that runs `forerun ARGUMENTS...` and gives exit code, stdout and stderr."""

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(cli, [str(a) for a in arguments])

    return run


@pytest.fixture
def refused(invoke: Invoke) -> Callable[..., str]:
    """A function that runs a command that must fail with one line, and gives that line."""

    def run(arguments: Sequence[str | Path], code: int) -> str:
        result = invoke(*arguments)
        assert result.exit_code == code, result.output
        lines = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("forerun: ")
        assert "Traceback" not in result.output
        assert result.stdout == ""
        return lines[0]

    return run


@pytest.fixture
def files(
    tmp_path: Path, plan_file: PlanFile, measurement_of: Callable[..., Measurement]
) -> tuple[Path, Path]:
    """The paths of a plan file and of a measurement that agrees with it."""
    plan_path, measured_path = tmp_path / "plan.json", tmp_path / "measured.json"
    document.write(plan_path, plan_file)
    document.write(measured_path, measurement_of(document.read(PlanFile, plan_path)))
    return plan_path, measured_path
