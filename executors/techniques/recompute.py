"""Recompute: activations are dropped in forward and computed again in backward.

`full` is torch's checkpoint around a block: its input is kept, and torch ends the recomputation as
soon as the last saved tensor is back, so that what follows it (the matmul of the last projection,
its reduction and the residual) does not run twice. The other modes drop single tensors: a frame
around the block (`executors/frames.py`) holds and makes again exactly what the cost model's graph
of the layer says. `executors/keeping.py` sets both up.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from ...costmodel.graph import Graph, Sizes
from ...costmodel.layers import decoder_layer
from ...costmodel.layout import Layouts, local_sizes
from ...costmodel.options import Options
from ...costmodel.techniques import apply as rewritten
from ...plan import Plan
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
