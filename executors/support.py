"""What can be executed at all; answered without torch, before any process starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from ..choices import RECIPES, RECOMPUTE_MODES, RUNTIMES, STORAGE_DTYPES, TENSORS
from ..costmodel import admissible
from ..costmodel.layers import decoder_layer
from ..costmodel.options import Options
from ..costmodel.techniques import apply, halo
from ..costmodel.techniques.offload import check as check_offload
from ..costmodel.techniques.recompute import tensor_names
from ..costmodel.techniques.storage import EXECUTED
from ..errors import InputError, unknown_name
from ..model import Layer, Model
from ..plan import Phase, Plan
from ..schedules import SPLIT_SCHEDULES
from .adapters import check_adapters

TECHNIQUES = (
    "precision", "recompute", "offload", "runtime", "context-parallel", "expert-placement", "lora",
    "local-sgd",
)  # fmt: skip
"""Those that have a file in `executors/techniques/`, `executors/context_parallel/` and
`executors/local_sgd/`."""
COMPUTE_DTYPES = ("fp32", "bf16", "fp8", *halo.COMPUTE)
TORCHAO_RECIPES = ("tensorwise", "rowwise")
TORCHAO_OPTIMIZERS = ("adamw8bit", "adamw4bit", "adamw_fp8_block", "adamw_offload")
EXPERT_OPTIMIZERS = ("adamw", "sgd")
"""Those whose states experts have been trained with: one per element, in the parameter's dtype."""
LINEARS = ("wq", "wk", "wv", "wo", "gate", "up", "down")
IN_FRAMES = (TENSORS, "elementwise", "per_op")
"""Recompute modes that run single operators again, and not the attention core alone."""


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
        check_adapters(plan)
        _check_runtime(plan)
        _check_kept(plan)
        _check_single_operators(plan)
        _check_length(plan.model, plan.phase.seq_tokens)
        _check_shards(plan)
        _check_beside(plan)
    elif any("lora" in setting.techniques for setting in plan.phase.settings):
        raise InputError("lora", "rank", "a module of one's own says itself what trains",
                         "drop --lora, and freeze parameters in the module")  # fmt: skip
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
    admissible.check(plan)
    _check_precision(plan)
    _check_optimizer(plan)
    _check_apart(plan)


def _compiles(phase: Phase) -> bool:
    """Whether any layer is compiled."""
    return any(s.techniques.get("runtime", {}).get("mode") == "compiled" for s in phase.settings)


def _check_phase(phase: Phase) -> None:
    for setting in phase.settings:
        for name in setting.techniques:
            if name not in TECHNIQUES:
                raise InputError("settings.techniques", name, "cannot be run yet",
                                 f"use {', '.join(TECHNIQUES)} only")  # fmt: skip
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
        if runtime == "compiled" and phase.mesh.cp > 1:
            raise InputError("cp", phase.mesh.cp, "exchanges messages inside of layers, which are "
                             "compiled as a whole", "use --cp 1, or --runtime eager")  # fmt: skip
        if runtime == "compiled" and phase.schedule in SPLIT_SCHEDULES:
            raise InputError("schedule", phase.schedule, "splits backwards, and layers compiled "
                             "as a whole do not", "use 1f1b, or --runtime eager")  # fmt: skip


