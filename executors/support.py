"""What can be executed at all; answered without torch, before any process starts."""

from __future__ import annotations

from ..errors import InputError
from ..model import Model
from ..plan import Phase, Plan

TECHNIQUES = ("precision", "recompute", "context-parallel", "unequal")
"""Those that have a file in `executors/techniques/`."""
SCHEDULES = ("gpipe", "1f1b", "interleaved")
COMPUTE_DTYPES = ("fp32", "bf16")
RECOMPUTE_MODES = ("none", "selective", "full", "full_keep_attn")


def check_executed(plan: Plan) -> None:
    """Raise InputError for a plan that is predicted but not executed yet."""
    if len(plan.phases) != 1:
        raise InputError("phases", len(plan.phases), "runs have one phase for now",
                         "give a plan with one phase")  # fmt: skip
    _check_phase(plan.phase)
    if plan.model.traced is None:
        check_model(plan.model)
        _check_length(plan.model, plan.phase.seq_tokens)
    elif plan.workload.lengths is not None:
        raise InputError("lengths", plan.workload.lengths.name,
                         "documents are packed for decoders of the catalog alone",
                         "drop --lengths")  # fmt: skip
    if plan.workload.optimizer != "adamw":
        raise InputError("optimizer", plan.workload.optimizer, "not executed yet", "use adamw")


def _check_phase(phase: Phase) -> None:
    for axis in ("ep",):
        degree = getattr(phase.mesh, axis)
        if degree > 1:
            raise InputError(axis, degree, "cannot be run yet", f"use --{axis} 1")
    if phase.schedule not in SCHEDULES:
        raise InputError("schedule", phase.schedule, "cannot be run yet",
                         f"use {', '.join(SCHEDULES)}")  # fmt: skip
    if phase.orders is not None:
        raise InputError("orders", "given", "orders of one's own cannot be run yet",
                         f"use a schedule: {', '.join(SCHEDULES)}")  # fmt: skip
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
