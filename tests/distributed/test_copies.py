"""Recompute and offload move what the cost model says: bytes on the wire, and off the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest

from forerun.costmodel import estimate

CASES = [
    (world, model, family)
    for world in (1, 2, 4)
    for model, family in families.names(world)
    if "more" in families.FAMILIES[world][family]
    or families.FAMILIES[world][family].get("recompute") in ("elementwise", "per_op", "full")
]


@pytest.mark.parametrize(("world", "model", "family"), CASES)
def test_bytes_moved_are_those_predicted(
    group: Callable[[int, str], Any], world: int, model: str, family: str
) -> None:
    plan = families.make_plan(families.MODELS[model], **families.FAMILIES[world][family])
    predicted = estimate(plan)
    ranks = [rank[model, family] for rank in group(world, "quick")]
    wire: dict[str, float] = {}
    copied: dict[str, float] = {}
    for rank in ranks:
        for (kind, axis, size), count in rank["collectives"].items():
            name = f"{kind}@{axis}"
            wire[name] = wire.get(name, 0.0) + size * count / world
        for name, size in rank["copied"].items():
            copied[name] = copied.get(name, 0.0) + size / world
    assert wire == predicted.bytes_on_wire
    assert copied == predicted.bytes_copied
    for tier, most in predicted.bytes_off_device.items():
        assert max(rank["off_device"][tier] for rank in ranks) == most
