"""Expert placement: the slots of a layer's experts over the ranks of an expert-parallel group.

Which ranks hold which experts, some of them several times, is the planner's (`forerun solve
experts`) or the user's; without a placement experts lie in order, in equal runs.
"""

from __future__ import annotations

from ...plan import Phase
from ..experts.slots import Slots


def slots_of(phase: Phase, layer: int, num_experts: int) -> Slots:
    """The slots of a layer: those of its placement, or experts in order."""
    ranks = phase.technique("expert-placement", layer).get("slots")
    if ranks is None:
        return Slots.contiguous(num_experts, phase.mesh.ep)
    return Slots(ranks, num_experts)
