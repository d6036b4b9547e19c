"""Seconds of the attention core of one rank: one causal kernel, or block by block over a ring.

Where a profile holds the curve of a whole rectangle (`attention_full`), a ring's core is priced by
the kernels that run, n tokens per rank and R ranks:

    own tokens   one causal kernel of n
    zigzag       R - 1 rectangles of n queries and n / 2 keys
    ring         R - 1 of n queries and n keys, on the last rank
    lightseq     R / 2 of n queries and n keys
    each block   forward: its output merged into the sum; backward: three gradients added to sums

Elsewhere by causal squares of n tokens, of which a rectangle of n by n makes two, at the rate of one
kernel times the stack's `ring_attention_fraction`, which stands for the merging as well.

Where documents are packed, n tokens are priced as n / a causal squares of a tokens, with a the mean
length of the document that a token is in (`packing.py`): n a pairs, as there are. The busiest rank
has so many times the mean.
"""

from __future__ import annotations

import numpy as np

from .graph import Array, Operator, Sizes, volume
from .layers.rings import BLOCKS, KEYS, QUERIES
from .prices import Prices

BLOCK = "attention_full"


def core_s(op: Operator, sizes: Sizes, dtype: str, kind: str, prices: Prices) -> tuple[Array, Array]:
    """Forward and backward of the core under a kind of context parallelism."""
    ring = sizes["ring"]
    shape = [volume(axes, sizes) for axes in op.price_axes]
    if "attended" in sizes and op.kind == "attention":
        return _of_documents(op, sizes, dtype, prices)
    whole = prices.operator(op.kind, shape, dtype)
    if np.all(ring <= 1):
        return whole
    if op.kind != "attention" or not prices.measures(BLOCK):
        rate = np.where(ring > 1, prices.pool.stack.ring_attention_fraction, 1.0)
        return whole[0] / rate, whole[1] / rate
    rows, tokens, dim = volume(("batch", "heads_core"), sizes), sizes["seq_core"], sizes["core_dim"]
    own = prices.operator(op.kind, [rows, tokens, dim], dtype)
    count, share = BLOCKS[kind]
    blocks, keys = sizes[count], tokens * share
    block = prices.operator(BLOCK, [rows, tokens, dim, keys], dtype)
    queries, others = volume(QUERIES, sizes), volume(KEYS, sizes) * share
    merge = prices.operator("add", [queries], "fp32")[0]
    sums = [prices.operator("accumulate", [size], "fp32")[0] for size in (queries, others)]
    forward = own[0] + blocks * (block[0] + merge)
    backward = own[1] + blocks * (block[1] + sums[0] + sums[1])
    several = ring > 1
    return np.where(several, forward, whole[0]), np.where(several, backward, whole[1])


def _of_documents(
    op: Operator, sizes: Sizes, dtype: str, prices: Prices
) -> tuple[Array, Array]:
    """The core over packed documents, on the busiest rank."""
    attended = np.minimum(sizes["attended"], sizes["seq_core"] * sizes["ring"])
    squares = sizes["seq_core"] / attended * sizes["slowest"]
    rows = volume(("batch", "heads_core"), sizes) * squares
    forward, backward = prices.operator(op.kind, [rows, attended, sizes["core_dim"]], dtype)
    rate = np.ones(1)
    if not prices.measures(BLOCK):
        rate = np.where(sizes["ring"] > 1, prices.pool.stack.ring_attention_fraction, 1.0)
    return forward / rate, backward / rate
