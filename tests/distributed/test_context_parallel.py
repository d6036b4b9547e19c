"""What ranks that share sequences send is what was predicted, and so is what they hold.

That they train like one process is shown with all other layouts in `test_equality.py`.
"""

from __future__ import annotations

import context_families
import families
import pytest
from selections import Group, cases, mean_bytes

from forerun.costmodel import estimate


def names(world: int, slow: bool) -> list[tuple[str, str]]:
    of_context = context_families.FAMILIES[world]
    return [name for name in families.names(world, slow) if name[1] in of_context]


@pytest.mark.parametrize(
    ("selection", "world", "model", "family"), cases(names, context_families.FAMILIES)
)
def test_predicted_bytes_are_counted(
    group: Group, selection: str, world: int, model: str, family: str
) -> None:
    ranks = [rank[model, family] for rank in group(world, selection)]
    plan = families.plan_of(world, model, family)
    predicted = estimate(plan)
    assert mean_bytes(ranks) == predicted.bytes_on_wire
    if plan.phase.zero == 0:  # what FSDP2 holds at a moment depends on who is how far
        terms = predicted.memory_terms_bytes
        live = sum(n for name, n in terms.items() if name not in ("fragmentation", "context"))
        assert live == pytest.approx(max(rank["live_bytes"] for rank in ranks), rel=0.05)