def _check_beside(plan: Plan) -> None:
    """What layers with routed experts or latent attention are not run beside yet."""
    phase, workload = plan.phase, plan.workload
    for index in range(plan.model.num_layers):
        layer = plan.model.layer_at(index)
        if layer.is_plain:
            continue
        what = "routed experts" if layer.experts is not None else "latent attention"
        if phase.mesh.cp > 1:
            raise InputError("cp", phase.mesh.cp, f"layer {index} has {what}, which do not share "
                             "sequences yet", "use --cp 1")  # fmt: skip
        if workload.lengths is not None:
            raise InputError("lengths", workload.lengths.name, f"layer {index} has {what}, beside "
                             "which documents are not packed yet", "drop --lengths")  # fmt: skip
        precision = phase.technique("precision", index)
        for key, problem in (
            ("compute", _is_low(precision)),
            ("activations", "activations" in precision),
        ):
            if problem:
                raise InputError(f"precision.{key}", precision[key], f"layer {index} has {what}, "
                                 "which do not work in 8 bits yet",
                                 "use bf16, and store activations as they come")  # fmt: skip
        mode = phase.technique("recompute", index).get("mode", "none")
        if mode in IN_FRAMES:
            raise InputError("recompute", mode, f"layer {index} has {what}, whose tensors are not "
                             "told apart yet", "use full or selective")  # fmt: skip
        offload = phase.technique("offload", index)
        if offload.get("activations") or offload.get("rest") == "recompute":
            raise InputError("offload", offload.get("activations", 0.0), f"layer {index} has "
                             f"{what}, whose activations do not leave the device yet",
                             "use --offload 0, or recompute full")  # fmt: skip
        if offload.get("states") == "parameters" and layer.experts is not None:
            raise InputError("offload", "parameters", f"layer {index} has routed experts, whose "
                             "shards FSDP does not move yet",
                             "use --offload optimizer, or --offload experts")  # fmt: skip
        if mode == "full_keep_attn" and layer.latent is not None:
            raise InputError("recompute", mode, f"layer {index} has latent attention, whose output "
                             "is not kept apart", "use full or selective")  # fmt: skip
        if layer.experts is not None and workload.optimizer not in EXPERT_OPTIMIZERS:
            raise InputError("optimizer", workload.optimizer, f"layer {index} has routed experts, "
                             "whose states it does not hold yet",
                             f"use {' or '.join(EXPERT_OPTIMIZERS)}")  # fmt: skip


def _check_precision(plan: Plan) -> None:
    """Every layer's dtypes, recipe of scaling, and storage of activations."""
    phase = plan.phase
    num_layers = phase.stages[-1].layers[1] + 1
    each = [phase.technique("precision", i) for i in range(num_layers)]
    dtypes = {str(settings.get("compute", "bf16")) for settings in each}
    for dtype in sorted(dtypes - set(COMPUTE_DTYPES)):
        raise InputError("precision", dtype, "the executor has no such compute dtype",
                         f"use one of {', '.join(COMPUTE_DTYPES)}")  # fmt: skip
    if "fp32" in dtypes and len(dtypes) > 1:
        raise InputError("precision", ", ".join(sorted(dtypes)),
                         "hidden states of layers have one dtype",
                         "mix bf16 and lower ones alone")  # fmt: skip
    for index, settings in enumerate(each):
        if plan.model.traced is not None:
            _refuse_traced(settings)
        else:
            _check_layer(plan, index, settings)


def _refuse_traced(settings: Mapping[str, Any]) -> None:
    wide = settings.get("compute", "bf16") in ("fp32", "bf16")
    for key, problem in (("compute", not wide), ("activations", "activations" in settings)):
        if problem:
            raise InputError(f"precision.{key}", settings[key],
                             "linears of a user's module are left as they are",
                             "use fp32 or bf16, and store activations as they come")  # fmt: skip


def _is_low(settings: Mapping[str, Any]) -> bool:
    """Whether linears run below 16 bits."""
    return settings.get("compute", "bf16") not in ("fp32", "bf16")


