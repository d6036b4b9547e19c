"""The techniques of a row, in the form `Setting.techniques` holds, and its optimiser."""

from __future__ import annotations

import re
from typing import Any

from ...errors import InputError, unknown_name
from ...model import Model
from ...stack import Stack
from ...workload import Optimizer
from .table import Row

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"compute": "fp32"},
    "fp16": {"compute": "fp16"},
    "bf16": {"compute": "bf16"},
    "fp8": {"compute": "fp8"},
    "mxfp8": {"compute": "mxfp8"},
    "nvfp4": {"compute": "nvfp4"},
    "fp8_coat": {"compute": "fp8", "recipe": "coat", "activations": "fp8"},
    "bf16+nf4": {"compute": "bf16"},
    "bf16+nf4-dq": {"compute": "bf16"},
}
OPTIMIZERS: dict[str, Optimizer] = {
    "": "adamw", "adam": "adamw", "adamw": "adamw", "adamw8bit": "adamw8bit",
    "adamw_fp8": "adamw_fp8", "adamw_fp8_states": "adamw_fp8", "sgd": "sgd",
}  # fmt: skip
FINETUNING = ("sft", "full", "full finetune", "lora", "qlora")
"""Tasks, as notes name them, whose samples are short and packed."""
LORA_RANK = 16
"""Of adapters whose rank is not stated: assumed."""
KERNELS = {
    "unfused": "unfused", "none(pytorch)": "eager",
    "flash1": "flash1", "flash2": "flash2", "flash3": "flash3",
}  # fmt: skip
"""Attention kernels by cell; others are the stack's own fused kernel."""


def optimizer_of(row: Row) -> Optimizer:
    """The optimiser of a row; AdamW where the cell is empty."""
    if row.optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", row.optimizer, filter(None, OPTIMIZERS))
    return OPTIMIZERS[row.optimizer]


def techniques_of(
    row: Row, model: Model, recompute: str, stack: Stack
) -> dict[str, dict[str, Any]]:
    """Every technique that a row uses, with this mode of recomputation."""
    chosen: dict[str, dict[str, Any]] = {"precision": _precision(row)}
    if recompute != "none":
        chosen["recompute"] = {"mode": recompute}
    kernel = KERNELS.get(row.attention_kernel)
    if kernel:
        chosen["attention"] = {"kernel": kernel}
    if row.note("task") in FINETUNING and stack.finetuning_document_tokens is not None:
        documents = {"documents": stack.finetuning_document_tokens}
        chosen["attention"] = {**chosen.get("attention", {}), **documents}
    if row.says("async TP"):
        chosen["tensor-parallel"] = {"async": True}
    lora = _lora(row, model, stack)
    if lora:
        chosen["lora"] = lora
    kind = _cp_kind(row)
    if kind:
        chosen["context-parallel"] = {"kind": kind}
    runtime = _runtime(row, stack)
    if runtime:
        chosen["runtime"] = {"mode": runtime}
    offload = _offload(row, model)
    if offload:
        chosen["offload"] = {"activations": offload}
    return chosen


def is_per_op(row: Row) -> bool:
    """Whether selective recomputation means every second matmul, as in torchtitan."""
    return row.says("selective per-op")


def _precision(row: Row) -> dict[str, Any]:
    if row.precision not in PRECISIONS:
        if not row.precision:
            return dict(PRECISIONS["bf16"])
        raise unknown_name("precision", row.precision, PRECISIONS)
    chosen = dict(PRECISIONS[row.precision])
    if row.says("rowwise") and chosen["compute"] == "fp8":
        chosen["recipe"] = "rowwise"
    return chosen


def _lora(row: Row, model: Model, stack: Stack) -> dict[str, Any]:
    """Adapters of the stated rank, or with the stated parameters, on the linears of the stack's
    recipe."""
    if row.note("task") not in ("lora", "qlora"):
        return {}
    targets = stack.lora_targets
    chosen: dict[str, Any] = {"rank": _rank(row, model, targets), "targets": targets}
    if "nf4" in row.precision or row.note("task") == "qlora":
        chosen["base"] = "nf4"
    return chosen


def _rank(row: Row, model: Model, targets: str) -> int:
    rank, trainable = row.note("lora_rank"), row.note("trainable_params")
    for name, text in (("lora_rank", rank), ("trainable_params", trainable)):
        if text is not None and not re.fullmatch(r"[1-9]\d{0,11}", text):
            raise InputError(name, text, "not a positive whole number", "correct the note")
    if rank is not None:
        return int(rank)
    if trainable is None:
        return LORA_RANK
    per_rank = 0
    for layer in model.layers:
        query = model.hidden + layer.heads * layer.head_dim
        key = model.hidden + layer.kv_heads * layer.head_dim
        matrices = 3 if layer.mlp == "swiglu" else 2
        mlp = matrices * (model.hidden + layer.ffn_hidden)
        adapted = {"qv": query + key, "qkv": query + 2 * key, "all": 2 * query + 2 * key + mlp}
        per_rank += layer.repeat * adapted[targets]
    return max(1, round(int(trainable) / per_rank))


def _cp_kind(row: Row) -> str | None:
    """How cp cuts the sequence where the notes say so; zigzag otherwise."""
    if (row.cp or 1) == 1:
        return None
    return "ulysses" if row.says("ulysses") else "ring" if row.says("ring CP") else None


def _runtime(row: Row, stack: Stack) -> str | None:
    if row.says("cuda graph"):
        return "graphs"
    return "compiled" if row.says("torch.compile") else stack.runtime


def _offload(row: Row, model: Model) -> float | None:
    """The fraction of saved activations kept on the host."""
    if row.offload in ("", "none"):
        return None
    if row.offload != "activations":
        raise InputError("offload", row.offload, "not modelled", "use none or activations")
    layers = re.search(r"offloads activations of (\d+) layers", row.notes)
    return 1.0 if layers is None else min(1.0, int(layers[1]) / model.num_layers)
