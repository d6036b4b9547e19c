"""A solved pipeline: its CSV priced, held by the plan, and refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forerun import PlanFile, document
from forerun.costmodel.schedule import orders as orders_of
from forerun.orders import order_texts
from forerun.planner.pipeline import read_csv, write_csv

JOB = "predict --model tiny-1m --gpus 2xcpu --seq-len 64 --global-batch 4".split()


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """The orders of zb-v on two ranks with four micro-batches."""
    write_csv(tmp_path / "orders.csv", orders_of("zb-v", 2, 2, 4))
    return tmp_path / "orders.csv"


def test_orders_are_priced_as_the_schedule_they_are(invoke: Any, csv: Path, tmp_path: Path) -> None:
    result = invoke(*JOB, "--orders", csv, "-o", tmp_path / "plan.json", "--json")
    assert result.exit_code == 0, result.output
    assert "not execute" not in result.stderr
    own = json.loads(result.stdout)["estimate"]
    named = json.loads(invoke(*JOB, *"--pp 2 --schedule zb-v --json".split()).stdout)["estimate"]
    assert own["step_s"]["median"] == pytest.approx(named["step_s"]["median"], rel=1e-6)
    assert own["memory_terms_bytes"] == named["memory_terms_bytes"]
    plan = document.read(PlanFile, tmp_path / "plan.json").plan
    plan.check()
    assert plan.phase.orders == order_texts(orders_of("zb-v", 2, 2, 4))
    assert (plan.phase.mesh.pp, plan.phase.mesh.vpp, plan.phase.schedule) == (2, 2, "zb-v")


def test_a_worse_order_is_predicted_slower(invoke: Any, csv: Path, tmp_path: Path) -> None:
    """All forwards before all backwards, whose weights come last."""
    h1 = orders_of("zb-h1", 2, 1, 4)
    late = [[action for kind in "FIW" for action in order if action[0] == kind] for order in h1]
    write_csv(tmp_path / "late.csv", late)
    write_csv(tmp_path / "h1.csv", h1)

    def priced(name: str) -> dict[str, Any]:
        found = invoke(*JOB, "--orders", tmp_path / name, "--json").stdout
        return json.loads(found)["estimate"]

    assert priced("late.csv")["step_s"]["median"] >= priced("h1.csv")["step_s"]["median"]
    kept = [priced(name)["memory_terms_bytes"]["activations"] for name in ("late.csv", "h1.csv")]
    assert kept[0] > 1.5 * kept[1]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--schedule", "zb-v"), "schedule=zb-v: the orders are a schedule of their own"),
        (("--pp", "1"), "pp=1: the orders are for pp=2"),
        (("--micro-batch", "2"), "orders=4 micro-batches: the plan has 2 of them"),
    ],
)
def test_orders_that_do_not_fit(
    refused: Any, csv: Path, more: tuple[str, ...], problem: str
) -> None:
    assert problem in refused([*JOB, "--orders", csv, *more], 2)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no actions"),
        ("0F0,0SEND_F0\n", "orders=0SEND_F0: not an action"),
        ("0F0,,0B0\n1F0,1B0,\n", "orders=1 micro-batches: the plan has 4"),
    ],
)
def test_files_that_are_no_orders(refused: Any, tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "orders.csv").write_text(text)
    assert problem in refused([*JOB, "--orders", tmp_path / "orders.csv"], 2)


def test_empty_cells_are_bubbles(tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_text("0F0,,0B0\n,1F0,1B0,\n")
    assert read_csv(tmp_path / "orders.csv") == [
        [("F", 0, 0), ("B", 0, 0)], [("F", 1, 0), ("B", 1, 0)],
    ]  # fmt: skip
    with pytest.raises(Exception, match="file="):
        read_csv(tmp_path / "none.csv")
