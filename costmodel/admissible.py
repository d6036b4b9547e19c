"""What devices cannot run, with the reason: each technique's `refuse`, asked for a whole plan."""

from __future__ import annotations

from ..errors import InputError
from ..plan import Plan
from . import optimizers
from .groups import Grouped
from .techniques import expert_offload, precision


def refuse(plan: Plan) -> InputError | None:
    """Why the plan's devices cannot run its techniques; None where they can."""
    for phase in plan.phases:
        pools = [plan.cluster.pool(name) for name in sorted({s.pool for s in phase.stages})]
        options = Grouped.of(plan.model, phase, plan.workload).options
        for pool in pools:
            for own in options:
                reason = precision.refuse(own, pool.device)
                if reason is not None:
                    return reason
            reason = optimizers.refuse(plan.workload.optimizer, pool)
            if reason is not None:
                return reason
    return expert_offload.refuse(plan)


def check(plan: Plan) -> None:
    """Raise InputError for the first technique that the plan's devices cannot run."""
    reason = refuse(plan)
    if reason is not None:
        raise reason
