"""The accuracy on the published table does not get worse unnoticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from forerun.costmodel.validate import Outcome, Row, build_cases, outcomes, read_table, validate

HERE = Path(__file__).parent
HALF_A_POINT = 0.005


@pytest.fixture(scope="module")
def found() -> dict:
    """The document of `forerun validate` for the table."""
    return validate(read_table(HERE / "published_dev.csv"))


def test_every_row_is_predicted(found: dict) -> None:
    assert len(found["rows"]) == found["summary"]["rows"] == found["summary"]["scored"] == 591
    assert all(row["predicted"] is not None for row in found["rows"])


@pytest.mark.parametrize(
    "name", ["macro_mean_ape", "median_ape", "memory.mean_ape", "ranking.mean_regret"]
)
def test_errors_have_not_grown(found: dict, name: str) -> None:
    """`accepted.json` holds what was accepted last: lower it when the model gets better."""
    accepted = json.loads((HERE / "accepted.json").read_text())
    value = found["summary"]
    for part in name.split("."):
        value = value[part]
    assert value <= accepted[name] + HALF_A_POINT


def test_intervals_hold_what_they_promise(found: dict) -> None:
    assert 0.85 <= found["summary"]["coverage"] <= 0.95


def test_memory_intervals_hold_what_they_promise(found: dict) -> None:
    assert 0.85 <= found["summary"]["memory"]["coverage"] <= 0.95


def test_twice_the_largest_batch_is_not_said_to_fit() -> None:
    """COAT states speed at the largest batch that fits (2410.19313, table 7)."""
    largest = [
        row
        for row in read_table(HERE / "published_dev.csv")
        if isinstance(row, Row) and row.source == "coat" and row.is_time
    ]
    assert len(largest) == 9
    twice = [
        replace(
            row,
            micro_batch_seqs=2 * (row.micro_batch_seqs or 1),
            global_batch_seqs=2 * (row.global_batch_seqs or 1),
        )
        for row in largest
    ]
    predicted = outcomes(build_cases(twice))
    assert all(isinstance(outcome, Outcome) for outcome in predicted)
    said = {o.case.row.id: o.prediction.fits for o in predicted if isinstance(o, Outcome)}
    assert [name for name, fits in said.items() if fits == "yes"] == []


def test_better_than_one_constant_per_gpu(found: dict) -> None:
    summary = found["summary"]
    assert summary["macro_mean_ape"] < summary["baseline_macro_mean_ape"] / 2


def test_nothing_that_ran_is_said_not_to_fit(found: dict) -> None:
    assert not [row["id"] for row in found["rows"] if row.get("fits") == "no"]