def _check_layer(plan: Plan, index: int, settings: Mapping[str, Any]) -> None:
    low, stored = _is_low(settings), "activations" in settings
    for name in settings.get("linears", ()):
        if name not in LINEARS:
            raise unknown_name("precision.linears", name, LINEARS)
    recipe = str(settings.get("recipe", "tensorwise"))
    mode = str(plan.phase.technique("recompute", index).get("mode", "none"))
    if recipe not in RECIPES:
        raise InputError("precision.recipe", recipe, "unknown scaling of matmuls",
                         f"use {', '.join(RECIPES)}")  # fmt: skip
    if stored and recipe in halo.LEVELS:
        raise InputError("precision.recipe", recipe, "says itself what its linears keep",
                         "use recipe coat to store activations in fp8")  # fmt: skip
    if low and recipe in TORCHAO_RECIPES:
        if stored:
            raise InputError("precision.recipe", recipe,
                             "torchao's linears keep their 16-bit input",
                             "use recipe coat to store activations in fp8")  # fmt: skip
        _need_torchao("precision.recipe", recipe, "recipe coat")
        _check_multiples(plan, index, recipe)
    if low or stored:
        _check_whole_backward(plan.phase, index, "compute" if low else "activations")
    if not stored:
        return
    if settings["activations"] not in STORAGE_DTYPES:
        raise InputError("precision.activations", settings["activations"],
                         "unknown storage of activations",
                         f"use {', '.join(STORAGE_DTYPES)} or leave it out")  # fmt: skip
    if mode not in ("none", "selective"):
        raise InputError("precision.activations", settings["activations"],
                         f"recompute {mode} does not keep the activations to be stored",
                         "use recompute none or selective")  # fmt: skip
    mlp = plan.model.layer_at(index).mlp
    if mlp not in EXECUTED:
        raise InputError("precision.activations", settings["activations"],
                         f"layers with {mlp} cannot store theirs yet",
                         "leave it out")  # fmt: skip


def _check_whole_backward(phase: Phase, index: int, key: str) -> None:
    """Functions of our own around 8-bit tensors run eagerly, and a backward at once."""
    field, value = f"precision.{key}", phase.technique("precision", index)[key]
    if phase.schedule in SPLIT_SCHEDULES:
        raise InputError(field, value, f"layers that work in 8 bits do not split their backward, "
                         f"which {phase.schedule} does", "use schedule 1f1b, or bf16")  # fmt: skip
    if phase.technique("runtime", index).get("mode") == "compiled":
        raise InputError(field, value, "layers that work in 8 bits are not compiled",
                         "use --runtime eager, or bf16")  # fmt: skip


def _check_multiples(plan: Plan, index: int, recipe: str) -> None:
    """torchao's matmuls on GPUs take dimensions in multiples of 16; ours fill them up."""
    if plan.cluster.pools[0].device.kind != "gpu":
        return
    layer, tp = plan.model.layer_at(index), plan.phase.mesh.tp
    tokens = plan.phase.micro_batch_seqs * plan.phase.seq_tokens
    sizes = {
        "tokens of a micro-batch": tokens,
        "hidden": plan.model.hidden,
        "width of queries": layer.heads * layer.head_dim // tp,
        "width of keys": layer.kv_heads * layer.head_dim // tp,
        "ffn width": layer.ffn_hidden // tp,
    }
    for what, size in sizes.items():
        if size % 16:
            raise InputError("precision.recipe", recipe,
                             f"{what} {size} of layer {index} is no multiple of 16",
                             "use recipe coat, which fills it up, or bf16")  # fmt: skip


def _check_optimizer(plan: Plan) -> None:
    name, phase = plan.workload.optimizer, plan.phase
    if name in TORCHAO_OPTIMIZERS:
        _need_torchao("optimizer", name, "adamw_fp8 or adamw")
    if name == "adamw_offload" and plan.workload.clip_norm is not None:
        raise InputError("clip_norm", plan.workload.clip_norm,
                         "adamw_offload takes gradients to the host before their norm is known",
                         "drop it, or use adamw")  # fmt: skip
    if name == "adamw_offload" and (phase.mesh.world > 1 or phase.compute_dtype != "fp32"):
        what = "one process" if phase.mesh.world > 1 else "fp32, without FSDP's shards"
        raise InputError("optimizer", name, f"torchao's offload runs with {what}",
                         "use adamw_fp8, or adamw with more shards")  # fmt: skip


def _need_torchao(field: str, value: str, instead: str) -> None:
    if find_spec("torchao") is None:
        raise InputError(field, value, "needs torchao",
                         f"pip install 'forerun[torchao]', or use {instead}")  # fmt: skip


