"""Techniques as pure rewrites of the operator graph, applied in one fixed order."""

from __future__ import annotations

import numpy as np

from ..graph import Graph, Sizes
from ..options import Options
from . import attention, expert_placement, lora, offload, precision, recompute, runtime, storage


def apply(graph: Graph, options: Options) -> Graph:
    """The graph of a piece under its options.

    Trainable set, attention kernel, runtime, compute dtype, storage dtype, recompute; offload comes
    last and acts on the ledger of the result (`costmodel/kept.py`).
    """
    offload.check(options)
    graph = lora.rewrite(graph, options.lora_rank, options.base_dtype, options.lora_targets)
    graph = attention.rewrite(graph, options.attention)
    graph = runtime.rewrite(graph, options.runtime)
    graph = precision.rewrite(graph, options)
    graph = storage.rewrite(graph, options.activations, options.recompute)
    graph = recompute.rewrite(graph, options.recompute, options.keep)
    return offload.rewrite(graph, options)


def local_axes(sizes: Sizes, options: Options) -> Sizes:
    """Local axis sizes with those of the axes that techniques add."""
    sizes = expert_placement.local_axes(offload.local_axes(sizes, options), options)
    if options.lora_rank is None:
        return sizes
    rank = np.full(len(sizes["tp"]), float(options.lora_rank))
    return {**sizes, lora.RANK: rank}
