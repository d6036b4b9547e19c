"""A module of one's own, cut and staged by its plans, trains like a plain loop over it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import families
import modules
import pytest

from forerun.costmodel import estimate
from forerun.executors.trace_module import trace

Results = list[dict[tuple[str, str], dict[str, Any]]]
Group = Callable[[int, str], Results]
QUICK, SLOW = (
    [(world, *name) for world in modules.FAMILIES for name in modules.names(world, slow)]
    for slow in (False, True)
)


@cache
def reference(target: str) -> dict[str, Any]:
    return modules.reference(target)


@pytest.mark.parametrize(("world", "target", "family"), QUICK)
def test_equals_the_plain_loop(group: Group, world: int, target: str, family: str) -> None:
    check_equal(group(world, "quick"), target, family)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "target", "family"), SLOW)
def test_more_families_equal_the_plain_loop(
    group: Group, world: int, target: str, family: str
) -> None:
    check_equal(group(world, "slow"), target, family)


def check_equal(ranks: Results, target: str, family: str) -> None:
    expected = reference(target)
    whole = sum(float(g.norm()) ** 2 for g in expected["gradients"].values()) ** 0.5
    for rank in ranks:
        found = rank[target, family]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, gradient in found["gradients"].items():
            error = (gradient - expected["gradients"][name]).norm()
            assert error <= 1e-5 * max(expected["gradients"][name].norm(), 1e-4 * whole), name
    covered = {name for rank in ranks for name in rank[target, family]["gradients"]}
    assert covered == set(expected["gradients"])


@cache
def traced(target: str) -> Any:
    return trace(target, families.SEQ)


@pytest.mark.parametrize(("world", "target", "family"), QUICK)
def test_bytes_on_the_wire_are_those_predicted(
    group: Group, world: int, target: str, family: str
) -> None:
    check_bytes(group(world, "quick"), world, target, family)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "target", "family"), SLOW)
def test_bytes_of_more_families_are_those_predicted(
    group: Group, world: int, target: str, family: str
) -> None:
    check_bytes(group(world, "slow"), world, target, family)


def check_bytes(ranks: Results, world: int, target: str, family: str) -> None:
    counted: Counter[str] = Counter()
    for rank in ranks:
        for (kind, axis, size), count in rank[target, family]["collectives"].items():
            counted[f"{kind}@{axis}"] += size * count
    plan = families.make_plan(traced(target), **modules.FAMILIES[world][target, family])
    predicted = {k: n for k, n in estimate(plan).bytes_on_wire.items() if n}
    assert {name: total / world for name, total in counted.items()} == predicted
