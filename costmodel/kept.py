"""What a software stack keeps otherwise than the ledger of our executors, which `liveness` counts.

    norms       composed in fp32 they keep copies of their input, fused ones the input alone; a
                layer has two
    sequence    under sequence parallelism the input of a layer's two groups of column-parallel
                matmuls is gathered; a stack may keep its own part alone and gather it again
    logits      upcast, kept and differentiated at once, or in chunks
    offload     a fraction of what layers keep lies on the host until their backward comes near

All in bytes of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..choices import TENSORS
from ..cluster import DTYPE_BYTES
from ..stack import Stack
from .graph import Array
from .layout import Layouts
from .liveness import Liveness
from .pieces import Piece, Pieces, taken

NORMS = 2
"""Of one layer; as many as it has entries into column-parallel matmuls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """What of a layer that offloads is on the device for a while; zero of others."""

    moved: Array
    """On its way off the device after its forward."""
    lands: Array
    """Of the buffer that it comes back into, for its own backward and during that of the layer
    behind it."""
    more: Array
    """How much larger the peak of its backward is, since that buffer goes as a whole."""
    copied: Array
    """Where its backward is split: copies of what waits in that buffer, and `more`."""

    @staticmethod
    def of(piece: Piece) -> Passing:
        """Of one layer."""
        lands, live = piece.lands_bytes, piece.live
        more = live.landed * lands / np.maximum(live.saved, 1.0)
        return Passing(
            moved=piece.moved_bytes,
            lands=lands,
            more=more,
            copied=np.where(lands > 0, piece.waiting_bytes + more, 0.0),
        )

    def take(self, rows: NDArray[np.intp]) -> Passing:
        """Of these rows."""
        return Passing(
            moved=taken(self.moved, rows),
            lands=taken(self.lands, rows),
            more=taken(self.more, rows),
            copied=taken(self.copied, rows),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The live bytes of every piece as the stack has them; the layers in the model's order."""

    embedding: Liveness
    layers: tuple[Liveness, ...]
    passing: tuple[Passing, ...]
    """Of the layers."""
    stores: tuple[bool, ...]
    """Whether layers store what they keep in another form than they are given it."""
    head: Liveness
    loss_peak: Array | None
    """Everything of logits and loss at its peak; None = as the head's `Liveness` says."""
    waiting: tuple[Array, ...]
    """Between the halves of a split backward: of embedding, layers and head."""
    boundary_bytes: Array
    """What a chunk hands to the next one."""
    sequence_buffers: Array
    """Allocated for the collectives of sequence parallelism throughout the step."""

    @staticmethod
    def of(costs: Pieces, layouts: Layouts, stack: Stack) -> Kept:
        """The adjusted ledger."""
        peak = None
        if stack.logit_bytes is not None:
            # the ledger's share of the loss is the log-softmax, 4 bytes per logit
            peak = costs.head.live.loss / DTYPE_BYTES["fp32"] * stack.logit_bytes
        return Kept(
            embedding=costs.embedding.live,
            layers=tuple(_layer(piece, layouts, stack) for piece in costs.layers),
            passing=tuple(map(Passing.of, costs.layers)),
            stores=tuple(piece.options.activations is not None for piece in costs.layers),
            head=costs.head.live,
            loss_peak=peak,
            waiting=tuple(
                piece.waiting_bytes for piece in (costs.embedding, *costs.layers, costs.head)
            ),
            boundary_bytes=costs.layers[0].boundary_bytes,
            sequence_buffers=stack.sequence_buffers * _whole_sequence(costs.layers[0], layouts),
        )

    def take(self, rows: NDArray[np.intp]) -> Kept:
        """The live bytes under the layouts at these positions."""
        return Kept(
            embedding=taken(self.embedding, rows),
            layers=tuple(taken(live, rows) for live in self.layers),
            passing=tuple(one.take(rows) for one in self.passing),
            stores=self.stores,
            head=taken(self.head, rows),
            loss_peak=taken(self.loss_peak, rows),
            waiting=taken(self.waiting, rows),
            boundary_bytes=taken(self.boundary_bytes, rows),
            sequence_buffers=taken(self.sequence_buffers, rows),
        )


def _whole_sequence(piece: Piece, layouts: Layouts) -> Array:
    """A layer's input with the sequence gathered over tp; zero where it is not split."""
    split = (layouts.sequence_parallel > 0) & (layouts.tp > 1)
    return np.where(split, layouts.tp * piece.boundary_bytes, 0.0)


def _layer(piece: Piece, layouts: Layouts, stack: Stack) -> Liveness:
    """One layer; what full recompute drops is there during its own backward alone."""
    options = piece.options
    width = DTYPE_BYTES[options.tensor_dtype]
    norms = np.zeros(1)
    if stack.norm_input_bytes is not None and options.activations is None:
        norms = NORMS * (stack.norm_input_bytes - width) / width * piece.boundary_bytes
    whole = np.zeros(1)
    if stack.regathers_sequence:
        gathered = _whole_sequence(piece, layouts)
        whole = np.maximum(gathered - piece.boundary_bytes, 0.0)
    live = piece.live
    saved = live.saved
    if options.recompute in ("none", "selective"):
        saved = (saved + norms - NORMS * whole) * stack.activation_multiplier
    elif options.recompute == TENSORS:
        more = (saved - piece.boundary_bytes) * stack.activation_multiplier
        saved = piece.boundary_bytes + more
    grown = norms - whole  # one of the gathered inputs is back while its matmuls run
    return replace(
        live,
        saved=saved * piece.stays,
        forward_peak=live.forward_peak + grown,
        backward_peak=np.maximum(live.backward_peak + grown, saved),
        backward_peak_fresh=np.maximum(live.backward_peak_fresh + grown, saved),
    )
