"""Recompute: activations are dropped in forward and computed again in backward.

`full` drops everything inside a block but its input; `selective` drops only what the attention core
saves. Torch ends a recomputation as soon as the last saved tensor is back, so that what follows it
in a block (the matmul of the last projection, its reduction and the residual) does not run twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from ...errors import InputError
from ...plan import Phase
from ..decoder import Block, Decoder
from ..marks import Marks


def recomputed(function: Callable[..., Any], marks: Marks) -> Callable[..., Any]:
    """`function` with its activations recomputed in backward.

    The decoder has no random operators, so that no generator state is kept.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), marks.mark("recompute")

    return partial(
        checkpoint, function, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )


def apply(piece: Decoder, phase: Phase, marks: Marks) -> None:
    """Set the recompute mode of each block; before FSDP, whose hooks stay outside."""
    for index, block in piece.blocks.items():
        assert isinstance(block, Block)
        mode = phase.technique("recompute", int(index)).get("mode", "none")
        if mode == "full":
            block.forward = recomputed(block.forward, marks)
        elif mode == "selective":
            block.attention.core = recomputed(block.attention.core, marks)
        elif mode != "none":
            raise InputError("recompute", mode, "not executed yet",
                             "use none, selective or full")  # fmt: skip
