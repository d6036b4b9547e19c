"""What can be executed at all; answered without torch, before any process starts."""

from __future__ import annotations

from ..errors import InputError
from ..model import Model
from ..plan import SPLIT_SCHEDULES, Phase, Plan

TECHNIQUES = ("precision", "recompute", "runtime", "context-parallel")
"""Those that have a file in `executors/techniques/`, and `executors/context_parallel/`."""
COMPUTE_DTYPES = ("fp32", "bf16")
RECOMPUTE_MODES = ("none", "selective", "full", "full_keep_attn")
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
    if plan.model.traced is None:
        check_model(plan.model)
        _check_length(plan.model, plan.phase.seq_tokens)
    elif plan.workload.lengths is not None:
        raise InputError("lengths", plan.workload.lengths.name,
                         "documents are packed for decoders of the catalog alone",
                         "drop --lengths")  # fmt: skip
    if plan.workload.lengths is not None and _compiles(plan.phase):
        raise InputError("lengths", plan.workload.lengths.name, "differ from step to step, and "
                         "layers are compiled for one form", "use --runtime eager")  # fmt: skip
    if plan.model.traced is not None and plan.phase.mesh.cp > 1:
        raise InputError("cp", plan.phase.mesh.cp, "modules of one's own do not share sequences",
                         "use --cp 1")  # fmt: skip
    if plan.workload.optimizer != "adamw":
        raise InputError("optimizer", plan.workload.optimizer, "not executed yet", "use adamw")


def _compiles(phase: Phase) -> bool:
    """Whether any layer is compiled."""
    return any(s.techniques.get("runtime", {}).get("mode") == "compiled" for s in phase.settings)


def _check_phase(phase: Phase) -> None:
    if phase.mesh.ep > 1:
        raise InputError("ep", phase.mesh.ep, "cannot be run yet", "use --ep 1")
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
        if runtime == "compiled" and mode in ("selective", "full_keep_attn"):
            raise InputError("recompute", mode, "opens a layer that is compiled as a whole",
                             "use none or full, or --runtime eager")  # fmt: skip
        if runtime == "compiled" and phase.mesh.cp > 1:
            raise InputError("cp", phase.mesh.cp, "exchanges messages inside of layers, which are "
                             "compiled as a whole", "use --cp 1, or --runtime eager")  # fmt: skip
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


def check_model(model: Model) -> None:
    """Raise InputError for a model that is predicted but not executed yet."""
    if model.traced is not None:
        return
    if not model.is_decoder:
        raise InputError("model", model.name,
                         "encoders, images and convolutions are not executed yet",
                         "run a decoder; this model can be planned and predicted")  # fmt: skip
    for layer in model.layers:
        if layer.experts is not None:
            raise InputError("layers.experts", layer.experts.num_experts,
                             "mixtures of experts cannot be run yet",
                             "use a dense model")  # fmt: skip
        if layer.latent is not None:
            raise InputError("layers.latent", layer.latent.kv_lora_rank,
                             "latent attention cannot be run yet",
                             "use a model with grouped-query attention")  # fmt: skip
    if len({layer.head_dim for layer in model.layers}) > 1 and model.positions == "rope":
        raise InputError("layers.head_dim", "unequal", "rotary positions take one head size",
                         "give all layers the same head_dim")  # fmt: skip
    if model.positions == "alibi":
        raise InputError("positions", "alibi", "cannot be run yet", "use rope, learned or none")


def _check_length(model: Model, seq_tokens: int) -> None:
    if model.positions == "learned" and seq_tokens > (model.max_positions or 0):
        raise InputError("seq-len", seq_tokens,
                         f"{model.name} has {model.max_positions} learned positions",
                         "use a shorter sequence")  # fmt: skip
