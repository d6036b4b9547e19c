"""Every error is one line with its exit code."""

from __future__ import annotations

import doctest

import pytest

from forerun import errors
from forerun.errors import InputError, unknown_name


def test_doctests() -> None:
    assert doctest.testmod(errors).failed == 0


def test_one_line_whatever_the_user_typed() -> None:
    error = InputError("model", "a\nb\r\nc", "unknown name", "try another")
    assert str(error) == "model=a b c: unknown name; try another"
    assert error.value == "a\nb\r\nc"


def test_near_names_are_suggested_whatever_the_case() -> None:
    assert "did you mean H100-SXM?" in str(unknown_name("gpus", "h100sxm", ["H100-SXM", "L40S"]))


def test_without_a_near_name_some_are_listed() -> None:
    text = str(unknown_name("gpus", "?", [f"name-{i}" for i in range(20)]))
    assert text.endswith("known: name-0, name-1, name-10, name-11, name-12, name-13, name-14, "
                         "name-15, ...")  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InputError, 2),
        (errors.NoFeasiblePlan, 3),
        (errors.ToleranceExceeded, 4),
        (errors.RunFailed, 1),
    ],
)
def test_exit_codes(kind: type[errors.ForerunError], code: int) -> None:
    assert kind.exit_code == code
