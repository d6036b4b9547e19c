"""Runtime: how the host launches a block's operators: one by one, or compiled as a whole.

`compiled` hands each block's forward to torch.compile, which fuses the operators between matmuls
and attention and launches what is left from generated code. Blocks are compiled one by one, as
hooks of FSDP2 and of recomputation stay outside; equal blocks share their code.
"""

from __future__ import annotations

import torch

from ...plan import Phase
from ..decoder import Decoder


def mode(phase: Phase, layer: int) -> str:
    """The runtime of a layer."""
    return str(phase.technique("runtime", layer).get("mode", "eager"))


def apply(piece: Decoder, phase: Phase) -> None:
    """Compile the blocks that the plan says; before recomputation and FSDP, which stay outside."""
    for index, block in piece.blocks.items():
        if mode(phase, int(index)) == "compiled":
            block.forward = torch.compile(block.forward, dynamic=False)
