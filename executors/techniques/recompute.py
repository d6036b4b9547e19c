"""Recompute: activations are dropped in forward and computed again in backward.

`full` drops everything inside a block but its input; `selective` drops only what the attention core
saves; `full_keep_attn` is full, but keeps the core's output and statistics, so that the attention
and the messages of its ring do not run again (Li et al. 2023, LightSeq, section 3.3). Torch ends a
recomputation as soon as the last saved tensor is back, so that what follows it in a block (the
matmul of the last projection, its reduction and the residual) does not run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...errors import InputError
from ...plan import Phase
from ..context_parallel import Context, Slot, attend
from ..decoder import Block, Decoder
from ..marks import Marks


def recomputed(
    function: Callable[..., Any], marks: Marks, kept: KeptAttention | None = None
) -> Callable[..., Any]:
    """`function` with its activations recomputed in backward, but those that are kept.

    The decoder has no random operators, so that no generator state is kept.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        if kept is None:
            return nullcontext(), marks.mark("recompute")
        slot = Slot()
        return kept.using(slot), kept.using(slot, marks.mark("recompute"))

    return partial(
        checkpoint, function, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )


class KeptAttention:
    """An attention core whose output stays between forward and recomputation of its block."""

    def __init__(self) -> None:
        self.slot: Slot | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context | None = None) -> Tensor:
        method = None if context is None else context.method
        return attend(q, k, v, method, self.slot)

    @contextmanager
    def using(
        self, slot: Slot, beside: AbstractContextManager[None] | None = None
    ) -> Iterator[None]:
        """A context in which the core works with the slot of one forward."""
        self.slot = slot
        try:
            with beside or nullcontext():
                yield
        finally:
            self.slot = None


def apply(piece: Decoder, phase: Phase, marks: Marks) -> None:
    """Set the recompute mode of each block; before FSDP, whose hooks stay outside."""
    for index, block in piece.blocks.items():
        assert isinstance(block, Block)
        mode = phase.technique("recompute", int(index)).get("mode", "none")
        if mode == "full":
            block.forward = recomputed(block.forward, marks)
        elif mode == "full_keep_attn":
            kept = KeptAttention()
            block.attention.core = kept
            block.forward = recomputed(block.forward, marks, kept)
        elif mode == "selective":
            block.attention.core = recomputed(block.attention.core, marks)
        elif mode != "none":
            raise InputError("recompute", mode, "not executed yet",
                             "use none, selective, full or full_keep_attn")  # fmt: skip
