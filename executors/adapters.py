"""What adapters, and the frozen weights beside them, are not run with; answered without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..costmodel.techniques.lora import BASES, NF4_BLOCK, TARGETS
from ..errors import InputError
from ..model import GATED, Layer, Model
from ..plan import Plan

ROWS = ("wo", "down")
"""Linears whose inputs tp cuts; of the others it cuts the outputs."""
BYTE_BITS = 8


def check_adapters(plan: Plan) -> None:
    """Raise InputError for adapters, or storage of weights, that the executor does not run."""
    phase, num = plan.phase, plan.model.num_layers
    each = [phase.technique("lora", index) for index in range(num)]
    if not any(each):
        return
    for index, settings in enumerate(each):
        _check_settings(settings, index)
        layer = plan.model.layer_at(index)
        if not layer.is_plain:
            what = "routed experts" if layer.experts is not None else "latent attention"
            raise InputError("lora.rank", settings["rank"], f"layer {index} has {what}, which have "
                             "no adapters yet", "train all weights, or a dense model")  # fmt: skip
        _check_beside(plan, index, settings)
    for index, settings in enumerate(each):
        for name, (width_out, width_in) in linears(plan.model, plan.model.layer_at(index)):
            _check_rank(settings, index, name, width_out, width_in)
            _check_base(settings, index, name, width_out, width_in, phase.mesh.tp)


def linears(model: Model, layer: Layer) -> Iterator[tuple[str, tuple[int, int]]]:
    """The linears of a layer with (outputs, inputs)."""
    hidden, width = model.hidden, layer.heads * layer.head_dim
    kv_width = layer.kv_heads * layer.head_dim
    yield "wq", (width, hidden)
    yield "wk", (kv_width, hidden)
    yield "wv", (kv_width, hidden)
    yield "wo", (hidden, width)
    if layer.mlp in GATED:
        yield "gate", (layer.ffn_hidden, hidden)
    yield "up", (layer.ffn_hidden, hidden)
    yield "down", (hidden, layer.ffn_hidden)


def _check_settings(settings: Mapping[str, Any], index: int) -> None:
    if not settings:
        raise InputError("settings", f"layer {index}", "has no adapters, and others have",
                         "give every layer lora.rank, or none")  # fmt: skip
    rank, targets = settings.get("rank"), settings.get("targets", "all")
    if not isinstance(rank, int) or rank < 1:
        raise InputError("lora.rank", rank, "not a positive number", "give 1 or more")
    if targets not in ("all", *TARGETS):
        raise InputError("lora.targets", targets, "unknown choice",
                         f"use all, {', '.join(TARGETS)}")  # fmt: skip
    base = settings.get("base")
    if base is not None and base not in BASES:
        raise InputError("lora.base", base, "unknown storage of frozen weights",
                         f"use {', '.join(BASES)} or leave it out")  # fmt: skip


def _check_rank(
    settings: Mapping[str, Any], index: int, name: str, width_out: int, width_in: int
) -> None:
    targets = TARGETS.get(str(settings.get("targets", "all")))
    most = min(width_out, width_in)
    if (targets is None or name in targets) and settings["rank"] > most:
        raise InputError("lora.rank", settings["rank"], f"{name} of layer {index} is {width_out} x "
                         f"{width_in}, of rank {most} at most", f"give 1 to {most}")  # fmt: skip


def _check_base(
    settings: Mapping[str, Any], index: int, name: str, width_out: int, width_in: int, tp: int
) -> None:
    base = settings.get("base")
    if base is None:
        return
    group = NF4_BLOCK if base == "nf4" else int(str(base).rpartition("g")[2])
    part_in = width_in // tp if name in ROWS else width_in
    part_out = width_out if name in ROWS else width_out // tp
    where = f"{name} of layer {index} is {part_out} x {part_in}" + (
        f" at tp={tp}" if tp > 1 else ""
    )
    if part_in % group:
        raise InputError("lora.base", base, f"{where}, and {group} does not divide {part_in}",
                         "use a smaller group or tp, or leave base out")  # fmt: skip
    if base != "nf4" and tp > 1 and part_out % BYTE_BITS:
        raise InputError("lora.base", base, f"{where}, whose zeros do not fill bytes",
                         "use a smaller tp, or leave base out")  # fmt: skip


def _check_beside(plan: Plan, index: int, settings: Mapping[str, Any]) -> None:
    """What a layer with adapters is not run beside yet."""
    phase, rank = plan.phase, settings["rank"]
    precision = phase.technique("precision", index)
    if precision.get("compute") == "fp8" or "activations" in precision:
        key = "activations" if "activations" in precision else "compute"
        raise InputError(f"precision.{key}", precision[key], "layers with adapters do not work in "
                         "8 bits yet", "use bf16 or fp32, or drop --lora")  # fmt: skip
    if phase.technique("offload", index).get("states") == "parameters":
        raise InputError("offload", "parameters", "frozen weights have no place there yet",
                         "use --offload optimizer, or drop --lora")  # fmt: skip
    compiled = phase.technique("runtime", index).get("mode") == "compiled"
    if compiled and "base" in settings:
        raise InputError("runtime", "compiled", "converts no stored weights yet",
                         f"use --runtime eager, or rank {rank} without a base")  # fmt: skip
