"""The pieces of a traced module: its prefix, its layers, its suffix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..model import Model
from ..traced import TracedOperator, TracedWeight
from . import traced
from .layout import Layouts
from .options import Options
from .piece_costs import piece_of
from .pieces import Piece, Pieces, chosen
from .prices import Prices
from .techniques import apply


def traced_pieces(
    model: Model, layouts: Layouts, prices: Prices, options: Options, by_layer: Sequence[Options]
) -> Pieces:
    """The pieces of a traced module: prefix, layers, suffix; cut ones where tp divides it."""
    assert model.traced is not None

    def piece(
        name: str,
        operators: Sequence[TracedOperator],
        options: Options,
        more: Sequence[TracedWeight],
    ) -> Piece:
        sizes = {**traced.sizes(operators, layouts), **traced.weight_table(more, layouts)}
        there = apply(traced.graph(name, operators, more), options)
        back = apply(traced.backward_graph(operators), options)
        costs = piece_of(there, sizes, layouts, prices, options, False)
        again = piece_of(back, sizes, layouts, prices, options, False)
        return replace(
            costs,
            backward_s=costs.backward_s + again.forward_s,
            host_backward_s=costs.host_backward_s + again.host_forward_s,
        )

    def all_pieces(divided: bool) -> list[Piece]:
        prefix, *layers, suffix = traced.parts(model, divided)
        shared = traced.shared_weights(model, divided)
        return [
            piece("embedding", prefix, options, ()),
            *(piece("layer", x, own, ()) for x, own in zip(layers, by_layer, strict=True)),
            piece("head", suffix, options, shared),
        ]

    made = all_pieces(divided=False)
    if model.traced.divided is not None and np.any(layouts.tp > 1):
        cut = all_pieces(divided=True)
        made = [chosen(layouts.tp > 1, c, m) for c, m in zip(cut, made, strict=True)]
    embedding, *layers, head = made
    return Pieces(
        embedding=embedding,
        layers=tuple(layers),
        head=head,
        tied_params=traced.shared_params(model, layouts),
    )
