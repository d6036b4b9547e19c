"""Offload: what a layer saves waits on the host, or on disk, between forward and backward.

The layer's forward still makes, and its backward still needs, all of what it saves. Offload
therefore acts on the ledger of the layer, on what it keeps while other layers run
(`costmodel/kept.py`): every byte that is moved goes once in forward and comes back once in
backward. Two ways to treat the rest of a fraction alpha:

    keep        of the S bytes that the layer saves alpha S move, the others stay on the device
    recompute   token-wise (MEMO, Zhao et al. 2024, arXiv 2407.12117, section 4.1): the layer's
                input and what attention makes, A bytes, move whole; of the others the share a of
                all tokens moves, and the share 1 - a is made again from the first just before the
                backward: A + a (S - A) bytes move, nothing stays. a = floor(alpha s) / s for s
                tokens of the rank's part of the sequence.

Optimiser states may wait there too (`states` = optimizer), or those of routed experts alone
(`states` = experts); with FSDP on a GPU parameters and gradients as well (`states` = parameters).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...choices import OFFLOAD_RESTS, OFFLOAD_STATES, TIERS
from ...errors import InputError
from ..graph import Array, Collective, Graph, Sizes, Tensor
from ..liveness import Liveness
from ..options import Options
from .recompute import holding, internals

GRAIN_BYTES = 8
"""A part of a tensor is moved in multiples of it: whole elements of every dtype."""
LEFT = {"seq": "seq_left", "seq_part": "seq_part_left"}
"""The axes of tokens, and those of the tokens made again."""


def check(options: Options) -> None:
    """Raise InputError for settings that contradict themselves."""
    if not 0.0 <= options.offload <= 1.0:
        raise InputError("offload.activations", options.offload,
                         "not a fraction of the saved activations", "give 0 to 1")  # fmt: skip
    for field, value, known in (
        ("rest", options.offload_rest, OFFLOAD_RESTS),
        ("tier", options.offload_tier, TIERS),
        ("states", options.offload_states or OFFLOAD_STATES[0], OFFLOAD_STATES),
    ):
        if value not in known:
            raise InputError(f"offload.{field}", value, "unknown", f"use {' or '.join(known)}")
    if options.offload_states == "parameters" and options.offload_tier != "host":
        raise InputError("offload.tier", options.offload_tier, "FSDP keeps parameters on the host",
                         "use tier=host, or --offload optimizer")  # fmt: skip
    if options.offload_states is not None and options.optimizer != "adamw":
        raise InputError("offload.states", options.offload_states,
                         f"moves fp32 moments of adamw, not those of {options.optimizer}",
                         "use --optimizer adamw, or no offload of states")  # fmt: skip
    if options.offload_rest == "recompute" and options.recompute != "none":
        raise InputError("offload.rest", "recompute",
                         f"recompute={options.recompute} says already what is made again",
                         "use --recompute none, or rest=keep")  # fmt: skip


def by_tokens(options: Options) -> bool:
    """Whether layers move some tokens and make the others again."""
    return options.offload_rest == "recompute"


def moves(options: Options) -> bool:
    """Whether activations of layers are offloaded at all."""
    return options.offload > 0.0 or by_tokens(options)


def whole_tensors(graph: Graph) -> set[str]:
    """What moves with all of its tokens: the layer's input and all that attention makes."""
    inside = internals(graph)
    cores = [op for op in graph.operators if op.kind.startswith("attention")]
    made = {t.name for op in cores for t in (*op.outputs, *inside[op.name])}
    return {graph.boundary.name, *made}


def rewrite(graph: Graph, options: Options) -> Graph:
    """The layer with operators marked that run again on the tokens left behind."""
    if graph.name != "layer" or not by_tokens(options):
        return graph
    again = {op.name for op in holding(graph, whole_tensors(graph)).operators if op.recomputed}
    operators = (replace(op, recomputed=op.name in again) for op in graph.operators)
    return replace(graph, operators=tuple(operators))


def share(sizes: Sizes, options: Options) -> Array:
    """The share of tokens that moves."""
    return np.floor(options.offload * sizes["seq_part"]) / sizes["seq_part"]


def local_axes(sizes: Sizes, options: Options) -> Sizes:
    """Local sizes with those of the tokens made again."""
    if not by_tokens(options):
        return sizes
    left = 1.0 - share(sizes, options)
    return {**sizes, **{name: sizes[axis] * left for axis, name in LEFT.items()}}


def of_left_tokens(collective: Collective) -> Collective:
    """A collective as it runs for the tokens made again."""
    buffer: Tensor = collective.buffer
    axes = tuple(LEFT.get(axis, axis) for axis in buffer.axes)
    return replace(collective, buffer=replace(buffer, axes=axes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parted:
    """What becomes of the bytes that a layer saves."""

    moved: Array
    """Each way, per micro-batch."""
    stays: Array
    """On the device, as a share of what is saved."""
    lands: Array
    """Of the buffer that a layer comes back into, with room for the tokens made again."""


def part(graph: Graph, sizes: Sizes, live: Liveness, options: Options) -> Parted:
    """The ledger of one layer; other pieces keep all of theirs."""
    if graph.name != "layer" or not moves(options):
        return Parted(moved=np.zeros(1), stays=np.ones(1), lands=np.zeros(1))
    if by_tokens(options):
        names = whole_tensors(graph)
        saved = {t.name: t for op in graph.operators for t in op.saves if t.name in names}
        whole = sum((t.num_bytes(sizes) for t in saved.values()), np.zeros(1))
        return Parted(
            moved=whole + share(sizes, options) * (live.saved - whole),
            stays=0.0 * live.saved,
            lands=live.saved,
        )
    moved = np.floor(options.offload * live.saved / GRAIN_BYTES) * GRAIN_BYTES
    stays = (live.saved - moved) / np.maximum(live.saved, 1.0)
    return Parted(moved=moved, stays=stays, lands=moved)
