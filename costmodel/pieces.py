"""Seconds and bytes of the pieces of a model - a layer, the embedding, the head - for one
micro-batch: the values, their rows and the choice between two.

Times are kept apart by what they are (matmuls and other operators, exposed tensor-parallel
communication, host), because the report prints them apart.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from .graph import Array
from .liveness import Liveness
from .options import Options
from .trained import TrainedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Costs of one micro-batch through one piece."""

    options: Options
    """What it is priced under."""
    forward_s: Array
    backward_s: Array
    """Without recomputation and communication."""
    weight_s: Array
    """Part of `backward_s` that no other stage waits for: the gradients of weights."""
    waiting_bytes: Array
    """What that part needs where it is put off: inputs and output gradients of matmuls."""
    recompute_s: Array
    streaming_s: Array
    """Part of `forward_s` and `backward_s` that is bound by memory."""
    comm_forward_s: dict[str, Array]
    """Exposed communication by mesh axis (tp, cp, ep)."""
    comm_backward_s: dict[str, Array]
    host_forward_s: Array
    """What the host adds. Of a head it is negative by what its device work hides of the layers'."""
    host_backward_s: Array
    spare_forward_s: Array
    """What the device works on after the host has launched all of it."""
    spare_backward_s: Array
    params: Array
    """Local parameters (elements), after tensor parallelism, before data-parallel sharding; those
    of routed experts not included."""
    expert_params: Array
    """Local parameters of routed experts, after expert and tensor parallelism. They are replicated
    over dp * cp / ep ranks."""
    trainable_params: Array
    """Those of `params` that have gradients and optimiser states."""
    trainable_expert_params: Array
    """The same of `expert_params`."""
    spared_bytes: Array
    """What frozen weights among `params` take less than in the dtype of use."""
    spared_expert_bytes: Array
    """The same of `expert_params`."""
    gathered_codes: Array
    """Those of `params` whose codes of one byte are gathered in place of them."""
    coded_tensors: int
    """The tensors that they are."""
    tensors: int
    """Parameter tensors."""
    trained: tuple[TrainedTensor, ...]
    """Those with optimiser states."""
    live: Liveness
    moved_bytes: Array
    """Off the device, and later back, per micro-batch."""
    stays: Array
    """Share of what is saved that stays on the device."""
    lands_bytes: Array
    """Of the buffer that what was moved comes back into."""
    boundary_bytes: Array
    wire_bytes: dict[str, Array]
    """Per micro-batch, `collective@axis`: bytes of the logical buffers."""
    again_wire_bytes: dict[str, Array]
    """The part of it that tokens made again exchange."""
    uncut_gradient_bytes: Array
    """Per step: gradients of weights that tp does not cut, which its ranks sum: all of them under
    sp, else those of routers and adapters."""

    def take(self, rows: NDArray[np.intp]) -> Piece:
        """The costs under the layouts at these positions."""
        return Piece(**{f.name: taken(getattr(self, f.name), rows) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """All pieces of a model under many layouts."""

    embedding: Piece
    layers: tuple[Piece, ...]
    """One per entry of `model.layers`."""
    head: Piece
    tied_params: Array
    """Local parameters of the table where embedding and head share one, else zero."""

    @property
    def tied_trained(self) -> Array:
        """Those that have a gradient."""
        return np.minimum(self.tied_params, self.embedding.trainable_params)

    def take(self, rows: NDArray[np.intp]) -> Pieces:
        """The pieces under the layouts at these positions; like layers stay one object."""
        known: dict[int, Piece] = {}
        for piece in self.layers:
            if id(piece) not in known:
                known[id(piece)] = piece.take(rows)
        return Pieces(
            embedding=self.embedding.take(rows),
            layers=tuple(known[id(piece)] for piece in self.layers),
            head=self.head.take(rows),
            tied_params=taken(self.tied_params, rows),
        )


T = TypeVar("T")


def taken(value: T, rows: NDArray[np.intp]) -> T:
    """`value` with every array in it at these positions; arrays of length one hold for all."""
    if isinstance(value, np.ndarray):
        return cast("T", value if len(value) == 1 else value[rows])
    if isinstance(value, dict):
        return cast("T", {name: taken(part, rows) for name, part in value.items()})
    if isinstance(value, tuple):
        return cast("T", tuple(taken(part, rows) for part in value))
    if isinstance(value, (Liveness, TrainedTensor)):
        own = {f.name: taken(getattr(value, f.name), rows) for f in fields(value)}
        return cast("T", type(value)(**own))
    return value


def chosen(mask: NDArray[np.bool_], yes: Piece, no: Piece) -> Piece:
    """The costs of one piece where the mask says so, of another elsewhere."""

    def pick(a: Array, b: Array) -> Array:
        return np.where(mask, a, b)

    def live(a: Liveness, b: Liveness) -> Liveness:
        return Liveness(
            saved=pick(a.saved, b.saved),
            forward_peak=pick(a.forward_peak, b.forward_peak),
            backward_peak=pick(a.backward_peak, b.backward_peak),
            backward_peak_fresh=pick(a.backward_peak_fresh, b.backward_peak_fresh),
            loss=pick(a.loss, b.loss),
            landed=pick(a.landed, b.landed),
        )

    def pick_each(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
        zero = np.zeros(1)
        return {n: pick(a.get(n, zero), b.get(n, zero)) for n in sorted({*a, *b})}

    def pick_tensors() -> tuple[TrainedTensor, ...]:
        cut, whole = ({t.name: t for t in piece.trained} for piece in (yes, no))
        none = np.zeros(1)
        return tuple(
            replace(
                tensor,
                rows=pick(cut[name].rows if name in cut else none,
                          whole[name].rows if name in whole else none),
                columns=pick(cut.get(name, tensor).columns, whole.get(name, tensor).columns),
            )
            for name, tensor in {**whole, **cut}.items()
        )  # fmt: skip

    return Piece(
        options=yes.options,
        forward_s=pick(yes.forward_s, no.forward_s),
        backward_s=pick(yes.backward_s, no.backward_s),
        weight_s=pick(yes.weight_s, no.weight_s),
        waiting_bytes=pick(yes.waiting_bytes, no.waiting_bytes),
        recompute_s=pick(yes.recompute_s, no.recompute_s),
        streaming_s=pick(yes.streaming_s, no.streaming_s),
        comm_forward_s=pick_each(yes.comm_forward_s, no.comm_forward_s),
        comm_backward_s=pick_each(yes.comm_backward_s, no.comm_backward_s),
        host_forward_s=pick(yes.host_forward_s, no.host_forward_s),
        host_backward_s=pick(yes.host_backward_s, no.host_backward_s),
        spare_forward_s=pick(yes.spare_forward_s, no.spare_forward_s),
        spare_backward_s=pick(yes.spare_backward_s, no.spare_backward_s),
        params=pick(yes.params, no.params),
        expert_params=pick(yes.expert_params, no.expert_params),
        trainable_params=pick(yes.trainable_params, no.trainable_params),
        trainable_expert_params=pick(yes.trainable_expert_params, no.trainable_expert_params),
        spared_bytes=pick(yes.spared_bytes, no.spared_bytes),
        spared_expert_bytes=pick(yes.spared_expert_bytes, no.spared_expert_bytes),
        gathered_codes=pick(yes.gathered_codes, no.gathered_codes),
        coded_tensors=yes.coded_tensors,
        tensors=yes.tensors,
        trained=pick_tensors(),
        live=live(yes.live, no.live),
        moved_bytes=pick(yes.moved_bytes, no.moved_bytes),
        stays=pick(yes.stays, no.stays),
        lands_bytes=pick(yes.lands_bytes, no.lands_bytes),
        boundary_bytes=pick(yes.boundary_bytes, no.boundary_bytes),
        wire_bytes=pick_each(yes.wire_bytes, no.wire_bytes),
        again_wire_bytes=pick_each(yes.again_wire_bytes, no.again_wire_bytes),
        uncut_gradient_bytes=pick(yes.uncut_gradient_bytes, no.uncut_gradient_bytes),
    )
