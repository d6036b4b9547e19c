"""A module of one's own, cut and staged by its plans, trains like a plain loop over it."""

from __future__ import annotations

from functools import cache
from typing import Any

import families
import modules
import pytest
from selections import Group, cases, mean_bytes

from forerun.costmodel import estimate
from forerun.executors.trace_module import trace

CASES = pytest.mark.parametrize(
    ("selection", "world", "target", "family"), cases(modules.names, modules.FAMILIES)
)


@cache
def reference(target: str) -> dict[str, Any]:
    return modules.reference(target)


@cache
def traced(target: str) -> Any:
    return trace(target, families.SEQ)


@CASES
def test_equals_the_plain_loop(
    group: Group, selection: str, world: int, target: str, family: str
) -> None:
    expected, ranks = reference(target), group(world, selection)
    whole = sum(float(g.norm()) ** 2 for g in expected["gradients"].values()) ** 0.5
    for rank in ranks:
        found = rank[target, family]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, gradient in found["gradients"].items():
            error = (gradient - expected["gradients"][name]).norm()
            assert error <= 1e-5 * max(expected["gradients"][name].norm(), 1e-4 * whole), name
    covered = {name for rank in ranks for name in rank[target, family]["gradients"]}
    assert covered == set(expected["gradients"])


@CASES
def test_bytes_on_the_wire_are_those_predicted(
    group: Group, selection: str, world: int, target: str, family: str
) -> None:
    plan = families.make_plan(traced(target), **modules.FAMILIES[world][target, family])
    predicted = {k: n for k, n in estimate(plan).bytes_on_wire.items() if n}
    assert mean_bytes(rank[target, family] for rank in group(world, selection)) == predicted