def _check_runtime(plan: Plan) -> None:
    """Raise InputError where a layer with routed experts would be compiled."""
    for index in range(plan.model.num_layers):
        runtime = plan.phase.technique("runtime", index).get("mode", "eager")
        if runtime == "compiled" and plan.model.layer_at(index).experts is not None:
            raise InputError("runtime", runtime, f"layer {index} routes tokens to experts, in "
                             "sizes that a compiled layer does not know", "use eager")  # fmt: skip


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
        plain = replace(options, recompute="none", keep=(), offload=0.0, offload_rest="keep")
        known = tensor_names(apply(graph, plain))
        for name in options.keep:
            if name not in known:
                raise unknown_name("recompute.keep", name, known)


def _check_single_operators(plan: Plan) -> None:
    """Raise InputError where layers run single operators again that frames do not take apart."""
    phase = plan.phase
    for setting in phase.settings:
        mode = setting.techniques.get("recompute", {}).get("mode", "none")
        by_tokens = setting.techniques.get("offload", {}).get("rest") == "recompute"
        if mode not in IN_FRAMES and not by_tokens:
            continue
        field, value = ("recompute", mode) if mode in IN_FRAMES else ("offload.rest", "recompute")
        if phase.mesh.ulysses > 1:
            raise InputError(field, value, "runs projections again, whose results are exchanged",
                             "use --recompute full or selective, or --cp-kind zigzag")  # fmt: skip
        if _is_low(setting.techniques.get("precision", {})):
            raise InputError(field, value, "runs linears again, whose 8-bit operands are shared",
                             "use --recompute full or selective, or bf16")  # fmt: skip
        if by_tokens and plan.workload.lengths is not None:
            raise InputError(field, value, "takes the same tokens of every sequence, and documents "
                             "have positions of their own", "use rest=keep")  # fmt: skip


def _check_offload(plan: Plan) -> None:
    phase = plan.phase
    for setting in phase.settings:
        check_offload(Options.of(phase, plan.workload, setting.layers[0]))
        offload = setting.techniques.get("offload", {})
        moves = offload.get("activations") or offload.get("rest") == "recompute"
        precision = setting.techniques.get("precision", {})
        if moves and ("activations" in precision or _is_low(precision)):
            raise InputError("offload", offload.get("activations", 0.0),
                             "layers that work in 8 bits keep all of theirs on the device",
                             "use --offload 0, or bf16 and activations as they come")  # fmt: skip
        if moves and setting.techniques.get("recompute", {}).get("mode") == "full_keep_attn":
            raise InputError("offload", offload.get("activations", 0.0),
                             "recompute full_keep_attn hands attention's output on by itself",
                             "use --recompute full or tensors, or --offload 0")  # fmt: skip
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
        if precision.get("recipe") in halo.LEVELS and halo.LEVELS[precision["recipe"]].gathers:
            raise InputError("offload", "parameters", f"recipe {precision['recipe']} gathers codes "
                             "of weights on the device",
                             "use --offload optimizer, or a recipe without hq")  # fmt: skip
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


def _check_apart(plan: Plan) -> None:
    """What replicas that train apart do not run with yet."""
    local = plan.phase.local_sgd
    if local is None:
        return
    for problem, there in (
        ("a module of one's own has no replicas apart yet", plan.model.traced is not None),
        ("routed experts have no replicas apart yet",
         any(layer.experts is not None for layer in plan.model.layers)),
        ("parameters that FSDP keeps on the host do not meet those of other replicas yet",
         any(s.techniques.get("offload", {}).get("states") == "parameters"
             for s in plan.phase.settings)),
    ):  # fmt: skip
        if there:
            raise InputError("local-sgd", local.label, problem, "leave out --local-sgd")


def check_kept(plan: Plan) -> None:
    """Raise InputError for a plan that can be run, but not kept in checkpoints."""
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
