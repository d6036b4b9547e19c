"""Seconds of the attention core of one rank: one causal kernel, or block by block over a ring.

Where a profile holds the curve of a whole rectangle (`attention_full`), a ring's core is priced by
the kernels that run, n tokens per rank and R ranks:

    own tokens   one causal kernel of n
    zigzag       R - 1 rectangles of n queries and n / 2 keys
    ring         R - 1 of n queries and n keys, on the last rank
    lightseq     R / 2 of n queries and n keys
    each block   forward: its output merged into the sum; backward: three gradients added to sums

Elsewhere by causal squares of n tokens, of which a rectangle of n by n makes two, and the passes
over memory that merge each block's results, after each of which ranks wait for one another
(`ring_step_s` of the stack).

Where documents are packed, n tokens are priced as n / a causal squares of a tokens, with a the mean
length of the document that a token is in (`packing.py`): n a pairs, as there are. The busiest rank
has so many times the mean. A stack may also say that all documents have one length (`documents` of
the attention's settings).
"""

from __future__ import annotations

import numpy as np

from .graph import Array, Graph, Operator, Sizes, volume
from .layers.attention import CORE
from .layers.rings import BLOCKS, KEYS, QUERIES
from .options import Options
from .prices import Prices

BLOCK = "attention_full"
MERGED_BYTES = 10.0
"""Of adding a partial result to its sum: fp32 sum read and written, 16-bit part read."""


def core_s(
    op: Operator, sizes: Sizes, dtype: str, options: Options, prices: Prices
) -> tuple[Array, Array]:
    """Forward and backward of the core under a kind of context parallelism."""
    ring = sizes.get("ring", np.ones(1))  # a traced module has none
    shape = [volume(axes, sizes) for axes in op.price_axes]
    if op.kind == "attention" and "attended" in sizes:
        attended = np.minimum(sizes["attended"], sizes["seq_core"] * ring)
        shape = _inside_documents(op, sizes, attended, sizes["slowest"])
        return prices.operator(op.kind, shape, dtype)
    if op.kind == "attention" and options.document_tokens is not None:
        length = np.minimum(float(options.document_tokens), sizes["seq_core"])
        return prices.operator(op.kind, _inside_documents(op, sizes, length, 1.0), dtype)
    whole = prices.operator(op.kind, shape, dtype)
    if np.all(ring <= 1) or op.kind != "attention" or not prices.measures(BLOCK):
        return whole
    rows, tokens, dim = volume(("batch", "heads_core"), sizes), sizes["seq_core"], sizes["core_dim"]
    own = prices.operator(op.kind, [rows, tokens, dim], dtype)
    count, share = BLOCKS[options.cp_kind]
    blocks, keys = sizes[count], tokens * share
    block = prices.operator(BLOCK, [rows, tokens, dim, keys], dtype)
    queries, others = volume(QUERIES, sizes), volume(KEYS, sizes) * share
    merge = prices.operator("add", [queries], "fp32")[0]
    sums = [prices.operator("accumulate", [size], "fp32")[0] for size in (queries, others)]
    forward = own[0] + blocks * (block[0] + merge)
    backward = own[1] + blocks * (block[1] + sums[0] + sums[1])
    several = ring > 1
    return np.where(several, forward, whole[0]), np.where(several, backward, whole[1])


def _inside_documents(
    op: Operator, sizes: Sizes, length: Array, slowest: Array | float
) -> list[Array]:
    """Sizes of causal attention inside documents, of a rank's tokens, however these are cut."""
    rows = volume(("batch", "heads_core"), sizes) * sizes["seq_core"] / length * slowest
    return [rows, length, volume(op.price_axes[2], sizes)]


def merges_s(graph: Graph, sizes: Sizes, kind: str, prices: Prices) -> tuple[Array, Array]:
    """What a ring of context-parallel ranks adds to the core, forward and backward, where blocks
    were not measured.

    Each block of keys and values after the first gives a partial output, which is rescaled and
    added, and in backward partial gradients of the queries and of that block.
    """
    core = next((op for op in graph.operators if op.name == CORE), None)
    if core is None or np.all(sizes["ring"] == 1) or prices.measures(BLOCK):
        return np.zeros(1), np.zeros(1)
    query, key, value = (volume(x.axes, sizes) for x in core.inputs)
    rounds = sizes[BLOCKS[kind][0]]
    byte_s = MERGED_BYTES * rounds / prices.memory_bytes_per_s
    byte_s = byte_s * prices.pool.stack.elementwise_multiplier
    waiting_s = prices.pool.stack.ring_step_s * rounds
    return (
        waiting_s + byte_s * volume(core.outputs[0].axes, sizes),
        waiting_s + byte_s * (query + key + value),
    )
