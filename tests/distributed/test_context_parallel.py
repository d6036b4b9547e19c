"""What ranks that share sequences send is what was predicted, and so is what they hold.

That they train like one process is shown with all other layouts in `test_equality.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import context_families
import families
import pytest

from forerun.costmodel import estimate

Group = Callable[[int, str], list[dict[tuple[str, str], dict[str, Any]]]]


def cases(slow: bool) -> list[tuple[int, str, str]]:
    return [
        (world, model, family)
        for world, some in context_families.FAMILIES.items()
        for model in families.MODELS
        for family in some
        if families.is_slow(world, model, family) == slow
    ]


def check(group: Group, selection: str, world: int, model: str, family: str) -> None:
    ranks = [rank[model, family] for rank in group(world, selection)]
    counted: dict[str, float] = {}
    for rank in ranks:
        for (kind, axis, size), times in rank["collectives"].items():
            name = f"{kind}@{axis}"
            counted[name] = counted.get(name, 0.0) + size * times / world
    plan = families.make_plan(families.MODELS[model], **families.FAMILIES[world][family])
    predicted = estimate(plan)
    assert counted == predicted.bytes_on_wire
    if plan.phase.zero == 0:  # what FSDP2 holds at a moment depends on who is how far
        terms = predicted.memory_terms_bytes
        live = sum(n for name, n in terms.items() if name not in ("fragmentation", "context"))
        assert live == pytest.approx(max(rank["live_bytes"] for rank in ranks), rel=0.05)


@pytest.mark.parametrize(("world", "model", "family"), cases(slow=False))
def test_predicted_bytes_are_counted(group: Group, world: int, model: str, family: str) -> None:
    check(group, "quick", world, model, family)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "model", "family"), cases(slow=True))
def test_predicted_bytes_are_counted_slow(
    group: Group, world: int, model: str, family: str
) -> None:
    check(group, "slow", world, model, family)
