"""LoRA: what trains are low-rank adapters beside linears; all other weights are frozen.

Frozen parameters lie in the dtype that matmuls use, or, those of linears, in fewer bits
(`frozen/stored.py`). Adapters are parameters like those of a plain run: fp32 at rest. The first
layer's input passes an `Anchor`, so that its backward is that of every other layer; nothing is kept
of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...costmodel.techniques.lora import TARGETS
from ...plan import Phase
from ..decoder import Attention, Block, Decoder, Mlp
from ..frozen.stored import Stored
from ..linear import Linear
from .precision import compute_dtype

LINEARS = {"attention": ("wq", "wk", "wv", "wo"), "mlp": ("gate", "up", "down")}


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith(("lora_a.weight", "lora_b.weight"))


def is_used(phase: Phase) -> bool:
    """Whether a phase trains adapters alone."""
    return bool(phase.technique("lora"))


def linears_of(block: Block) -> dict[str, Linear]:
    """The linears of a block by their names in it."""
    assert isinstance(block.attention, Attention) and isinstance(block.mlp, Mlp)
    found = {f"{part}.{name}": getattr(block.get_submodule(part), name, None)
             for part, names in LINEARS.items() for name in names}  # fmt: skip
    return {name: linear for name, linear in found.items() if isinstance(linear, Linear)}


def apply(piece: Decoder, phase: Phase) -> None:
    """Give linears their adapters and freeze the rest; on the meta device, before tp cuts."""
    if not is_used(phase):
        return
    dtype = compute_dtype(phase)
    for module in piece.modules():
        for name, parameter in module.named_parameters(recurse=False):
            frozen = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            setattr(module, name, frozen)
    for index, block in piece.blocks.items():
        settings = phase.technique("lora", int(index))
        chosen = TARGETS.get(str(settings.get("targets", "all")))
        assert isinstance(block, Block)
        for name, linear in linears_of(block).items():
            if chosen is None or name.rpartition(".")[2] in chosen:
                _adapt(linear, int(settings["rank"]))
    if piece.is_first:
        piece.enter = anchored


def _adapt(linear: Linear, rank: int) -> None:
    with torch.device("meta"):
        linear.lora_a = Linear(linear.in_features, rank, bias=False)
        linear.lora_b = Linear(rank, linear.out_features, bias=False)


class Anchor(torch.autograd.Function):
    """Hidden states as they are, but in need of a gradient, which ends here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def anchored(x: Tensor) -> Any:
    """Hidden states in need of a gradient."""
    return Anchor.apply(x, torch.zeros((), requires_grad=torch.is_grad_enabled()))


def store(
    piece: Decoder,
    phase: Phase,
    shapes: Mapping[str, tuple[int, ...]],
    tp_dims: dict[str, int],
    tp: tuple[int, int],
) -> None:
    """Put bytes in the place of frozen weights where a layer's settings say so; after tp cut.

    `shapes` are those before the cut. What lies along a cut dimension is cut as the weight is.
    """
    for index, block in piece.blocks.items():
        base = phase.technique("lora", int(index)).get("base")
        if base is None:
            continue
        assert isinstance(block, Block)
        for name, linear in linears_of(block).items():
            path = f"blocks.{index}.{name}"
            rows, columns = linear.weight.shape
            dim = tp_dims.pop(f"{path}.weight", None)
            first = [0, 0]
            if dim is not None:
                first[dim] = tp[0] * (rows, columns)[dim]
            full_rows, full_columns = shapes[f"{path}.weight"]
            linear.register_parameter("weight", None)
            linear.stored = Stored(
                str(base), rows, columns, (full_rows, full_columns), (first[0], first[1])
            )
            for part, _ in linear.stored.named_parameters():
                if dim is not None and part != "groups":
                    tp_dims[f"{path}.stored.{part}"] = dim
