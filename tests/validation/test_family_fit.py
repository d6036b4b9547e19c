"""The joint fit of related stacks: few rows stay near the family, many go where they say."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "family_fit.py"


@pytest.fixture(scope="module")
def fits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("family_fit", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def free(fits: ModuleType, spread: float = 0.1):
    return fits.Free(name="rate", start=1.0, wide=1.0, spread=spread, low=0.1, high=10.0)


def fitted(fits: ModuleType, rows: dict[str, list[float]], spread: float = 0.1):
    """Stacks of one family whose rows measure log(rate) with an error each; log(time) = -log(rate)
    plus what the row measured."""
    targets = [
        fits.Target(stacks=(name,), family="all", free=(free(fits, spread),)) for name in rows
    ]

    def residuals(target, values) -> np.ndarray:
        return np.array(rows[target.stacks[0]]) - np.log(values["rate"])

    result = fits.FamilyFit(targets=targets, residuals=residuals)
    result.run(8, [np.zeros(1)] * len(targets))
    return result


def rate(result, which: int) -> float:
    return float(np.log(result.values(which)["rate"]))


def test_many_rows_speak_for_themselves_and_few_for_the_family(fits: ModuleType) -> None:
    rows = {"many": [0.3] * 60, "other": [0.0] * 60, "few": [0.6]}
    result = fitted(fits, rows)
    assert rate(result, 0) == pytest.approx(0.3, abs=0.02)
    assert rate(result, 1) == pytest.approx(0.0, abs=0.02)
    centre = result.centres["all", "rate"]
    assert 0.1 < centre < 0.35
    assert centre < rate(result, 2) < 0.5
    loose = fitted(fits, rows, spread=1.0)
    assert abs(rate(loose, 2) - 0.6) < abs(rate(result, 2) - 0.6)


def test_one_wild_row_moves_little(fits: ModuleType) -> None:
    calm = fitted(fits, {"a": [0.1] * 20, "b": [0.1] * 20})
    wild = fitted(fits, {"a": [0.1] * 20 + [3.0], "b": [0.1] * 20})
    assert rate(wild, 0) - rate(calm, 0) < 0.01


def test_held_out_rows_are_predicted_by_the_others(fits: ModuleType) -> None:
    rows = {"a": [0.2] * 30, "b": [0.5] * 3}
    result = fitted(fits, rows)
    folds = fits.fold_of_groups(["x"] * 3)
    unseen = np.log1p(result.held_out(1, folds))
    assert unseen == pytest.approx([0.5 - 0.2] * 3, abs=0.1)  # the family is all that is left
    assert np.all(np.abs(np.log1p(result.in_sample(1))) < np.abs(unseen))
    everything = [np.ones(30, dtype=bool), np.zeros(3, dtype=bool)]
    alone = result.family_without(everything)["all", "rate"]
    assert alone > result.centres["all", "rate"]


def test_constants_stay_within_their_bounds(fits: ModuleType) -> None:
    result = fitted(fits, {"a": [5.0] * 50, "b": [-5.0] * 50}, spread=5.0)
    assert result.values(0)["rate"] == pytest.approx(10.0, rel=1e-3)
    assert result.values(1)["rate"] == pytest.approx(0.1, rel=1e-3)


def test_folds_hold_every_row_once(fits: ModuleType) -> None:
    makers: list[Callable[[list[str]], list[np.ndarray]]] = [fits.fold_of_rows, fits.fold_of_groups]
    for make in makers:
        folds = make(["a", "b", "a", "c", "d", "e", "b"])
        assert np.all(np.sum(folds, axis=0) == 1)
