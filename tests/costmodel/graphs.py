"""Layers as rewritten graphs with their local sizes, and sums over them."""

from __future__ import annotations

from typing import Any

import numpy as np

from forerun.catalogs import load_model
from forerun.costmodel.graph import Collective, Graph, Sizes, volume
from forerun.costmodel.layers import decoder_layer
from forerun.costmodel.layout import Layouts, local_sizes
from forerun.costmodel.operators import KINDS
from forerun.costmodel.options import Options
from forerun.costmodel.techniques import apply
from forerun.model import Model


def layouts_of(**degrees: int) -> Layouts:
    """One layout: the degrees given, all others 1; ep has as many replicas to lie over."""
    degrees = {"dp_shard": degrees.get("ep", 1), **degrees}
    fields = {
        "micro_batch_seqs": 1, "num_microbatches": 1, "dp_replicate": 1, "dp_shard": 1, "tp": 1,
        "pp": 1, "vpp": 1, "zero": 0, "sequence_parallel": 0, "schedule": 1, "cp": 1, "ulysses": 1,
        "ep": 1, **degrees,
    }  # fmt: skip
    return Layouts(**{name: np.array([value]) for name, value in fields.items()})


def layer_graph(
    model: str | Model, seq_tokens: int, *, group: int = 0, cp_kind: str = "zigzag", **degrees: int
) -> tuple[Graph, Sizes]:
    """A layer of a model's group in bf16 under one layout."""
    shape = load_model(model) if isinstance(model, str) else model
    layer, layouts = shape.layers[group], layouts_of(**degrees)
    options = Options(compute="bf16", cp_kind=cp_kind)
    sp = bool(degrees.get("sequence_parallel", 0))
    graph = decoder_layer(shape, layer, sequence_parallel=sp, fused=True, options=options)
    return apply(graph, options), local_sizes(shape, layer, layouts, seq_tokens)


def forward_flops(graph: Graph, sizes: Sizes, kinds: tuple[str, ...]) -> float:
    """FLOPs of the forward operators of some kinds."""
    total = 0.0
    for op in graph.operators:
        if op.kind in kinds:
            shape = [volume(axes, sizes) for axes in op.price_axes]
            total += float(KINDS[op.kind].forward_flops(shape)[0])
    return total


def moved(graph: Graph, axis: str, direction: str = "forward") -> list[Collective]:
    """The collectives of one direction over an axis."""
    found: list[Collective] = []
    for op in graph.operators:
        group: Any = getattr(op, f"{direction}_collectives")
        found += [c for c in group if c.axis == axis]
    return found


def num_bytes(collectives: list[Collective], sizes: Sizes) -> float:
    """Bytes of their logical buffers."""
    return sum(float(c.buffer.num_bytes(sizes)[0]) for c in collectives)
