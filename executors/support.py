"""What can be executed at all; answered without torch, before any process starts."""

from __future__ import annotations

from ..costmodel.techniques import expert_offload
from ..errors import InputError
from ..model import Layer, Model
from ..plan import SPLIT_SCHEDULES, Phase, Plan

TECHNIQUES = ("precision", "recompute", "runtime", "expert-placement", "expert-offload")
"""Those that have a file in `executors/techniques/`."""
COMPUTE_DTYPES = ("fp32", "bf16")
RECOMPUTE_MODES = ("none", "selective", "full")
RUNTIMES = ("eager", "compiled")


def check_executed(plan: Plan) -> None:
    """Raise InputError for a plan that is predicted but not executed yet."""
    if len(plan.phases) != 1:
        raise InputError("phases", len(plan.phases), "runs have one phase for now",
                         "give a plan with one phase")  # fmt: skip
    if len(plan.cluster.pools) > 1:
        raise InputError("cluster.pools", len(plan.cluster.pools), "runs have one pool for now",
                         "plan for one kind of node")  # fmt: skip
    _check_phase(plan.phase)
    expert_offload.check(plan)
    if plan.model.traced is None:
        check_model(plan.model)
        _check_runtime(plan)
        _check_length(plan.model, plan.phase.seq_tokens)
        _check_shards(plan)
    if plan.workload.optimizer != "adamw":
        raise InputError("optimizer", plan.workload.optimizer, "not executed yet", "use adamw")


def _check_phase(phase: Phase) -> None:
    if phase.mesh.cp > 1:
        raise InputError("cp", phase.mesh.cp, "cannot be run yet", "use --cp 1")
    for setting in phase.settings:
        for name in setting.techniques:
            if name not in TECHNIQUES:
                raise InputError("settings.techniques", name, "cannot be run yet",
                                 f"use {', '.join(TECHNIQUES)} only")  # fmt: skip
        precision = setting.techniques.get("precision", {})
        for key in ("recipe", "activations"):
            if key in precision:
                raise InputError(f"precision.{key}", precision[key],
                                 "not executed yet", "leave it out")  # fmt: skip
        mode = setting.techniques.get("recompute", {}).get("mode", "none")
        if mode not in RECOMPUTE_MODES:
            raise InputError("recompute", mode, "not executed yet",
                             f"use {', '.join(RECOMPUTE_MODES)}")  # fmt: skip
        runtime = setting.techniques.get("runtime", {}).get("mode", "eager")
        if runtime not in RUNTIMES:
            raise InputError("runtime", runtime, "not executed yet", f"use {' or '.join(RUNTIMES)}")
        if runtime == "compiled" and mode == "selective":
            raise InputError("recompute", mode, "opens a layer that is compiled as a whole",
                             "use none or full, or --runtime eager")  # fmt: skip
        if runtime == "compiled" and phase.schedule in SPLIT_SCHEDULES:
            raise InputError("schedule", phase.schedule, "splits backwards, and layers compiled "
                             "as a whole do not", "use 1f1b, or --runtime eager")  # fmt: skip
    num_layers = phase.stages[-1].layers[1] + 1
    dtypes = {str(phase.technique("precision", i).get("compute")) for i in range(num_layers)}
    if len(dtypes) > 1:
        raise InputError("precision", ", ".join(sorted(dtypes)),
                         "layers of different precision cannot be run yet",
                         "use one for all layers")  # fmt: skip
    if phase.compute_dtype not in COMPUTE_DTYPES:
        raise InputError("precision", phase.compute_dtype,
                         "the executor has no such compute dtype",
                         f"use one of {', '.join(COMPUTE_DTYPES)}")  # fmt: skip


def _check_runtime(plan: Plan) -> None:
    """Raise InputError where a layer with routed experts would be compiled."""
    for index in range(plan.model.num_layers):
        runtime = plan.phase.technique("runtime", index).get("mode", "eager")
        if runtime == "compiled" and plan.model.layer_at(index).experts is not None:
            raise InputError("runtime", runtime, f"layer {index} routes tokens to experts, in "
                             "sizes that a compiled layer does not know", "use eager")  # fmt: skip


def check_model(model: Model) -> None:
    """Raise InputError for a model that is predicted but not executed yet."""
    if model.traced is not None:
        return
    if not model.is_decoder:
        raise InputError("model", model.name,
                         "encoders, images and convolutions are not executed yet",
                         "run a decoder; this model can be planned and predicted")  # fmt: skip
    for layer in model.layers:
        if layer.bias and (layer.experts is not None or layer.latent is not None):
            raise InputError("layers.bias", True, "experts and latent attention have no biases",
                             "set bias = false (qkv_bias may stay beside experts)")  # fmt: skip
        if layer.qkv_bias and layer.latent is not None:
            raise InputError("layers.qkv_bias", True, "latent attention has no biases",
                             "set qkv_bias = false")  # fmt: skip
    if len(set(map(_rotary_dim, model.layers))) > 1 and model.positions == "rope":
        raise InputError("layers.head_dim", "unequal", "rotary positions take one head size",
                         "give all layers the same head_dim")  # fmt: skip
    if model.positions == "alibi":
        raise InputError("positions", "alibi", "cannot be run yet", "use rope, learned or none")


def _check_shards(plan: Plan) -> None:
    """Raise InputError where ZeRO would have to cut experts into unequal parts."""
    phase, mesh, hidden = plan.phase, plan.phase.mesh, plan.model.hidden
    shards = mesh.expert_shards
    for index in range(plan.model.num_layers if phase.zero else 0):
        experts = plan.model.layer_at(index).experts
        if experts is None:
            continue
        slots = phase.technique("expert-placement", index).get("slots")
        held = len(slots[0]) if slots else experts.num_experts // mesh.ep
        replicated = slots is not None and held * mesh.ep > experts.num_experts
        widths = (experts.ffn_hidden // mesh.expert_tp, hidden)
        if (replicated or held % shards) and any(width % shards for width in widths):
            raise InputError("dp_shard", mesh.dp_shard, f"{shards} ranks share {held} experts of "
                             f"width {widths[0]}, which they divide neither way",
                             "change dp_shard or ep")  # fmt: skip


def check_kept(plan: Plan) -> None:
    """Raise InputError for a plan that can be run, but not kept in checkpoints."""
    if plan.phase.technique(expert_offload.NAME).get("moments", False):
        raise InputError("checkpoint", expert_offload.NAME,
                         "moments on the host are not kept yet",
                         "drop --checkpoint, or plan without --expert-offload")  # fmt: skip
    for index in range(plan.model.num_layers):
        slots = plan.phase.technique("expert-placement", index).get("slots", ())
        in_slots = [expert for rank in slots for expert in rank]
        if in_slots != list(range(len(in_slots))):
            raise InputError("checkpoint", "expert-placement", f"layer {index} has its experts out "
                             "of order, which checkpoints do not keep yet",
                             "drop --checkpoint, or plan without --expert-placement")  # fmt: skip


def _rotary_dim(layer: Layer) -> int:
    return layer.head_dim if layer.latent is None else layer.latent.qk_rope_head_dim


def _check_length(model: Model, seq_tokens: int) -> None:
    if model.positions == "learned" and seq_tokens > (model.max_positions or 0):
        raise InputError("seq-len", seq_tokens,
                         f"{model.name} has {model.max_positions} learned positions",
                         "use a shorter sequence")  # fmt: skip
