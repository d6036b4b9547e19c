"""The way of rows from the rank of their tokens to that of their experts, and back.

    ep      rows go to the rank of their slot
    tp      where each tp rank routes its own part of the sequence and experts are cut along their
            width, the rows of all parts are gathered
    runs    what arrives is sorted by (tp part, source rank, slot); matmuls want it by slot

Without a capacity the sizes depend on the data: counts are exchanged first. With one, every source
sends C rows per slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..torch_compat import backward_node
from .exchange import (
    Exchange,
    Gather,
    Regroup,
    Scatter,
    exchange_counts,
    gather_counts,
    transposed,
)
from .grouped import Groups
from .rows import Places

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Ways:
    """The groups that a layer's rows pass; None where there is nobody to exchange with."""

    ep: dist.ProcessGroup | None = None
    tp: dist.ProcessGroup | None = None
    rank: int = 0
    """This rank's place in ep."""


@dataclass(slots=True)
class Trip:
    """The steps there and back, and the sizes in which the experts find the rows."""

    there: list[Step]
    back: list[Step]
    groups: Groups | None
    """None where all experts have equally many."""


def take_trip(ways: Ways, places: Places, num_slots: int, received_rows: list[int]) -> Trip:
    """The trip of one forward pass; `num_slots` on each rank.

    Where counts are exchanged, the rows that this rank gets are noted in `received_rows`, but for
    a recomputation's.
    """
    if places.padded:
        return _equal_trip(ways, places, num_slots)
    if ways.ep is None and ways.tp is None:
        return Trip([], [], Groups(places.counts))
    return _unequal_trip(ways, places.counts, num_slots, received_rows)


def _unequal_trip(ways: Ways, counts: Tensor, num_slots: int, received_rows: list[int]) -> Trip:
    """Dropless: what every rank sends to every slot is told first."""
    own = counts.view(1, -1)  # (source ranks, slots)
    if ways.ep is not None:
        own = exchange_counts(counts, ways.ep)
    parts = own[None] if ways.tp is None else gather_counts(own, ways.tp)  # (tp parts, ranks, ...)
    # one copy to the host: what goes out to each rank, and all that comes in
    sent = counts.view(-1, num_slots).sum(dim=1)
    told = torch.cat([sent, parts.flatten()]).tolist()
    send, found = told[: len(sent)], torch.tensor(told[len(sent) :]).view(parts.shape)
    place = 0 if ways.tp is None else ways.tp.rank()
    receive = found[place].sum(dim=1).tolist()
    per_part = found.sum(dim=(1, 2)).tolist()
    runs = found.flatten(0, 1).tolist()
    if backward_node() is None and ways.ep is not None:
        received_rows.append(sum(receive))
    there: list[Step] = []
    back: list[Step] = []
    if ways.ep is not None:
        there.append(lambda rows: _apply(Exchange, rows, send, receive, ways.ep))
        back.append(lambda rows: _apply(Exchange, rows, receive, send, ways.ep))
    if ways.tp is not None:
        equal = ways.ep is None
        there.append(lambda rows: _apply(Gather, rows, per_part, equal, ways.tp))
        back.append(lambda rows: _apply(Scatter, rows, per_part, equal, ways.tp))
    if len(runs) > 1 and num_slots > 1:
        there.append(lambda rows: _apply(Regroup, rows, runs))
        back.append(lambda rows: _apply(Regroup, rows, transposed(runs)))
    groups = Groups(parts.sum(dim=(0, 1)), found.sum(dim=(0, 1)).tolist())
    return Trip(there, back[::-1], groups)


def _equal_trip(ways: Ways, places: Places, num_slots: int) -> Trip:
    """Capacity: every source sends equally many rows to each slot."""
    num_rows = len(places.token_R)
    ranks = 1 if ways.ep is None else ways.ep.size()
    parts = 1 if ways.tp is None else ways.tp.size()
    there: list[Step] = []
    back: list[Step] = []
    if ways.ep is not None:
        share = [num_rows // ranks] * ranks
        there.append(lambda rows: _apply(Exchange, rows, share, share, ways.ep))
        back.append(lambda rows: _apply(Exchange, rows, share, share, ways.ep))
    if ways.tp is not None:
        each = [num_rows] * parts
        there.append(lambda rows: _apply(Gather, rows, each, True, ways.tp))
        back.append(lambda rows: _apply(Scatter, rows, each, True, ways.tp))
    there.append(partial(_by_slot, num_sources=parts * ranks, num_slots=num_slots))
    back.append(partial(_by_source, num_sources=parts * ranks))
    return Trip(there, back[::-1], None)


def _by_slot(rows: Tensor, num_sources: int, num_slots: int) -> Tensor:
    """Rows (sources * slots * C, E) as (slots, sources * C, E)."""
    table = rows.view(num_sources, num_slots, -1, rows.shape[-1])
    return table.transpose(0, 1).reshape(num_slots, -1, rows.shape[-1])


def _by_source(rows: Tensor, num_sources: int) -> Tensor:
    """The same back."""
    table = rows.view(len(rows), num_sources, -1, rows.shape[-1])
    return table.transpose(0, 1).reshape(-1, rows.shape[-1])


def _apply(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    return function.apply(*arguments)  # pyright: ignore[reportReturnType]
