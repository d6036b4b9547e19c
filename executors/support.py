"""What can be executed at all; answered without torch, before any process starts."""

from __future__ import annotations

from ..costmodel.layers import decoder_layer
from ..costmodel.options import Options
from ..costmodel.techniques import apply
from ..costmodel.techniques.recompute import tensor_names
from ..errors import InputError, unknown_name
from ..model import Model
from ..plan import RECOMPUTE_MODES, SPLIT_SCHEDULES, TENSORS, Phase, Plan

TECHNIQUES = ("precision", "recompute", "offload", "runtime")
"""Those that have a file in `executors/techniques/`."""
COMPUTE_DTYPES = ("fp32", "bf16")
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
    _check_offload(plan)
    if plan.model.traced is None:
        check_model(plan.model)
        _check_kept(plan)
        _check_length(plan.model, plan.phase.seq_tokens)
    if plan.workload.optimizer != "adamw":
        raise InputError("optimizer", plan.workload.optimizer, "not executed yet", "use adamw")


def _check_phase(phase: Phase) -> None:
    for axis in ("cp", "ep"):
        degree = getattr(phase.mesh, axis)
        if degree > 1:
            raise InputError(axis, degree, "cannot be run yet", f"use --{axis} 1")
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
        if mode not in (*RECOMPUTE_MODES, TENSORS):
            raise InputError("recompute", mode, "not executed yet",
                             f"use {', '.join((*RECOMPUTE_MODES, TENSORS))}")  # fmt: skip
        runtime = setting.techniques.get("runtime", {}).get("mode", "eager")
        if runtime not in RUNTIMES:
            raise InputError("runtime", runtime, "not executed yet", f"use {' or '.join(RUNTIMES)}")
        if runtime == "compiled" and mode not in ("none", "full"):
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


def _check_kept(plan: Plan) -> None:
    """Raise InputError where what layers keep contradicts itself, or names tensors they lack."""
    phase = plan.phase
    for index in sorted({setting.layers[0] for setting in phase.settings}):
        options = Options.of(phase, plan.workload, index)
        fused = plan.cluster.pool(phase.stages[0].pool).device.kind == "gpu"
        layer = plan.model.layer_at(index)
        sp = phase.sequence_parallel
        graph = decoder_layer(plan.model, layer, sequence_parallel=sp, fused=fused, options=options)
        apply(graph, options)
        known = tensor_names(graph)
        for name in options.keep:
            if name not in known:
                raise unknown_name("recompute.keep", name, known)


def _check_offload(plan: Plan) -> None:
    phase = plan.phase
    for setting in phase.settings:
        offload = setting.techniques.get("offload", {})
        moves = offload.get("activations") or offload.get("rest") == "recompute"
        if moves and setting.techniques.get("runtime", {}).get("mode", "eager") == "compiled":
            raise InputError("offload", offload.get("activations", 0.0),
                             "opens a layer that is compiled as a whole",
                             "use --runtime eager, or --offload 0")  # fmt: skip
        if plan.model.traced is not None and offload.get("rest", "keep") != "keep":
            raise InputError("offload.rest", offload["rest"],
                             "a module of one's own names no operators to run again",
                             "use rest=keep")  # fmt: skip
        if offload.get("states") != "parameters":
            continue
        if plan.cluster.pool(phase.stages[0].pool).device.kind == "cpu":
            raise InputError("offload", "parameters", "on CPUs the host is where they are already",
                             "use --offload optimizer")  # fmt: skip
        if plan.workload.clip_norm is not None:
            raise InputError("offload", "parameters", "the norm of gradients is one of the device",
                             "drop --clip-norm, or use --offload optimizer")  # fmt: skip
        if phase.zero == 0:
            raise InputError("offload", "parameters", "FSDP moves them, and zero=0 has none",
                             "use --zero 1, 2 or 3")  # fmt: skip
        if phase.sequence_parallel or (phase.mesh.pp > 1 and plan.model.tied_embeddings):
            problem = "gradients that ranks share are summed on the device"
            remedy = "drop --sp or --pp, or use --offload optimizer"
            raise InputError("offload", "parameters", problem, remedy)


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
