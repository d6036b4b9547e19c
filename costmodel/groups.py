"""Layers that are priced alike: of one kind in the model and under the same techniques."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..model import Layer, Model
from ..plan import Phase, Stage
from ..workload import Workload
from .options import Options
from .stages import Load, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped:
    """A model whose `layers` are its groups under a phase: as often as they occur, wherever."""

    model: Model
    options: tuple[Options, ...]
    """What applies to each group."""
    group_of: NDArray[np.intp]
    """The group of each layer."""

    @staticmethod
    def of(model: Model, phase: Phase, workload: Workload | None = None) -> Grouped:
        """The groups of a phase, in the order in which they first occur."""
        starts = {s.layers[0] for s in phase.settings}
        seen: list[tuple[dict[str, Mapping[str, Any]], Options]] = []

        def options_at(layer: int) -> Options:
            used = phase.techniques_at(layer)
            for known, options in seen:
                if known == used:
                    return options
            seen.append((used, Options.under(used, workload)))
            return seen[-1][1]

        kinds: list[tuple[int, Options]] = []
        group_of: list[int] = []
        index = 0
        for which, layer in enumerate(model.layers):
            kind = -1
            for _ in range(layer.repeat):
                if kind < 0 or index in starts:
                    own = (which, options_at(index))
                    if own not in kinds:
                        kinds.append(own)
                    kind = kinds.index(own)
                group_of.append(kind)
                index += 1
        layers: list[Layer] = [
            msgspec.structs.replace(model.layers[which], repeat=group_of.count(group))
            for group, (which, _) in enumerate(kinds)
        ]
        grouped = model if len(layers) == len(model.layers) else _with_layers(model, layers)
        return Grouped(
            model=grouped,
            options=tuple(options for _, options in kinds),
            group_of=np.array(group_of, dtype=np.intp),
        )

    def loads(self, stages: Sequence[Stage]) -> list[Load]:
        """The loads of pipeline stages."""
        return [self.load([stage]) for stage in stages]

    def load(self, stages: Sequence[Stage]) -> Load:
        """The load of all stages of a rank together."""
        count, last_layer = len(self.options), len(self.group_of) - 1
        spans = [stage.layers for stage in stages]
        groups = [int(g) for first, last in spans for g in self.group_of[first : last + 1]]
        held = np.bincount(groups, minlength=count).astype(float)
        return Load(
            layers=tuple(held[i : i + 1] for i in range(count)),
            embedding=np.array([float(any(first == 0 for first, _ in spans))]),
            head=np.array([float(any(last == last_layer for _, last in spans))]),
            order=Order.of(groups, count),
        )


def _with_layers(model: Model, layers: Sequence[Layer]) -> Model:
    return msgspec.structs.replace(model, layers=tuple(layers))
