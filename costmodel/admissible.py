"""What devices cannot run, with the reason: each technique's `refuse`, asked for a whole plan."""

from __future__ import annotations

from ..errors import InputError
from ..plan import Plan
from . import optimizers
from .groups import Grouped
from .techniques import halo, precision


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
    return _refuse_states(plan) or _refuse_shapes(plan)


def _refuse_shapes(plan: Plan) -> InputError | None:
    """Why the shapes of a layer cannot be rotated."""
    for phase in plan.phases:
        mesh = phase.mesh
        tokens = phase.micro_batch_seqs * phase.seq_tokens // mesh.cp
        shards = mesh.dp_shard * mesh.cp if phase.zero else mesh.dp_shard
        for index in range(plan.model.num_layers):
            own = phase.technique("precision", index)
            recipe = own.get("recipe")
            if recipe not in halo.LEVELS:
                continue
            reason = halo.problem(
                plan.model, plan.model.layer_at(index), str(recipe), own.get("linears"),
                tp=mesh.tp, tokens=tokens, shards=shards,
            )  # fmt: skip
            if reason is not None:
                return reason
    return None


def _refuse_states(plan: Plan) -> InputError | None:
    """Why the states that are to wait off the device cannot be meant."""
    routed = any(layer.experts is not None for layer in plan.model.layers)
    for phase in plan.phases:
        own = [setting.techniques.get("offload", {}).get("states") for setting in phase.settings]
        if "experts" in own and not routed:
            return InputError("offload.states", "experts", f"{plan.model.name} has no routed "
                              "experts", "use --offload optimizer, or leave it out")  # fmt: skip
    return None


def check(plan: Plan) -> None:
    """Raise InputError for the first technique that the plan's devices cannot run."""
    reason = refuse(plan)
    if reason is not None:
        raise reason
