"""What ranks of a ring send one another around the attention core, and hold meanwhile.

Messages of a layer and micro-batch, forward and backward, R ranks with n tokens each. K, V is a
message of keys and values of one rank, Q one of queries' form (queries, outputs, their gradients).

    kind       forward            backward                        sent by a rank, in the mean
    zigzag     K, V               K, V and their gradients        R - 1 of each
    ring       K, V               K, V and their gradients        (R - 1) / 2 of each
    lightseq   K, V               K, V and their gradients        X / R of each
               Q, Q with lse      3 Q with lse, Q                 Y / R of each

    X = P (P/2 - 1) - (P/2) (P/2 - 1) / 2 + P/2,      Y = (P/2) (P/2 - 1) / 2,      P = R

X and Y are the messages of all ranks in the balanced schedule of LightSeq, in which early ranks
work on queries of late ones (Li et al. 2023, section 3.1). Messages that follow one another on the
busiest rank: R - 1 of a ring; of lightseq those of the last rank, which gets R/2 of keys and
R/2 - 1 of outputs, and in backward sends R/2 of gradients and R/2 - 1 of queries; what goes the
other way at the same time is hidden behind them.

Held beside the tensors of the core: the message in use and the one that arrives; in backward three
of gradients too (the sum being made, the one that arrives, the one that leaves; with two ranks the
last two come after the first); the result of the block being worked on; fp32 sums in 16-bit runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..graph import Array, Axes, Collective, Sizes, Tensor

TOKENS: Axes = ("batch", "seq_core")
KEYS: Axes = (*TOKENS, "kv_heads_core", "kv_dims")
"""One rank's keys and values."""
QUERIES: Axes = (*TOKENS, "heads_core", "core_dim")
"""A tensor of the form of its queries or outputs."""
STATISTICS: Axes = (*TOKENS, "heads_core")
SQUARES = {"zigzag": "zigzag_squares", "ulysses": "zigzag_squares", "ring": "ring_squares",
           "lightseq": "lightseq_squares"}  # fmt: skip
"""Causal squares that the busiest rank works through."""

BLOCKS = {"zigzag": ("ring_passes", 0.5), "ulysses": ("ring_passes", 0.5),
          "ring": ("ring_passes", 1.0), "lightseq": ("half_passes", 1.0)}  # fmt: skip
"""Blocks of other ranks' keys that the busiest rank works on, and their keys per query."""


@dataclass(frozen=True, slots=True)
class Messages:
    """What the core of one kind sends, and what stands in memory beside it."""

    forward: tuple[Collective, ...]
    backward: tuple[Collective, ...]
    held_forward: tuple[Tensor, ...]
    held_backward: tuple[Tensor, ...]


def messages(kind: str, core: str) -> Messages:
    """The messages around the attention core named `core`."""

    def send(name: str, axes: Axes, passes: str, sent: str, dtype: str = "compute") -> Collective:
        buffer = Tensor(name=name, axes=axes, dtype=dtype)
        return Collective(
            kind="send", axis="ring", buffer=buffer, overlaps=core, passes=passes, sent=sent
        )

    # two bytes of an fp32 sum: the result in 16 bits, which takes its place, counts as the others
    sums = _held("sums", (*QUERIES, "if_ring_half"), dtype="upcast")
    key_sums = _held("kv.sums", (*KEYS, "if_ring_half"), dtype="upcast")
    block = _held("block", (*QUERIES, "if_ring"))
    if kind != "lightseq":
        sent = "ring_sent_causal" if kind == "ring" else "ring_sent"
        kv, grads = (send(name, KEYS, "ring_passes", sent) for name in ("kv", "kv.gradient"))
        passing = _held("kv.passing", (*KEYS, "ring_held"))
        passing_back = _held("kv.passing", (*KEYS, "ring_held_backward"))
        of_block = _held("kv.block", (*KEYS, "if_ring_half" if kind == "zigzag" else "if_ring"))
        return Messages(
            (kv,),
            (kv, grads),
            (passing, block, sums, sums),
            (passing_back, block, of_block, sums, key_sums),
        )
    keys, helped = ("half_passes", "lightseq_keys"), ("help_passes", "lightseq_queries")
    hidden = ("no_passes", "lightseq_queries")
    three: Axes = (*QUERIES, "three")
    return Messages(
        (
            send("kv", KEYS, *keys),
            send("q", QUERIES, *hidden),
            send("o", QUERIES, *helped),
            send("lse", STATISTICS, *helped, dtype="fp32"),
        ),
        (
            send("kv", KEYS, "no_passes", "lightseq_keys"),
            send("kv.gradient", KEYS, *keys),
            send("q, o, o.gradient", three, *helped),
            send("lse", STATISTICS, *helped, dtype="fp32"),
            send("q.gradient", QUERIES, *hidden),
        ),
        (_held("passing", (*TOKENS, "lightseq_held")), block, sums, sums),
        (
            _held("passing", (*TOKENS, "lightseq_held_backward")),
            block,
            _held("kv.block", (*KEYS, "if_ring")),
            sums,
            key_sums,
        ),
    )


def _held(name: str, axes: Axes, dtype: str = "compute") -> Tensor:
    return Tensor(name=name, axes=axes, dtype=dtype)


def ring_sizes(ring: Array, keys: Array, queries: Array) -> Sizes:
    """Numbers of messages, and of what is held, as sizes of axes.

    `keys` and `queries` are the elements per token of a message of keys and values, and of queries.
    """
    one, half = (ring > 1).astype(float), ring / 2
    steps = [ring <= 1, ring == 2, ring == 4, ring == 6]
    k, q = keys, queries
    most = np.maximum
    return {
        "if_ring": one,
        "if_ring_half": one / 2,
        "three": np.full_like(ring, 3.0),
        "no_passes": 0.0 * ring,
        "ring_passes": ring - 1,
        "half_passes": one * half,
        "help_passes": one * (half - 1),
        "ring_sent": ring - 1,
        "ring_sent_causal": (ring - 1) / 2,
        "lightseq_keys": one * (ring * (half - 1) - half * (half - 1) / 2 + half) / ring,
        "lightseq_queries": one * half * (half - 1) / 2 / ring,
        "lightseq_squares": np.where(ring > 1, ring + 1, 1),
        "ring_held": 2 * one,
        "ring_held_backward": np.select([ring <= 1, ring == 2, ring == 3], [0.0, 2.0, 4.0], 5.0),
        # the fullest of: a rank that helps, one that is helped, one that does neither
        "lightseq_held": np.select(
            steps,
            [0.0 * k, k, most(3 * k, k + q), most(3 * k + q, k + 2 * q)],
            most(3 * k + q, k + 3 * q),
        ),
        "lightseq_held_backward": np.select(
            steps,
            [0.0 * k, 2 * k, most(5 * k, 3 * k + 4 * q), most(6 * k + 4 * q, k + 7 * q)],
            most(6 * k + 4 * q, 2 * k + 8 * q),
        ),
    }
