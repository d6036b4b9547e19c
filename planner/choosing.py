"""Good cuts of one layout, and what every layer keeps under each: what is simulated of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..cluster import Cluster
from ..costmodel.bounds import Stages
from ..costmodel.fleet import Fleet
from ..costmodel.layout import Layouts
from ..costmodel.options import Options
from ..costmodel.priced_pieces import Known
from ..costmodel.uncut import is_free
from ..model import Model
from ..workload import Workload
from .cutting import best_cuts
from .mixing import choose_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One cut of a layout."""

    sizes: tuple[int, ...] | None
    """Layers of every stage; None = as even as can be."""
    layers: tuple[Options, ...]
    """What every layer does; one for all, or one each."""


def choices(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    layout: Layouts,
    policies: Sequence[Options],
    capacity_bytes: Sequence[float],
    stages: Stages,
    known: Known | None = None,
) -> Iterator[Choice]:
    """Cuts of a layout, the most promising first: the best one where stages are free and it gains
    enough, then the one as even as can be; or the one given.

    `layout` is one row; its pipeline goes through the pools in their order, of whose devices a plan
    may fill `capacity_bytes`. What is in `known` is not priced again.
    """
    busy_ranks = int((layout.dp * layout.cp * layout.tp)[0])
    fleet = Fleet.of(model, cluster, workload, layout, policies, capacity_bytes, busy_ranks, known)
    cuts: list[tuple[int, ...] | None] = [None]
    if not isinstance(stages, str):
        cuts = [tuple(stages)]
    elif stages == "free" and is_free(fleet)[0]:
        cuts = best_cuts(fleet, least_memory=workload.objective == "memory")
    for sizes in cuts:
        yield Choice(sizes=sizes, layers=choose_layers(fleet, workload.objective, sizes))
