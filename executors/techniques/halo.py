"""HALO: linears on codes of rotated operands, and FSDP's gathers of such codes.

The counterpart in costs is `costmodel/techniques/halo.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...costmodel.halo_levels import LEVELS
from ...plan import Phase
from ..decoder import Decoder, Linear
from ..halo_gather import CodedGathers
from ..halo_linear import How, RotatedCast, product


def uses(settings: Mapping[str, Any]) -> bool:
    """Whether a layer's precision is a recipe of HALO."""
    return settings.get("recipe") in LEVELS


def apply(linears: Mapping[str, Linear], chosen: list[str], settings: Mapping[str, Any]) -> None:
    """Put the linears of a group, which read one tensor, on its codes."""
    how = How(name=str(settings["compute"]), level=LEVELS[str(settings["recipe"])])
    shared = RotatedCast(len(chosen), how)
    for name in chosen:
        linears[name].product = product(shared)


def extend_gathers(
    piece: Decoder, phase: Phase, group: dist.ProcessGroup, device: torch.device
) -> list[CodedGathers]:
    """Have FSDP gather codes where the layers' recipes say so; `group` are a weight's shards."""
    by_format: dict[str, list[nn.Linear]] = {}
    for index, block in piece.blocks.items():
        settings = phase.technique("precision", int(index))
        if not uses(settings) or not LEVELS[str(settings["recipe"])].gathers:
            continue
        named = settings.get("linears")
        found = [
            module
            for name, module in block.named_modules()
            if isinstance(module, Linear) and (named is None or name.split(".")[-1] in named)
        ]
        by_format.setdefault(str(settings["compute"]), []).extend(found)
    made: list[CodedGathers] = []
    for name, linears in by_format.items():
        made.append(CodedGathers(name, group, device))
        made[-1].add(piece, linears)
    return made
