"""Recompute and offload move what the cost model says: bytes on the wire, and off the device."""

from __future__ import annotations

import families
import pytest
from selections import Group, cases, mean_bytes

from forerun.costmodel import estimate


def names(world: int, slow: bool) -> list[tuple[str, str]]:
    modes = ("elementwise", "per_op", "full")
    settings = families.FAMILIES[world]
    return [
        (model, family)
        for model, family in families.names(world, slow)
        if "more" in settings[family] or settings[family].get("recompute") in modes
    ]


@pytest.mark.parametrize(("selection", "world", "model", "family"), cases(names, families.FAMILIES))
def test_bytes_moved_are_those_predicted(
    group: Group, selection: str, world: int, model: str, family: str
) -> None:
    predicted = estimate(families.plan_of(world, model, family))
    ranks = [rank[model, family] for rank in group(world, selection)]
    copied: dict[str, float] = {}
    for rank in ranks:
        for name, size in rank["copied"].items():
            copied[name] = copied.get(name, 0.0) + size / world
    assert mean_bytes(ranks) == predicted.bytes_on_wire
    assert copied == predicted.bytes_copied
    for tier, most in predicted.bytes_off_device.items():
        assert max(rank["off_device"][tier] for rank in ranks) == most
