"""What the default and the long run of the tests train, for how many steps; cases of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

STEPS = {"quick": 4, "slow": 10}
"""Optimiser steps of a family. The long run trains the families of the default run too."""
Group = Callable[[int, str], list[dict[tuple[str, str], dict[str, Any]]]]
"""`group(world, selection)`: of every rank, what each (model, family) gave."""


def cases(
    names: Callable[[int, bool], Iterable[Sequence[Any]]], worlds: Iterable[int]
) -> list[Any]:
    """(selection, world, ...) of each of `names(world, slow)`; those of the long run are slow."""
    worlds = tuple(worlds)
    quick = [
        pytest.param("quick", world, *name) for world in worlds for name in names(world, False)
    ]
    slow = [
        pytest.param("slow", world, *name, marks=pytest.mark.slow)
        for world in worlds
        for name in names(world, True)
    ]
    return quick + slow


def compare_with_single(
    ranks: Iterable[dict[str, Any]],
    expected: dict[str, Any],
    loss: float,
    gradient: float,
    negligible: float = 0.0,
) -> None:
    """Assert that the ranks of a family found the losses of all steps and the first gradients of
    one process, within relative tolerances; together they have all gradients."""
    covered: set[str] = set()
    for found in ranks:
        assert "error" not in found, found["error"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=loss)
        for name, own in found["gradients"].items():
            whole = expected["gradients"][name]
            error = float((own - whole).norm())
            assert error <= gradient * float(whole.norm()) + negligible, name
        covered |= set(found["gradients"])
    assert covered == set(expected["gradients"])


def mean_bytes(ranks: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Bytes of each collective of the last step by `kind@axis`, mean over the ranks of a family:
    dropless all-to-alls are uneven on each."""
    results = list(ranks)
    totals: dict[str, float] = {}
    for result in results:
        for (kind, axis, message_bytes), count in result["collectives"].items():
            name = f"{kind}@{axis}"
            totals[name] = totals.get(name, 0.0) + message_bytes * count / len(results)
    return dict(sorted(totals.items()))
