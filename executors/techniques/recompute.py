"""Recompute: activations are dropped in forward and computed again in backward.

`full` is torch's checkpoint around a block: its input is kept, and torch ends the recomputation as
soon as the last saved tensor is back, so that what follows it (the matmul of the last projection,
its reduction and the residual) does not run twice. `full_keep_attn` is full, but keeps the core's
output and statistics, so that the attention and the messages of its ring do not run again (Li et
al. 2023, LightSeq, section 3.3). The other modes drop single tensors: a frame around the block
(`executors/frames.py`) holds and makes again exactly what the cost model's graph of the layer says.
`executors/keeping.py` sets all of them up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...costmodel.graph import Graph, Sizes
from ...costmodel.layers import decoder_layer
from ...costmodel.layout import Layouts, local_sizes
from ...costmodel.options import Options
from ...costmodel.techniques import apply as rewritten
from ...plan import Plan
from ..context_parallel import Context, Slot, attend
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


def mode_of(plan: Plan, index: int) -> str:
    """The recompute mode of a layer, which `Plan.check` knows."""
    return str(plan.phase.technique("recompute", index).get("mode", "none"))


def layer_graph(plan: Plan, index: int) -> tuple[Graph, Sizes]:
    """The cost model's graph of a decoder's layer under its techniques, and its local sizes."""
    model, phase = plan.model, plan.phase
    layer, options = model.layer_at(index), Options.of(phase, plan.workload, index)
    fused = plan.cluster.pool(phase.stages[0].pool).device.kind == "gpu"
    graph = decoder_layer(
        model, layer, sequence_parallel=phase.sequence_parallel, fused=fused, options=options
    )
    sizes = local_sizes(model, layer, Layouts.of(phase), phase.seq_tokens)
    return rewritten(graph, options), sizes
